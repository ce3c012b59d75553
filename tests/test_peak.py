"""An unsaved activation goes with its last use: a deep model's peak is that of the bare forward pass."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
import transformers

ROOT = pathlib.Path(__file__).parents[1]

# Prints the growth of anonymous memory, in bytes, over one forward pass with one value kept.
JOB = """
import sys
import torch
from tests.bench.memory import Peak, usage

who, directory = sys.argv[1:]
torch.manual_seed(0)
ids = torch.randint(0, 100, (16, 256))
if who == "ours":
    from nnsight_go import LanguageModel

    model = LanguageModel(directory, tokenizer=False, dispatch=True)

    def run(ids):
        with model.trace(ids):
            return model.transformer.h[-1].output[0].save()
else:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()

    def run(ids):
        with torch.no_grad():
            return model.transformer(ids, use_cache=False).last_hidden_state

run(ids[:1, :4])
before = usage()["Anonymous"]
with Peak() as peak:
    kept = run(ids)
print(peak.bytes["Anonymous"] - before, kept.nelement() * kept.element_size())
"""


@pytest.mark.slow
def test_a_deep_model_keeps_nothing(tmp_path: pathlib.Path) -> None:
    config = transformers.GPT2Config(
        n_layer=48, n_embd=128, n_head=4, vocab_size=100, n_positions=256, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    grown = {}
    for who in ("ours", "theirs"):
        command = [sys.executable, "-c", JOB, who, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        grown[who], hidden = map(int, done.stdout.split())
    assert grown["theirs"] > 4 * hidden  # what one block takes is seen at all
    assert grown["ours"] <= 1.2 * grown["theirs"], grown
