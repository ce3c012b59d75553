"""Greedy generation, plain and with one save and one edit a step."""

from __future__ import annotations

from typing import Any

import torch

from .forward import SHORT, bare_logits, blocks
from .harness import interleave
from .install import NNSIGHT
from .models import Setting, Subject
from .rows import TOLERANCE, Row, against, agree

TARGET = {torch.float32: 0.78, torch.bfloat16: 0.65}
TOKENS, NEW = 10, 20


def settings(new: int) -> dict[str, Any]:
    return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}


def bare_generate(model: Any, ids: torch.Tensor, new: int) -> torch.Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings(new))


def traced_generate(model: Any, ids: torch.Tensor, new: int) -> torch.Tensor:
    with model.generate(ids, **settings(new)) as tracer:
        output = tracer.result.save()
    return output


def traced_steps(model: Any, ids: torch.Tensor, new: int, layer: int) -> list[torch.Tensor]:
    with model.generate(ids, **settings(new)) as tracer:
        states = list().save()  # noqa: C408
        with tracer.all():
            model.transformer.h[layer].output[0][:, -1, :] *= 0.9
            states.append(model.transformer.h[-1].output[0])
    return states


def nnsight_steps(model: Any, ids: torch.Tensor, new: int, layer: int) -> list[torch.Tensor]:
    with model.generate(ids, **settings(new)) as tracer:
        states = list().save()  # noqa: C408
        for _ in tracer.iter[:new]:
            model.transformer.h[layer].output[:, -1, :] *= 0.9
            states.append(model.transformer.h[-1].output)
    return states


def greedy(subject: Subject, sequence: torch.Tensor, prompt: int) -> bool:
    """Whether every new token is one of the likeliest, for transformers, within what rounding may change."""
    logits = bare_logits(subject.bare, sequence)[:, prompt - 1 : -1].float()
    chosen = logits.gather(-1, sequence[:, prompt:, None])[..., 0]
    return bool((logits.amax(-1) - chosen <= TOLERANCE[subject.dtype] * logits.abs().amax(-1)).all())


@torch.no_grad()
def measure(setting: Setting) -> list[Row]:
    rows = plain(setting.gpt2(), setting.rounds, targets=True)
    rows += plain(setting.gpt2(torch.bfloat16), setting.rounds, targets=True)
    return rows + edited(setting.gpt2(), setting.rounds)


def plain(subject: Subject, rounds: int, name: str = "", targets: bool = False) -> list[Row]:
    ids = subject.ids(TOKENS)
    ways = {
        "bare": lambda: bare_generate(subject.bare, ids, NEW),
        "ours": lambda: traced_generate(subject.ours, ids, NEW),
    }
    found = {way: run() for way, run in ways.items()}
    assert all(greedy(subject, sequence, TOKENS) for sequence in found.values()), "not the likeliest tokens"
    same = int((found["bare"] == found["ours"]).sum()) - TOKENS
    note = f"{same} of {NEW} tokens the same"
    timed = interleave(ways, rounds, 3)
    case = f"{name}generate {NEW} tokens greedily, {SHORT[subject.dtype]}"
    target = TARGET[subject.dtype] if targets else None
    return [Row(case, timed["ours"], "transformers", timed["bare"], target, note)]


def edited(subject: Subject, rounds: int) -> list[Row]:
    ids, layer = subject.ids(TOKENS), len(blocks(subject.bare)) // 2
    ways = {
        "ours": lambda: traced_steps(subject.ours, ids, NEW, layer),
        **subject.libraries(nnsight=lambda model: nnsight_steps(model, ids, NEW, layer)),
    }
    agree(ways)
    plain = {
        "bare": lambda: bare_generate(subject.bare, ids, NEW),
        "plain": lambda: traced_generate(subject.ours, ids, NEW),
    }
    timed = interleave(ways | plain, rounds, 3)
    case = f"generate {NEW} tokens, one save and one edit a step"
    return [
        Row(case, timed["ours"], "transformers, without", timed["bare"]),
        Row(case, timed["ours"], "ours, without", timed["plain"]),
        against(case, timed["ours"], NNSIGHT, timed.get("nnsight")),
    ]
