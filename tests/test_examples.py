"""The examples do what they say."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from typing import Any

import pytest
import torch

from nnsight_go import LanguageModel

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("nnsight-go/landmarks", device_map="cpu", dispatch=True)


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    example(name).main()


def test_attributions_are_those_of_small_patches(model: LanguageModel) -> None:
    """For a step of a thousandth from one state to the other, the estimate is what the patch does."""
    it = example("attribution_patching")
    estimate = it.attribution(model, it.CLEAN, it.OTHER)
    right, wrong = it.answers(model, it.CLEAN, it.OTHER)
    assert (right, wrong) != (wrong, right)
    layers, positions = estimate.shape
    assert layers == len(model.transformer.h)
    eps = 1e-2
    for layer, back in [(0, 3), (0, positions - 1), (2, 1), (3, 4), (layers - 1, 1)]:
        gained = []
        for by in (eps, -eps):
            with model.trace() as tracer:
                with tracer.invoke(it.CLEAN):
                    given = model.transformer.h[layer].output[0][:, -back]
                with tracer.invoke(it.OTHER):
                    state = model.transformer.h[layer].output[0]
                    state[:, -back] += by * (given - state[:, -back])
                    logits = model.lm_head.output[0, -1]
                    gained.append((logits[right] - logits[wrong]).save())
        slope = float(gained[0] - gained[1]) / (2 * eps)
        assert abs(slope - float(estimate[layer, positions - back])) < 1e-2 * max(1.0, float(estimate.abs().max()))


def test_attribution_patching(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("attribution_patching", monkeypatch, "--out", str(tmp_path))
    assert (tmp_path / "attribution.png").stat().st_size > 10_000
    assert "estimated in one trace" in capsys.readouterr().out


def test_integrated_gradients_are_complete(model: LanguageModel) -> None:
    it = example("integrated_gradients")
    prompt = "The Eiffel Tower is in the city of"
    errors = []
    for steps in (50, 200):
        found, whole = it.contributions(model, prompt, steps)
        assert found.shape == (len(model.tokenizer.encode(prompt)),)
        errors.append(abs(float(found.sum()) - whole))
    assert abs(whole) > 1
    assert errors[1] < errors[0]
    assert errors[1] < 2e-2 * abs(whole)
    assert torch.isfinite(found).all()


def test_integrated_gradients(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("integrated_gradients", monkeypatch, "--steps", "20")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert "of a difference of" in lines[-1]
