"""What a trace of a wrapped module adds to its bare forward, against nnsight and hooks written by hand.

The module is small, so that its forward pass does not hide what a trace costs. Each way has a copy of
it: nnsight replaces the `forward` of every module that it wraps, which the others would pay for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from nnsight_go import NNsight

from . import install
from .harness import Timing, added, ratio

LAYERS, WIDTH, INVOKES = 12, 16, 64
MIDDLE = 5
HOOKS_TARGET = "1.3x"

Tensors = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to do, in each way: traces take a wrapped module, hooks and the bare forward take the module."""

    what: str
    traced: Callable[[Any], Tensors]
    hooked: Callable[[nn.Module], Tensors] | None  # None where there is nothing to hook
    bare: Callable[[nn.Module], object]
    target: str = ""
    traced_there: Callable[[Any], Tensors] | None = None  # in nnsight, where that is not written in the same way
    note: str = ""
    rounds: int = 20  # of the measurement, times --rounds: what takes microseconds needs many


# ---- in a trace, ours or nnsight's ----


def traced_nothing(model: Any, x: torch.Tensor) -> Tensors:
    with model.trace(x):
        pass
    return []


def traced_save(model: Any, x: torch.Tensor) -> Tensors:
    with model.trace(x):
        saved = model[MIDDLE].output.save()
    return [saved]


def traced_saves(model: Any, x: torch.Tensor) -> Tensors:
    kept: Tensors = []
    with model.trace(x):
        for i in range(LAYERS):
            kept.append(model[i].output.save())
    return kept


def traced_edit(model: Any, x: torch.Tensor) -> Tensors:
    with model.trace(x):
        model[MIDDLE].output[:] = 0
        out = model.output.save()
    return [out]


def swept_invokes(model: Any, rows: Iterable[torch.Tensor]) -> Tensors:
    kept: Tensors = []
    with model.trace() as tracer:
        for i, x in enumerate(rows):
            with tracer.invoke(x):
                model[MIDDLE].output[:, i % WIDTH] = 0
                kept.append(model.output.save())
    return kept


def swept_traces(model: Any, rows: Iterable[torch.Tensor]) -> Tensors:
    kept: Tensors = []
    for i, x in enumerate(rows):
        with model.trace(x):
            model[MIDDLE].output[:, i % WIDTH] = 0
            out = model.output.save()
        kept.append(out)
    return kept


# ---- by hand: hooks are registered, the module runs, they are removed ----


def hooked_saves(net: nn.Module, x: torch.Tensor, layers: Iterable[int]) -> Tensors:
    kept: Tensors = []
    handles = [net[i].register_forward_hook(lambda module, args, output: kept.append(output)) for i in layers]
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def hooked_edit(net: nn.Module, x: torch.Tensor, columns: slice | int) -> Tensors:
    def zero(module: nn.Module, args: object, output: torch.Tensor) -> None:
        output[:, columns] = 0

    handle = net[MIDDLE].register_forward_hook(zero)
    try:
        return [net(x)]
    finally:
        handle.remove()


def hooked_sweep(net: nn.Module, rows: Iterable[torch.Tensor]) -> Tensors:
    return [out for i, x in enumerate(rows) for out in hooked_edit(net, x, i % WIDTH)]


# ---- the measurement ----


def network() -> nn.Sequential:
    """The same at each call. Its weights keep the signal at its size, so that an edit shows in the output."""
    net = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(LAYERS)]).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=(2 / WIDTH) ** 0.5, generator=generator)
    return net


def all_cases() -> list[Case]:
    x, *rows = torch.randn(INVOKES + 1, 1, WIDTH, generator=torch.Generator().manual_seed(0))

    def of_row(what: str, traced: Callable[..., Tensors], hooked: Callable[[Any], Tensors] | None, target: str) -> Case:
        return Case(what, lambda model: traced(model, x), hooked, lambda net: net(x), target)

    return [
        of_row("an empty trace", traced_nothing, None, "0.35x"),
        of_row(f"one save: layer {MIDDLE}", traced_save, lambda net: hooked_saves(net, x, [MIDDLE]), "0.35x"),
        of_row(f"{LAYERS} saves", traced_saves, lambda net: hooked_saves(net, x, range(LAYERS)), "0.45x"),
        of_row("one edit", traced_edit, lambda net: hooked_edit(net, x, slice(None)), "0.35x"),
        Case(
            f"{INVOKES} invokes with an edit each",
            lambda model: swept_invokes(model, rows),
            lambda net: hooked_sweep(net, rows),
            lambda net: [net(row) for row in rows],
            traced_there=lambda model: swept_traces(model, rows),
            note=f"there {INVOKES} traces",
            rounds=4,
        ),
    ]


@torch.no_grad()
def hosted_cases(rounds: int) -> list[dict]:
    """A row for each case and each way that it is compared with."""
    nets = {way: network() for way in ("bare", "ours", "nnsight", "hooks")}
    ours, theirs, missing = NNsight(nets["ours"]), None, ""
    try:
        theirs = install.nnsight().NNsight(nets["nnsight"])
    except install.NotInstalled as e:
        missing = str(e)
    table = []
    for case in all_cases():
        ways = {"ours": partial(case.traced, ours)}
        if theirs is not None:
            ways["nnsight"] = partial(case.traced_there or case.traced, theirs)
        if case.hooked is not None:
            ways["hooks"] = partial(case.hooked, nets["hooks"])
        check(ways)
        bare, more = added(partial(case.bare, nets["bare"]), ways, rounds * case.rounds, warmup=20)
        notes = [f"bare: {str(bare).strip()}", missing or case.note]
        table.append(row(case.what, more["ours"], "nnsight", more.get("nnsight"), case.target, *notes))
        if case.hooked is not None:
            table.append(row(case.what, more["ours"], "hooks", more["hooks"], HOOKS_TARGET))
    expected = network()(torch.ones(1, WIDTH))
    for net in nets.values():  # no way leaves anything behind
        torch.testing.assert_close(net(torch.ones(1, WIDTH)), expected)
    return table


def check(ways: dict[str, Callable[[], Tensors]]) -> None:
    """Raises AssertionError unless all ways compute the same."""
    results = {name: run() for name, run in ways.items()}
    for name, values in results.items():
        torch.testing.assert_close(values, results["ours"], msg=lambda text, name=name: f"{name}: {text}")


def row(case: str, ours: Timing, against: str, theirs: Timing | None, target: str, *notes: str) -> dict:
    return {
        "case": case,
        "ours": str(ours),
        "against": f"nnsight {install.VERSION}" if against == "nnsight" else against,
        "theirs": str(theirs) if theirs else f"{against} is not installed",
        "ratio": ratio(ours, theirs) if theirs else "-",
        "target": target,
        "note": "; ".join(filter(None, notes)),
    }


def hosted_table(rows: list[dict]) -> str:
    lines = ["| added to the bare forward of an MLP | nnsight_go | against | adds | ratio | target | |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += ["| {case} | {ours} | {against} | {theirs} | **{ratio}** | {target} | {note} |".format(**r) for r in rows]
    return "\n".join(lines)
