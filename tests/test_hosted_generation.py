"""Generation of wrapped language models: transformers' own loop, with every step open.

What it has in common with the engine's own is tested with that (test_generate*.py).
"""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
import transformers

from nnsight_go import InputError, LanguageModel, OpError, OutOfOrderError
from references import gpt2, reference
from zoo import tiny

IDS = [[5, 6, 7, 8], [9, 10, 11, 12]]


def wrapped(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """A model of an architecture that the engine does not know, transformers' own, and inputs."""
    torch.manual_seed(0)
    if name == "mamba":
        config = transformers.MambaConfig(vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=2)
        module: Any = transformers.MambaForCausalLM(config)
        given: dict[str, Any] = {"input_ids": torch.tensor(IDS)}
    elif name == "whisper":
        inner, given = tiny("whisper")
        module = transformers.WhisperForConditionalGeneration(inner.config)
        given = {"input_features": given["input_features"]}
    else:
        module, given = tiny("t5")
        given = {"input_ids": given["input_ids"]}
    module.eval()
    module.generation_config.eos_token_id = None
    module.generation_config.pad_token_id = 0
    if name != "mamba":
        module.generation_config.decoder_start_token_id = 1
    return LanguageModel(module, tokenizer=False), module, given


def heads(module: Any, run: Any, factor: float | None = None) -> list[torch.Tensor]:
    """What the head gives at each step, as a hook sees it; from step 1 on it is multiplied."""
    seen: list[torch.Tensor] = []

    def hook(m: Any, a: Any, output: torch.Tensor) -> torch.Tensor | None:
        seen.append(output.clone())
        return output * factor if factor is not None and len(seen) > 1 else None

    handle = module.get_output_embeddings().register_forward_hook(hook)
    try:
        run()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["mamba", "t5", "whisper"])
def test_other_families(name: str) -> None:
    model, module, given = wrapped(name)
    head = "proj_out" if name == "whisper" else "lm_head"
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    logits = []
    with model.generate(**given, **settings) as tracer:
        for step in tracer.iter[:]:
            logits.append(model.get(head).output.save())
            if step > 0:
                model.get(head).output = model.get(head).output * -1.0
        tokens = tracer.result.save()
    want = heads(module, lambda: module.generate(**given, **settings), -1.0)
    assert len(logits) == len(want) == 4
    for got, expected in zip(logits, want, strict=True):
        torch.testing.assert_close(got, expected)
    handle = module.get_output_embeddings()
    calls: list[int] = []

    def flipped(m: Any, a: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return output * -1.0 if len(calls) > 1 else output

    hook = handle.register_forward_hook(flipped)
    assert torch.equal(tokens, module.generate(**given, **settings))
    hook.remove()


def test_an_encoder_belongs_to_the_first_step() -> None:
    model, module, given = wrapped("t5")
    with model.generate(**given, max_new_tokens=3, do_sample=False) as tracer:
        model.encoder.block[0].output[0][:] *= 0.5
        hidden = model.encoder.output.last_hidden_state.save()
        assert model.decoder.block[0].output[0].shape == (2, 1, 16)
        tokens = tracer.result.save()
    hook = module.encoder.block[0].register_forward_hook(lambda m, a, y: (y[0] * 0.5, *y[1:]))
    torch.testing.assert_close(hidden, module.encoder(given["input_ids"]).last_hidden_state)
    assert torch.equal(tokens, module.generate(**given, max_new_tokens=3, do_sample=False))
    hook.remove()
    with pytest.raises(Exception, match="not called"), model.generate(**given, max_new_tokens=3) as tracer:
        for step in tracer.iter[:]:
            if step == 1:
                model.encoder.output.last_hidden_state.save()


def small() -> tuple[Any, Any]:
    theirs = reference(gpt2())
    theirs.generation_config.eos_token_id = None
    return LanguageModel(theirs, tokenizer=False), theirs


def test_sizes_of_later_steps() -> None:
    model, _ = small()
    told, found = [], []
    with model.generate(IDS, max_new_tokens=6) as tracer:
        for _ in tracer.iter[:]:
            inputs = model.transformer.h[0].inputs
            masks = [x for x in [*inputs[0], *inputs[1].values()] if isinstance(x, torch.Tensor) and x.dim() == 4]
            states = model.transformer.h[1].output[0]
            told.append([tuple(x.shape) for x in [states, *masks]])
            found.append([x.save() for x in [states, *masks]])
    assert [[tuple(x.shape) for x in step] for step in found] == told
    assert [step[0][1] for step in told] == [4, 1, 1, 1, 1, 1]
    with model.generate([[5, 6]], max_new_tokens=2) as tracer, tracer.all():  # a length that is new
        assert model.lm_head.output.shape[0] == 1
        model.lm_head.output.save()


def test_sampling_is_transformers_under_a_seed() -> None:
    model, theirs = small()
    for _ in range(2):  # the first is tried out before
        torch.manual_seed(4)
        with model.generate(IDS, max_new_tokens=8, do_sample=True, top_k=20, pad_token_id=0) as tracer:
            model.transformer.h[0].output[0][:] *= 1.0
            tokens = tracer.result.save()
        torch.manual_seed(4)
        ids = torch.tensor(IDS)
        want = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=True, top_k=20, pad_token_id=0
        )
        assert torch.equal(tokens, want)


