"""The gradients of all hidden states, by hooks on transformers' model and in a trace."""

from __future__ import annotations

from typing import Any

import torch


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
