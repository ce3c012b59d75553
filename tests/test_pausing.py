"""Traces that stop for a value in mid-block, and invokes that need forward passes of their own."""

from __future__ import annotations

import pathlib

import pytest
import torch

from nnsight_go import InputError, LanguageModel, OpError
from nnsight_go.native import Run
from references import gpt2, llama, reference

IDS, OTHER, LONG = [1, 2, 3, 4], [7, 8, 9, 10], [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    directory: pathlib.Path = tmp_path_factory.mktemp(request.param)
    reference(gpt2(n_layer=6) if request.param == "gpt2" else llama(num_hidden_layers=6)).save_pretrained(directory)
    return LanguageModel(directory, tokenizer=False)


def blocks(model: LanguageModel) -> list:
    return list(model.transformer.h if model.config.model_type == "gpt2" else model.model.layers)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the engine was told: "begin" a run, "more"."""
    told: list[str] = []
    for name, method in (("begin", "__init__"), ("more", "more")):
        original = getattr(Run, method)

        def note(*args: object, _original: object = original, _name: str = name) -> object:
            told.append(_name)
            return _original(*args)  # type: ignore[operator]

        monkeypatch.setattr(Run, method, note)
    return told


def test_a_value_at_each_layer_takes_one_run(model: LanguageModel, asked: list[str]) -> None:
    norms = []
    with model.trace(IDS):
        for block in blocks(model):
            h = block.output[0]
            norms.append(h.norm().item())
            if norms[-1] > norms[0]:
                h[:] = h / 2
        logits = model.lm_head.output.save()
    assert asked == ["begin"] + ["more"] * len(blocks(model))
    with model.trace(IDS):
        for block, norm in zip(blocks(model), norms, strict=True):
            if norm > norms[0]:
                block.output[0][:] = block.output[0] / 2
        want = model.lm_head.output.save()
    assert any(norm > norms[0] for norm in norms)
    assert torch.allclose(logits, want, rtol=1e-5, atol=1e-6)


def test_an_earlier_module_after_a_value(model: LanguageModel) -> None:
    with model.trace(IDS):
        late = blocks(model)[4].output[0]
        assert late.sum().item() is not None
        early = blocks(model)[1].output[0].save()
        late = late.save()
    with model.trace(IDS):
        want = blocks(model)[1].output[0].save()
        late_too = blocks(model)[4].output[0].save()
    assert torch.equal(early, want)
    assert torch.equal(late, late_too)


def test_edits_after_a_value_in_one_of_several_invokes(model: LanguageModel) -> None:
    with model.trace() as tracer:
        with tracer.invoke(OTHER):
            other = blocks(model)[3].output[0]
            first = model.lm_head.output.save()
        with tracer.invoke(IDS):
            h = blocks(model)[1].output[0]
            if h.mean().item() < 1e9:
                h[:, -1] = other[:, -1]
            assert blocks(model)[2].output[0].shape[1] == 4
            second = model.lm_head.output.save()
        with tracer.invoke(LONG):
            third = model.lm_head.output.save()
    with model.trace(OTHER):
        state = blocks(model)[3].output[0].save()
        want_first = model.lm_head.output.save()
    with model.trace(IDS):
        blocks(model)[1].output[0][:, -1] = state[:, -1]
        want_second = model.lm_head.output.save()
    with model.trace(LONG):
        want_third = model.lm_head.output.save()
    for got, want in ((first, want_first), (second, want_second), (third, want_third)):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_value_of_the_whole_batch(model: LanguageModel) -> None:
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            alone = model.lm_head.output.save()
        with tracer.invoke(OTHER):
            blocks(model)[0].output[0][:] = 0
        with tracer.invoke():
            h = blocks(model)[2].output[0]
            assert h.shape[0] == 2
            assert h.abs().sum().item() > 0
            h[0] = 1
            logits = model.lm_head.output.save()
    with model.trace(IDS):
        blocks(model)[2].output[0][:] = 1
        want = model.lm_head.output.save()
    assert torch.allclose(logits[:1], want, rtol=1e-4, atol=1e-5)
    assert torch.allclose(alone, want, rtol=1e-4, atol=1e-5)  # the same row


def test_rows_that_come_after_a_value_of_the_whole_batch(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="Put invokes with input before"), model.trace() as tracer:
        with tracer.invoke(IDS):
            pass
        with tracer.invoke():
            print(blocks(model)[0].output[0].sum().item())
        with tracer.invoke(OTHER):
            pass


def test_an_error_that_was_caught(model: LanguageModel) -> None:
    with model.trace(IDS):
        h = blocks(model)[1].output[0]
        bad = h @ torch.zeros(3, 3)
        worse = bad + 1
        for _ in range(2):
            with pytest.raises(OpError, match="cannot be multiplied"):
                worse.tolist()
        total = h.sum().item()
        with pytest.raises(OpError, match="cannot be multiplied"):
            (bad * 2).save()
        logits = model.lm_head.output.save()
    with model.trace(IDS):
        want = model.lm_head.output.save()
        sum_ = blocks(model)[1].output[0].sum().save()
    assert torch.equal(logits, want)
    assert total == pytest.approx(float(sum_), rel=1e-5)


def test_a_replacement_of_other_sizes(model: LanguageModel) -> None:
    if model.config.model_type != "gpt2":
        pytest.skip("Llama's position embeddings are as long as the prompt")
    shorter = torch.randn(1, 2, model.config.n_embd)
    with model.trace() as tracer:
        with tracer.invoke(OTHER):
            first = model.lm_head.output.save()
        with tracer.invoke(IDS):
            blocks(model)[2].output[0] = shorter
            second = model.lm_head.output.save()
        with tracer.invoke(LONG):
            third = model.lm_head.output.save()
    with model.trace(IDS):
        blocks(model)[2].output[0] = shorter
        want = model.lm_head.output.save()
    assert second.shape == want.shape == (1, 2, model.config.vocab_size)
    assert torch.allclose(second, want, rtol=1e-4, atol=1e-5)
    for ids, got in ((OTHER, first), (LONG, third)):
        with model.trace(ids):
            alone = model.lm_head.output.save()
        assert torch.allclose(got, alone, rtol=1e-4, atol=1e-5)


def test_a_replacement_of_another_dtype_does_what_it_does_alone(model: LanguageModel) -> None:
    def edit() -> None:
        blocks(model)[5].output[0] = blocks(model)[5].output[0].double()

    with pytest.raises(OpError) as alone, model.trace(IDS):
        edit()
        model.lm_head.output.save()
    with pytest.raises(OpError) as together, model.trace() as tracer:
        with tracer.invoke(OTHER):
            model.lm_head.output.save()
        with tracer.invoke(IDS):
            edit()
            model.lm_head.output.save()
    assert together.value.message == alone.value.message
