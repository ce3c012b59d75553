"""The gradients of all hidden states, by hooks on transformers' model and in a trace."""

from __future__ import annotations

from typing import Any

import torch

from .harness import interleave
from .models import Setting
from .processes import memory_rows, run_jobs
from .rows import Row, agree


def hooked_gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """As one writes it by hand: hooks that keep each block's output and its gradient."""
    states: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        state.retain_grad()
        states.append(state)

    handles = [block.register_forward_hook(keep) for block in model.transformer.h]
    try:
        model.zero_grad()
        model(ids, use_cache=False).logits[0, -1].logsumexp(-1).backward()
    finally:
        for handle in handles:
            handle.remove()
    return [state.grad for state in states if state.grad is not None]


def traced_gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """The same in a trace."""
    with model.trace(ids):
        states = [block.output[0] for block in model.transformer.h]
        with model.lm_head.output[0, -1].logsumexp(-1).backward():
            grads = [state.grad.save() for state in states]
    return grads


def measure(setting: Setting) -> list[Row]:
    """A forward pass and the gradients of every block's hidden states."""
    subject = setting.gpt2()
    rows = []
    for tokens in (10, 64):
        ids = subject.ids(tokens)
        ways = {
            "hooks": lambda ids=ids: hooked_gradients(subject.bare, ids),
            "ours": lambda ids=ids: traced_gradients(subject.ours, ids),
        }
        note = f"max relative difference {agree(ways):.0e}"
        timed = interleave(ways, setting.rounds)
        case = f"gradients of {len(subject.bare.transformer.h)} hidden states, {tokens} tokens"
        rows.append(Row(case, timed["ours"], "hooks", timed["hooks"], note=note))
    # The benchmark itself is not to keep the gradients of all weights, as hooks do.
    subject.bare.zero_grad(set_to_none=True)
    case = "gradients with 64 tokens, opening included"
    return rows + memory_rows(
        case, run_jobs(setting, "gradients", ["ours", "transformers"], 64), {"transformers": "hooks"}
    )
