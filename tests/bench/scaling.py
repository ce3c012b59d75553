"""Curves: what a trace costs against the number of layers, tokens, invokes, saves and steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .forward import bare_logits, hooked_state, nnsight_state, traced_last, traced_state
from .generation import TOKENS, bare_generate, traced_generate
from .harness import LEAST, Timing, interleave
from .models import Setting, Subject
from .rows import Curve, Tensors, agree

Ways = dict[str, Callable[[], Any]]
SIZES = {
    "layers": (2, 4, 8, 16, 32),
    "tokens": (1, 4, 16, 64, 256),
    "invokes": (1, 4, 16, 64),
    "saves": (1, 4, 16, 64),
    "steps": (5, 10, 20, 40),
}


@torch.no_grad()
def measure(setting: Setting) -> list[Curve]:
    rounds = max(setting.rounds // 3, LEAST)

    def curve(title: str, size: str, ways: Callable[[int], Ways]) -> Curve:
        points: dict[str, dict[int, Timing]] = {}
        for n in SIZES[size][: 3 if setting.small else None]:
            for way, timing in interleave(ways(n), rounds, LEAST).items():
                points.setdefault(way, {})[n] = timing
        return Curve(title, size, points)

    whole, flat = setting.gpt2(), setting.narrow(16)
    narrow = "a GPT-2 of width 64"
    return [
        curve(f"one save in the last of n layers, {narrow}", "layers", lambda n: layers(setting.narrow(n))),
        curve("the last logits", "tokens", lambda n: tokens(whole, n)),
        curve("an edit and the last logits each, 10 tokens", "invokes", lambda n: invokes(whole, n)),
        curve(f"saves in 16 layers, {narrow}", "saves", lambda n: saves(flat, n)),
        curve("greedy generation", "steps", lambda n: steps(whole, n)),
    ]


def layers(subject: Subject) -> Ways:
    ids, last = subject.ids(10), len(subject.bare.transformer.h) - 1
    ways: Ways = {
        "ours": lambda: traced_state(subject.ours, ids, last),
        "hooks": lambda: hooked_state(subject.bare, ids, last),
        **subject.libraries(nnsight=lambda model: nnsight_state(model, ids, last)),
    }
    agree({way: lambda run=run: [run()] for way, run in ways.items()})
    return ways


def tokens(subject: Subject, n: int) -> Ways:
    ids = subject.ids(n)
    ways = {"ours": lambda: traced_last(subject.ours, ids), "transformers": lambda: bare_logits(subject.bare, ids)}
    agree({"ours": lambda: [ways["ours"]()], "transformers": lambda: [ways["transformers"]()[:, -1]]})
    return ways


# ---- n invokes, each of which silences one column of a block ----


def traced_invokes(model: Any, rows: Iterable[torch.Tensor], layer: int) -> Tensors:
    kept = []
    with model.trace() as tracer:
        for i, ids in enumerate(rows):
            with tracer.invoke(ids):
                model.transformer.h[layer].output[0][:, :, i] = 0
                kept.append(model.lm_head.output[:, -1].save())
    return kept


def nnsight_traces(model: Any, rows: Iterable[torch.Tensor], layer: int) -> Tensors:
    kept = []
    for i, ids in enumerate(rows):
        with model.trace(ids):
            model.transformer.h[layer].output[:, :, i] = 0
            logits = model.lm_head.output[:, -1].save()
        kept.append(logits)
    return kept


def hooked_batch(model: Any, rows: Iterable[torch.Tensor], layer: int) -> Tensors:
    """As one writes it who has thought of a batch."""
    batch = torch.cat(list(rows))
    each = torch.arange(len(batch), device=batch.device)

    def silence(module: Any, args: Any, output: torch.Tensor) -> None:
        output[each, :, each] = 0

    handle = model.transformer.h[layer].register_forward_hook(silence)
    try:
        return list(bare_logits(model, batch)[:, -1].split(1))
    finally:
        handle.remove()


def invokes(subject: Subject, n: int) -> Ways:
    rows, layer = subject.ids(10, rows=n).split(1), len(subject.bare.transformer.h) // 2
    ways: Ways = {
        "ours": lambda: traced_invokes(subject.ours, rows, layer),
        "hooks, batched": lambda: hooked_batch(subject.bare, rows, layer),
        **subject.libraries(nnsight=lambda model: nnsight_traces(model, rows, layer)),
    }
    agree(ways)
    return ways


# ---- n saves: modules of all layers, one kind after the other ----


def places(model: Any, n: int) -> list[Any]:
    kinds = ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
    found = [(kind, block) for kind in kinds for block in model.transformer.h]
    modules = []
    for kind, module in found[:n]:
        for name in kind.split("."):
            module = getattr(module, name)
        modules.append(module)
    return modules


def in_order(model: Any, n: int) -> list[tuple[int, Any]]:
    """The same in the order in which the model runs, in which nnsight has to read: a layer's modules together."""
    depth = len(model.transformer.h)
    return sorted(enumerate(places(model, n)), key=lambda item: (item[0] % depth, item[0]))


def traced_saves(model: Any, ids: torch.Tensor, n: int) -> Tensors:
    kept = []
    with model.trace(ids):
        for _, module in in_order(model, n):
            kept.append(module.output.save())
    return kept


def hooked_saves(model: Any, ids: torch.Tensor, n: int) -> Tensors:
    kept: Tensors = []
    handles = [
        module.register_forward_hook(lambda module, args, output: kept.append(output))
        for _, module in in_order(model, n)
    ]
    try:
        bare_logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def saves(subject: Subject, n: int) -> Ways:
    ids = subject.ids(10)
    ways: Ways = {
        "ours": lambda: traced_saves(subject.ours, ids, n),
        "hooks": lambda: hooked_saves(subject.bare, ids, n),
        **subject.libraries(nnsight=lambda model: traced_saves(model, ids, n)),
    }
    agree(ways)
    return ways


def steps(subject: Subject, n: int) -> Ways:
    ids = subject.ids(TOKENS)
    return {
        "ours": lambda: traced_generate(subject.ours, ids, n),
        "transformers": lambda: bare_generate(subject.bare, ids, n),
    }
