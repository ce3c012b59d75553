"""One job in a process of its own, which prints its figures as JSON.

python -m tests.bench.job JOB WAY DIRECTORY TOKENS DEVICE

JOB is `open` (opens a model and runs a forward pass), `gradients` (the same with a backward pass) or `cache`
(keeps what every module gives; opening does not count). WAY is `ours`, `transformers` or `nnsight`.
Every way has imported the same before anything counts, nnsight excepted, which only its own way imports.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from nnsight_go import LanguageModel

from .caching import hooked_cache, nnsight_cache, traced_cache
from .forward import bare_logits, traced_logits
from .gradients import hooked_gradients, traced_gradients
from .harness import WARMUP, seconds
from .install import NNSIGHT
from .memory import Peak, usage


def opened(way: str, directory: str, device: str) -> Any:
    if way == "ours":
        return LanguageModel(directory, tokenizer=False, dispatch=True, device_map=device)
    model = AutoModelForCausalLM.from_pretrained(directory).to(device)
    return NNSIGHT.load().NNsight(model) if way == "nnsight" else model


@torch.no_grad()
def forward(way: str, model: Any, ids: torch.Tensor) -> Any:
    return (traced_logits if way == "ours" else bare_logits)(model, ids)


def gradients(way: str, model: Any, ids: torch.Tensor) -> Any:
    return (traced_gradients if way == "ours" else hooked_gradients)(model, ids)


@torch.no_grad()
def cached(way: str, model: Any, ids: torch.Tensor) -> Any:
    return {"ours": traced_cache, "nnsight": nnsight_cache, "transformers": hooked_cache}[way](model, ids)


def main() -> None:
    job, way, directory, tokens, device = sys.argv[1:]
    ids = torch.arange(1, int(tokens) + 1, device=device).unsqueeze(0)
    run = {"open": forward, "gradients": gradients, "cache": cached}[job]
    figures: dict[str, float] = {}
    if job == "cache":
        model = opened(way, directory, device)
        for _ in range(WARMUP):  # imports what is late, and packs what is packed
            run(way, model, ids[:, :2])
        before = usage()
        with Peak() as peak:
            kept = run(way, model, ids)
        del kept
    else:
        before = usage()
        with Peak() as peak:
            start = time.perf_counter()
            model = opened(way, directory, device)
            figures["open"] = time.perf_counter() - start
            found: list[Any] = []
            figures["first"] = figures["open"] + seconds(lambda: found.append(run(way, model, ids)))
        if job == "open":
            figures["check"] = float(found[0][0, -1].double().logsumexp(-1))
    print(json.dumps(figures | {name: peak.bytes[name] - before[name] for name in before}))


if __name__ == "__main__":
    main()
