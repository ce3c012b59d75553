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

from .harness import added, interleave
from .install import NNSIGHT
from .models import Setting
from .rows import Row, Tensors, against, agree

LAYERS, WIDTH, INVOKES, MANY = 12, 16, 64, 64
MIDDLE = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing to do, in each way: traces take a wrapped module, hooks and the bare forward take the module."""

    what: str
    traced: Callable[[Any], Tensors]
    hooked: Callable[[nn.Module], Tensors] | None  # None where there is nothing to hook
    bare: Callable[[nn.Module], object] | None  # None where whole times are compared: invokes share a pass
    target: float | None = None  # against nnsight
    traced_there: Callable[[Any], Tensors] | None = None  # in nnsight, where that is not written in the same way
    note: str = ""
    rounds: int = 20  # of the measurement, times --rounds: what takes microseconds needs many


def many() -> list[int]:
    """Which layers are saved where there are more saves than layers, in order."""
    return [i * LAYERS // MANY for i in range(MANY)]


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


def traced_many(model: Any, x: torch.Tensor) -> Tensors:
    kept: Tensors = []
    with model.trace(x):
        for i in many():
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

    def of_row(
        what: str, traced: Callable[..., Tensors], hooked: Callable[[Any], Tensors] | None, target: float | None
    ) -> Case:
        return Case(what, lambda model: traced(model, x), hooked, lambda net: net(x), target)

    return [
        of_row("an empty trace", traced_nothing, None, 0.25),
        of_row(f"one save: layer {MIDDLE}", traced_save, lambda net: hooked_saves(net, x, [MIDDLE]), 0.3),
        of_row(f"{LAYERS} saves", traced_saves, lambda net: hooked_saves(net, x, range(LAYERS)), 0.4),
        of_row(f"{MANY} saves of {LAYERS} layers", traced_many, lambda net: hooked_saves(net, x, many()), None),
        of_row("one edit", traced_edit, lambda net: hooked_edit(net, x, slice(None)), None),
        Case(
            f"{INVOKES} invokes with an edit each, forwards included",
            lambda model: swept_invokes(model, rows),
            lambda net: hooked_sweep(net, rows),
            None,
            traced_there=lambda model: swept_traces(model, rows),
            note=f"there {INVOKES} traces",
            rounds=4,
        ),
    ]


@torch.no_grad()
def measure(setting: Setting) -> list[Row]:
    """A row for each case and each way that it is compared with. The module stays on the CPU."""
    nets = {way: network() for way in ("bare", "ours", "nnsight", "hooks")}
    ours, library = NNsight(nets["ours"]), NNSIGHT.available()
    theirs = library and library.NNsight(nets["nnsight"])
    rows = []
    for case in all_cases():
        ways = {"ours": partial(case.traced, ours)}
        if theirs is not None:
            ways["nnsight"] = partial(case.traced_there or case.traced, theirs)
        if case.hooked is not None:
            ways["hooks"] = partial(case.hooked, nets["hooks"])
        agree(ways)
        rounds = setting.rounds * case.rounds
        if case.bare is None:
            more, note = interleave(ways, rounds), case.note
        else:
            bare, more = added(partial(case.bare, nets["bare"]), ways, rounds, warmup=min(rounds, 20))
            note = f"bare: {bare}"
        rows.append(against(case.what, more["ours"], NNSIGHT, more.get("nnsight"), case.target, note))
        if case.hooked is not None:
            rows.append(Row(case.what, more["ours"], "hooks", more["hooks"]))
    expected = network()(torch.ones(1, WIDTH))
    for net in nets.values():  # no way leaves anything behind
        torch.testing.assert_close(net(torch.ones(1, WIDTH)), expected)
    return rows
