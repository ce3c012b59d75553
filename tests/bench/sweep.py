"""A patching sweep: every block's hidden states, at every position, replaced by those of a clean run."""

from __future__ import annotations

from typing import Any

import torch

from .forward import hooked_state
from .harness import interleave
from .install import LENS, NNSIGHT
from .models import Setting
from .rows import Row, Tensors, against, agree

TOKENS = 10
HOOKS_TARGET, NNSIGHT_TARGET = 0.25, 0.06


def clean_states(model: Any, ids: torch.Tensor) -> Tensors:
    """The hidden states after every block."""
    return [hooked_state(model, ids, layer) for layer in range(len(model.transformer.h))]


def swept(model: Any, ids: torch.Tensor, clean: Tensors) -> Tensors:
    kept = []
    with model.trace() as tracer:
        for layer, state in enumerate(clean):
            for position in range(ids.shape[1]):
                with tracer.invoke(ids):
                    model.transformer.h[layer].output[0][:, position] = state[:, position]
                    kept.append(model.lm_head.output[:, -1].save())
    return kept


def nnsight_swept(model: Any, ids: torch.Tensor, clean: Tensors) -> Tensors:
    kept = []
    for layer, state in enumerate(clean):
        for position in range(ids.shape[1]):
            with model.trace(ids):
                model.transformer.h[layer].output[:, position] = state[:, position]
                logits = model.lm_head.output[:, -1].save()
            kept.append(logits)
    return kept


def hooked_swept(model: Any, ids: torch.Tensor, clean: Tensors, **options: int) -> Tensors:
    """A batch for each layer, a row for each position."""
    kept: Tensors = []
    positions = torch.arange(ids.shape[1], device=ids.device)
    batch = ids.expand(len(positions), -1)
    for block, state in zip(model.transformer.h, clean, strict=True):

        def patch(module: Any, args: Any, output: torch.Tensor, state: torch.Tensor = state) -> None:
            output[positions, positions] = state[0]

        handle = block.register_forward_hook(patch)
        try:
            kept += model(batch, use_cache=False, **options).logits[:, -1].split(1)
        finally:
            handle.remove()
    return kept


def lens_swept(model: Any, ids: torch.Tensor, clean: Tensors) -> Tensors:
    """The same batches with TransformerLens's hooks."""
    kept: Tensors = []
    positions = torch.arange(ids.shape[1], device=ids.device)
    batch = ids.expand(len(positions), -1)
    for layer, state in enumerate(clean):

        def patch(value: torch.Tensor, hook: Any, state: torch.Tensor = state) -> torch.Tensor:
            value[positions, positions] = state[0]
            return value

        kept += model.run_with_hooks(batch, fwd_hooks=[(f"blocks.{layer}.hook_out", patch)])[:, -1].split(1)
    return kept


@torch.no_grad()
def measure(setting: Setting) -> list[Row]:
    subject = setting.gpt2()
    first, ids = subject.ids(TOKENS, rows=2).split(1)
    clean = clean_states(subject.bare, first)
    ways = {
        "hooks": lambda: hooked_swept(subject.bare, ids, clean),
        "hooks, last": lambda: hooked_swept(subject.bare, ids, clean, logits_to_keep=1),
        "ours": lambda: swept(subject.ours, ids, clean),
        **subject.libraries(
            nnsight=lambda model: nnsight_swept(model, ids, clean), lens=lambda model: lens_swept(model, ids, clean)
        ),
    }
    note = f"max relative difference {agree(ways):.0e}"
    timed = interleave(ways, setting.rounds, 2)
    case = f"patching sweep, {len(clean)} layers x {TOKENS} positions"
    batches, traces = f"{len(clean)} batches of {TOKENS}", f"{len(clean) * TOKENS} traces"
    return [
        Row(case, timed["ours"], "hooks, batched", timed["hooks"], HOOKS_TARGET, f"{batches}; {note}"),
        Row(case, timed["ours"], "hooks, batched, logits_to_keep=1", timed["hooks, last"], note=batches),
        against(case, timed["ours"], NNSIGHT, timed.get("nnsight"), NNSIGHT_TARGET, traces),
        against(case, timed["ours"], LENS, timed.get("lens"), note=batches),
    ]
