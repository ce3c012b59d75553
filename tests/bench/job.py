"""One job in a process of its own: opens a model, runs a forward with one save, prints its figures.

python -m tests.bench.job ours|theirs DIRECTORY TOKENS [gradients]
"""

from __future__ import annotations

import json
import sys
import time

import torch

from .gradients import hooked_gradients, traced_gradients
from .memory import Peak, usage


def main() -> None:
    who, directory, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    gradients = sys.argv[4:] == ["gradients"]
    ids = torch.arange(1, tokens + 1).unsqueeze(0)
    if who == "ours":
        from nnsight_go import LanguageModel
    else:
        from transformers import AutoModelForCausalLM
    before = usage()
    with Peak() as peak:
        start = time.perf_counter()
        if who == "ours":
            model = LanguageModel(directory, tokenizer=False, dispatch=True)
            opened = time.perf_counter() - start
            if gradients:
                found = traced_gradients(model, ids)[0]
            else:
                with model.trace(ids):
                    found = model.lm_head.output.save()
        else:
            model = AutoModelForCausalLM.from_pretrained(directory)
            opened = time.perf_counter() - start
            if gradients:
                found = hooked_gradients(model, ids)[0]
            else:
                with torch.no_grad():
                    found = model(ids).logits
        first = time.perf_counter() - start
    figures = {name: peak.bytes[name] - before[name] for name in before}
    print(json.dumps(figures | {"open": opened, "first": first, "check": float(found.double().sum())}))


if __name__ == "__main__":
    main()
