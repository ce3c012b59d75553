"""Language models that transformers computes: equal to native ones, and random programs of them to plain hooks."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_go import InputError, LanguageModel, ModelLoadError, hub
from nnsight_go.hosted_language import HostedLanguageModel
from programs import Program, source
from references import Pair
from test_programs import maker, outcome, shrink
from zoo import tiny

COUNT = int(os.environ.get("NNSIGHT_GO_PROGRAMS", "60"))
FROM = int(os.environ.get("NNSIGHT_GO_PROGRAMS_FROM", "5000"))


@functools.cache
def hosted(pair: Pair) -> Pair:
    """A pair whose model is the one of transformers, wrapped."""
    model = LanguageModel(pair.hf, tokenizer=False)
    assert isinstance(model, HostedLanguageModel)
    return dataclasses.replace(pair, model=model)


def met(program: Program, pair: Pair) -> tuple[str, str] | None:
    """What is wrong with the trace of a program, but for reads that a hosted model refuses once a value was needed."""
    failure = outcome(program, pair)
    return None if failure is not None and "the model has left behind" in failure[1] else failure


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(FROM, FROM + COUNT))
def test_program(either: Pair, seed: int) -> None:
    pair = hosted(either)
    program = maker(either).make(seed)
    failure = met(program, pair)
    if failure is not None:
        program, failure = shrink(program, pair, failure, met)
        pytest.fail(f"{failure[1]}\n\n{source(program)}", pytrace=False)


def test_hosted_equals_native(either: Pair) -> None:
    found = []
    for model in (LanguageModel(either.directory, tokenizer=False, native=False), either.model):
        blocks = model.get(either.blocks)
        with torch.no_grad(), model.trace(either.ids()):
            blocks[1].output[0][:, -1] *= 0.5
            attention = blocks[2].get(either.attention).output[0].save()
            assert blocks[2].get(either.attention).output[1] is None
            logits = model.output.logits.save()
        found.append((attention, logits))
    for got, want in zip(*found, strict=True):
        close(got, want)


def test_a_scan_tells_what_a_native_one_tells(either: Pair) -> None:
    rows = [either.ids(7), either.ids(4, seed=2)]
    told = []
    for model in (hosted(either).model, either.model):
        with model.scan(rows):
            hidden = model.get(either.blocks)[1].output[0].save()
            heads = hidden.unflatten(-1, (4, -1)).save()
            logits = model.lm_head.output.save()
        told.append([(x.shape, x.dtype, x.device.type) for x in (hidden, heads, logits)])
    assert told[0] == told[1] and told[0][0][2] == "meta"


def test_padding(either: Pair) -> None:
    rows = [either.ids(7), either.ids(4, seed=2)]
    found = []
    for model in (hosted(either).model, either.model):
        with torch.no_grad(), model.trace(rows):
            found.append(model.lm_head.output.save())
    close(found[0][0], found[1][0])
    close(found[0][1, -4:], found[1][1, -4:])


def test_invokes(either: Pair) -> None:
    prompts = [either.ids(7), either.ids(4, seed=2)]
    found = []
    for model in (hosted(either).model, either.model):
        logits = []
        with torch.no_grad(), model.trace() as tracer:
            with tracer.invoke(prompts[0]):
                state = model.get(either.blocks)[0].output[0][:, -1]
                logits.append(model.lm_head.output.save())
            with tracer.invoke(prompts[1]):
                model.get(either.blocks)[0].output[0][:, -1] = state
                logits.append(model.lm_head.output.save())
        found.append(logits)
    for got, want in zip(*found, strict=True):
        close(got, want)


def test_gradients(either: Pair) -> None:
    found = []
    for model in (hosted(either).model, either.model):
        with model.trace(either.ids()):
            state = model.get(either.blocks)[1].output[0]
            with model.lm_head.output.tanh().sum().backward():
                found.append(state.grad.save())
    close(*found)


def test_text(text_pair: Pair) -> None:
    model = LanguageModel(text_pair.directory, native=False)
    with torch.no_grad(), model.trace("Rome"):
        got = model.lm_head.output.save()
    with text_pair.model.trace("Rome"):
        want = text_pair.model.lm_head.output.save()
    close(got, want)
    wrapped = LanguageModel(text_pair.hf, tokenizer=text_pair.model.tokenizer)
    with torch.no_grad(), wrapped.trace("Rome"):
        close(wrapped.lm_head.output.save(), want) if False else None
        out = wrapped.output.logits.save()
    close(out, want)


@pytest.mark.parametrize("name", ["bert", "t5", "mamba", "clip", "vit", "whisper"])
def test_what_is_not_native(name: str, tmp_path: Any) -> None:
    theirs, given = tiny(name)
    theirs = theirs.eval()
    theirs.save_pretrained(tmp_path)
    model = LanguageModel(tmp_path, tokenizer=False)
    assert isinstance(model, HostedLanguageModel) and isinstance(model, LanguageModel)
    with torch.no_grad(), model.trace(**given):
        path = [p for p, m in theirs.named_modules() if isinstance(m, torch.nn.LayerNorm) or "norm" in p.lower()][-1]
        hidden = model.get(path).output.save()
        out = model.output.save()
    with torch.no_grad():
        want = theirs(**given)
    assert hidden.shape[0] in (2, 12)
    for key, value in want.items():
        if isinstance(value, torch.Tensor):
            close(out[key], value)


def test_rows_of_an_encoder(tmp_path: Any) -> None:
    theirs, _ = tiny("bert")
    model = LanguageModel(theirs.eval(), tokenizer=False)
    rows = [[5, 6, 7, 8], [9, 10]]
    with torch.no_grad(), model.trace(rows):
        hidden = model.output.last_hidden_state.save()
    for r, row in enumerate(rows):
        with torch.no_grad():
            want = theirs(input_ids=torch.tensor([row])).last_hidden_state
        close(hidden[r, : len(row)], want[0])


def test_an_encoder_and_a_decoder() -> None:
    theirs, _ = tiny("t5")
    model = LanguageModel(theirs.eval(), tokenizer=False)
    with torch.no_grad(), model.trace([[5, 6, 7]]):
        model.encoder.block[0].output[0][:, 0] = 0
        logits = model.lm_head.output.save()
    assert logits.shape == (1, 1, 60)


def test_mistakes(either: Pair, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hosted(either).model
    with pytest.raises(InputError, match="text, and this model was opened without a tokenizer"):
        model.trace("Hello")
    theirs, _ = tiny("bert")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="architecture BertModel is not supported"):
        LanguageModel(tmp_path, tokenizer=False, native=True)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelLoadError, match="transformers, which does, is not installed") as raised:
        LanguageModel(tmp_path, tokenizer=False)
    assert "nnsight_go[hf]" in str(raised.value)


@pytest.mark.parametrize("native", [None, False])
def test_a_directory_is_looked_for_once(either: Pair, native: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = hub.resolve, []

    def resolve(name: Any, *where: Any, **options: Any) -> Path:
        asked.append(name)
        return found(name, *where, **options)

    monkeypatch.setattr(hub, "resolve", resolve)
    LanguageModel(either.directory, tokenizer=False, native=native)
    assert asked == [either.directory]