@pytest.mark.parametrize("how", ["raise", "operation", "stop", "unused", "late"])
def test_nothing_is_left_behind(how: str) -> None:
    model, theirs = small()
    gc.collect()
    threads = threading.active_count()
    with model.generate(IDS, max_new_tokens=5):
        pass
    if how == "stop":
        with model.generate(IDS, max_new_tokens=5) as tracer:
            for step in tracer.iter[:]:
                if step == 2:
                    float(model.lm_head.output.sum())
                    tokens = tracer.result.save()
                    tracer.stop()
        assert tokens.shape == (2, 7)
    elif how == "unused":
        model.generate(IDS, max_new_tokens=5)
    else:
        error = {"raise": ZeroDivisionError, "operation": OpError, "late": OutOfOrderError}[how]
        with pytest.raises(error), model.generate(IDS, max_new_tokens=5) as tracer:
            for step in tracer.iter[:]:
                states = model.transformer.h[0].output[0]
                if step == 2 and how == "raise":
                    float(states.sum())
                    raise ZeroDivisionError
                if step == 2 and how == "operation":
                    (states @ torch.zeros(3, 3)).save()
                if step == 2 and how == "late":
                    model.lm_head.output.sum().save()
                    model.transformer.h[0].output[0][:] = 0
    gc.collect()
    assert threading.active_count() == threads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in theirs.modules())
    with model.generate(IDS, max_new_tokens=2) as tracer:
        tokens = tracer.result.save()
    assert tokens.shape == (2, 6)


def test_one_that_writes_no_text() -> None:
    torch.manual_seed(0)
    module, _ = tiny("bert")
    with pytest.raises(InputError, match="a BertModel writes no text"):
        LanguageModel(module, tokenizer=False).generate(IDS, max_new_tokens=2)
    model, _ = small()
    with pytest.raises(InputError, match="0 new tokens"):
        model.generate(IDS, max_new_tokens=0)
    with pytest.raises(InputError, match="not known during a generation"), model.generate(IDS, max_new_tokens=2):
        model.transformer.h[0].source.add_0.output.save()


def test_text_and_streams(text_pair: Any) -> None:
    model = LanguageModel(text_pair.directory, native=False)
    native = LanguageModel(text_pair.directory, native=True)
    pieces = list(model.stream("Once upon a time", max_new_tokens=8))
    assert "".join(pieces) == "".join(native.stream("Once upon a time", max_new_tokens=8))
    with model.generate("Once upon a time", max_new_tokens=3) as tracer:
        mine = tracer.result.save()
    with native.generate("Once upon a time", max_new_tokens=3) as tracer:
        other = tracer.result.save()
    assert torch.equal(mine, other)
