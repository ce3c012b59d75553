"""A logit lens: what the hidden states after every block would give as logits, at the last position."""

from __future__ import annotations

from typing import Any

import torch

from .harness import interleave
from .install import LENS, NNSIGHT
from .models import Setting
from .rows import Row, Tensors, against, agree


def traced_lens(model: Any, ids: torch.Tensor) -> Tensors:
    kept = []
    with model.trace(ids):
        for block in model.transformer.h:
            state = block.output[0][:, -1]
            kept.append(model.lm_head(model.transformer.ln_f(state)).save())
    return kept


def nnsight_lens(model: Any, ids: torch.Tensor) -> Tensors:
    kept = []
    with model.trace(ids):
        for block in model.transformer.h:
            state = block.output[:, -1]
            kept.append(model.lm_head(model.transformer.ln_f(state)).save())
    return kept


def hooked_lens(model: Any, ids: torch.Tensor) -> Tensors:
    states: Tensors = []
    handles = [
        block.register_forward_hook(lambda module, args, output: states.append(output[:, -1]))
        for block in model.transformer.h
    ]
    try:
        model.transformer(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [model.lm_head(model.transformer.ln_f(state)) for state in states]


def lens_lens(model: Any, ids: torch.Tensor) -> Tensors:
    names = [f"blocks.{layer}.hook_out" for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(ids, names_filter=names)
    return [model.unembed(model.ln_final(cache[name][:, -1:]))[:, 0] for name in names]


@torch.no_grad()
def measure(setting: Setting) -> list[Row]:
    subject = setting.gpt2()
    rows = []
    for tokens in (10, 64):
        ids = subject.ids(tokens)
        ways = {
            "hooks": lambda ids=ids: hooked_lens(subject.bare, ids),
            "ours": lambda ids=ids: traced_lens(subject.ours, ids),
            **subject.libraries(
                nnsight=lambda model, ids=ids: nnsight_lens(model, ids),
                lens=lambda model, ids=ids: lens_lens(model, ids),
            ),
        }
        note = f"max relative difference {agree(ways):.0e}"
        timed = interleave(ways, setting.rounds)
        case = f"logit lens over all layers, {tokens} tokens"
        rows += [
            Row(case, timed["ours"], "hooks", timed["hooks"], note=note),
            against(case, timed["ours"], NNSIGHT, timed.get("nnsight")),
            against(case, timed["ours"], LENS, timed.get("lens")),
        ]
    return rows
