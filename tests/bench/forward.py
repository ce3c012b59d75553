"""A forward pass with something saved, against the bare one, hooks, nnsight and TransformerLens."""

from __future__ import annotations

from typing import Any

import torch

from . import limits
from .harness import interleave
from .install import LENS, NNSIGHT
from .models import Setting, Subject
from .rows import Row, against, agree

LAST = {torch.float32: {10: 0.46, 64: 0.62}, torch.bfloat16: {10: 0.48, 64: 0.42}}
ALL = {torch.float32: {10: 0.52, 64: 0.77}}
STATE = {torch.float32: {10: 0.18, 64: 0.28}}
LAYER = 5
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


# ---- ways to get the logits ----


def bare_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def bare_last(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """As one writes it who knows that transformers can leave the other positions out."""
    return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]


def traced_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with model.trace(ids):
        saved = model.lm_head.output.save()
    return saved


def traced_last(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with model.trace(ids):
        saved = model.lm_head.output[:, -1].save()
    return saved


# ---- ways to get one block's hidden states ----


def traced_state(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    with model.trace(ids):
        saved = blocks(model)[layer].output[0].save()
    return saved


def nnsight_state(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    with model.trace(ids):
        saved = model.transformer.h[layer].output.save()
    return saved


def lens_state(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    kept = []
    model.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.hook_out", lambda value, hook: kept.append(value))])
    return kept[0]


def hooked_state(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    kept = []
    handle = blocks(model)[layer].register_forward_hook(lambda module, args, output: kept.append(output))
    try:
        model(ids, use_cache=False)
    finally:
        handle.remove()
    return kept[0]


# ---- the measurement ----


@torch.no_grad()
def measure(setting: Setting) -> list[Row]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        subject = setting.gpt2(dtype)
        for tokens in (1, 10, 64, 512):
            rows += at(subject, tokens, setting.rounds, libraries=dtype == torch.float32 and tokens in (10, 64))
    return rows


def at(
    subject: Subject, tokens: int, rounds: int, libraries: bool = False, name: str = "", targets: bool = True
) -> list[Row]:
    """Rows at one length, against transformers and, where asked for, against libraries and hooks."""
    ids, bare, ours = subject.ids(tokens), subject.bare, subject.ours
    layer = min(LAYER, len(blocks(bare)) - 1)
    last = {"kept": lambda: bare_last(bare, ids), "last": lambda: traced_last(ours, ids)}
    if subject.device != "cpu":
        last["captured"] = lambda: traced_last(subject.captured, ids)
    logits = {"bare": lambda: bare_logits(bare, ids), "all": lambda: traced_logits(ours, ids)}
    state = {"hooks": lambda: hooked_state(bare, ids, layer), "state": lambda: traced_state(ours, ids, layer)}
    if libraries:
        state |= subject.libraries(
            nnsight=lambda model: nnsight_state(model, ids, layer), lens=lambda model: lens_state(model, ids, layer)
        )
    errors = [agree({k: lambda run=run: [run()] for k, run in w.items()}, subject.dtype) for w in (last, logits, state)]
    roofline = subject.device == "cpu" and hasattr(bare, "transformer")
    timed = interleave(last | logits | state | (limits.ways(subject.dtype) if roofline else {}), rounds)

    def target(of: dict) -> float | None:
        return of.get(subject.dtype, {}).get(tokens) if targets else None

    where = f"{name}{tokens} token{'s' * (tokens > 1)} {SHORT[subject.dtype]}"
    saved = f"{where}: save layer {layer} of {len(blocks(bare))}"
    note = f"max relative difference {max(errors):.0e}"
    if roofline:
        least = limits.least(bare, tokens, timed)
        note += f"; this machine's limit: {1e3 * least:.1f} ms, {least / timed['bare'].median:.2f}x"
    rows = [
        Row(f"{where}: save the last logits", timed["last"], "transformers", timed["bare"], target(LAST), note),
        Row(f"{where}: save the last logits", timed["last"], "transformers, logits_to_keep=1", timed["kept"]),
        Row(f"{where}: save all logits", timed["all"], "transformers", timed["bare"], target(ALL)),
        Row(saved, timed["state"], "transformers", timed["bare"], target(STATE), "no stop()"),
    ]
    if "captured" in timed:
        case = f"{where}: save the last logits, by a CUDA graph"
        rows += [
            Row(case, timed["captured"], "transformers", timed["bare"]),
            Row(case, timed["captured"], "without", timed["last"]),
        ]
    if libraries:
        rows.append(Row(saved, timed["state"], "hooks", timed["hooks"]))
        rows.append(against(saved, timed["state"], NNSIGHT, timed.get("nnsight")))
        rows.append(against(saved, timed["state"], LENS, timed.get("lens")))
    return rows
