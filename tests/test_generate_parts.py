"""Generations of several inputs, with edits, caches, barriers and next()."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnsight_go import InputError, LanguageModel, NotSavedError, OutOfOrderError, StepLoopError
from nnsight_go.native import Handle
from test_generate import IDS, RAGGED, Made, blocks, close, made, of_the_engine, theirs_generate

__all__ = ["made"]  # the fixture


# ---- several inputs ----


def test_each_invoke_is_continued_as_if_alone(made: Made) -> None:
    model, theirs = made
    outputs, logits = [], []
    with model.generate(max_new_tokens=5) as tracer:
        for rows in ([IDS], RAGGED):
            with tracer.invoke(rows):
                for _ in tracer.iter[:]:
                    logits.append(model.lm_head.output)
                outputs.append(model.generator.output.save())
    assert [len(x) for x in logits] == [1] * 5 + [3] * 5
    for rows, output in zip(([IDS], RAGGED), outputs, strict=True):
        assert torch.equal(output, theirs_generate(theirs, rows, max_new_tokens=5))


def test_values_of_an_invoke_reach_later_ones(made: Made) -> None:
    model, _ = made
    with model.generate(max_new_tokens=3) as tracer:
        with tracer.invoke(IDS):
            patch = blocks(model)[-1].output[0][:, -1]
            given = tracer.result.save()
        with tracer.invoke(IDS[::-1]):
            blocks(model)[-1].output[0][:, -1] = patch
            patched = model.lm_head.output.save()
    with model.trace(IDS):
        wanted = model.lm_head.output[:, -1].save()
    assert given.shape == (1, 8)
    close(patched[:, -1], wanted)


def test_stop_ends_its_invoke_alone(made: Made) -> None:
    model, _ = made
    with model.generate(max_new_tokens=4) as tracer:
        with tracer.invoke(IDS):
            short = tracer.result.save()
            tracer.stop()
        with tracer.invoke(IDS):
            whole = tracer.result.save()
    assert short.shape == (1, 6) and whole.shape == (1, 9)
    assert torch.equal(whole[:, :6], short)


def test_barriers_count_invokes(made: Made) -> None:
    model, _ = made
    with model.generate(max_new_tokens=2) as tracer:
        barrier = tracer.barrier(2)
        for _ in range(2):
            with tracer.invoke(IDS):
                barrier()
    with pytest.raises(InputError, match="barrier is for 3 invokes"), model.generate(max_new_tokens=2) as tracer:
        barrier = tracer.barrier(3)
        with tracer.invoke(IDS):
            barrier()


def test_invokes_that_cannot_be(made: Made) -> None:
    model, _ = made
    with (
        pytest.raises(InputError, match="has an input already"),
        model.generate(IDS, max_new_tokens=2) as tracer,
        tracer.invoke(IDS),
    ):
        pass
    with (
        pytest.raises(InputError, match="needs an input"),
        model.generate(max_new_tokens=2) as tracer,
        tracer.invoke(),
    ):
        pass
    with (
        pytest.raises(InputError, match="inside another one"),
        model.generate(max_new_tokens=2) as tracer,
        tracer.invoke(IDS),
        tracer.invoke(IDS),
    ):
        pass
    with pytest.raises(InputError, match="outside of every invoke"), model.generate(max_new_tokens=2) as tracer:
        tracer.all()
    with pytest.raises(InputError, match="outside of the generation's block"):
        tracer.next()
    with pytest.raises(InputError, match="belong into the block"), tracer.invoke(IDS):
        pass
    with model.generate(IDS, max_new_tokens=2) as tracer:  # all is well afterwards
        kept = tracer.result.save()
    assert kept.shape == (1, 7)


def test_an_error_in_an_invoke_leaves_the_model_usable(made: Made) -> None:
    model, _ = made
    with pytest.raises(ZeroDivisionError), model.generate(max_new_tokens=2) as tracer, tracer.invoke(IDS):
        lost = model.lm_head.output
        1 / 0  # noqa: B018
    with pytest.raises(NotSavedError, match="left by ZeroDivisionError"):
        lost + 1
    with model.generate(IDS, max_new_tokens=2) as tracer:
        kept = tracer.result.save()
    assert kept.shape == (1, 7)


# ---- next ----


def test_next_goes_on_to_the_next_step(made: Made) -> None:
    model, _ = made
    with model.generate(IDS, max_new_tokens=5) as tracer:
        first = model.lm_head.output.save()
        second = model.lm_head.next().output.save()
        tracer.next(2)
        fourth = model.lm_head.output.save()
    every = []
    with model.generate(IDS, max_new_tokens=5) as tracer:
        for _ in tracer.iter[:]:
            every.append(model.lm_head.output)
    for one, step in ((first, 0), (second, 1), (fourth, 3)):
        assert torch.equal(one, every[step])


def test_next_where_there_is_none(made: Made) -> None:
    model, _ = made
    of_the_engine(model)
    with (
        pytest.raises(OutOfOrderError, match="no step 2: the generation ended after 2 steps"),
        model.generate(IDS, max_new_tokens=2) as tracer,
    ):
        tracer.next().next()
    with (
        pytest.raises(StepLoopError, match="recorded once"),
        model.generate(IDS, max_new_tokens=3) as tracer,
        tracer.all(),
    ):
        tracer.next()
    for steps in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="number of steps"), model.generate(IDS, max_new_tokens=3) as tracer:
            tracer.next(steps)
    with pytest.raises(InputError, match="runs the model once"), model.trace(IDS):
        model.lm_head.next()
    with pytest.raises(InputError, match="only inside"):
        model.lm_head.next()


# ---- caches ----


def test_a_cache_has_an_entry_a_step(made: Made) -> None:
    model, _ = made
    block = blocks(model)[1]
    states = []
    with model.generate(IDS, max_new_tokens=4) as tracer:
        cache = tracer.cache(modules=[block, model.lm_head], include_inputs=True)
        for step in tracer.iter[:]:
            if step == 2:
                block.output[0][:] *= 0.5
            states.append(block.output[0])
        ids = tracer.result.save()
    entries = cache["model." + block.path]
    assert len(entries) == len(states) == 4 and set(cache) == {"model." + block.path, "model.lm_head"}
    for entry, state in zip(entries, states, strict=True):
        assert torch.equal(entry.output[0], state)
    assert [tuple(entry.input.shape[:2]) for entry in entries] == [(1, 5), (1, 1), (1, 1), (1, 1)]
    drawn = [int(entry.output[0, -1].argmax()) for entry in cache["model.lm_head"]]
    assert drawn == ids[0, 5:].tolist()


def test_a_cache_begins_at_its_step(made: Made) -> None:
    model, _ = made
    with model.generate(IDS, max_new_tokens=4) as tracer:
        for step in tracer.iter[:]:
            if step == 2:
                cache = tracer.cache(modules=model.lm_head, dtype=torch.float64)
    assert [entry.output.dtype for entry in cache["model.lm_head"]] == [torch.float64] * 2
    with model.generate(IDS, max_new_tokens=1) as tracer:
        cache = tracer.cache(modules=model.lm_head)
    assert cache["model.lm_head"].output.shape == (1, 1, model.lm_head.weight.shape[0])


# ---- edits ----


def test_edits_hold_at_every_step(made: Made) -> None:
    model, _ = made
    direction = torch.randn(model.lm_head.weight.shape[1], generator=torch.Generator().manual_seed(0))
    with model.edit() as edited:
        blocks(edited)[1].output[0][:] += 3 * direction
    states, wanted = [], []
    with edited.generate(IDS, max_new_tokens=6) as tracer:
        for _ in tracer.iter[:]:
            states.append(model_logits(edited))
        ids = tracer.result.save()
    with model.generate(IDS, max_new_tokens=6) as tracer:
        for _ in tracer.iter[:]:
            blocks(model)[1].output[0][:] += 3 * direction
            wanted.append(model_logits(model))
        by_hand = tracer.result.save()
    with model.generate(IDS, max_new_tokens=6) as tracer:
        free = tracer.result.save()
    assert torch.equal(ids, by_hand) and not torch.equal(ids, free)
    for one, other in zip(states, wanted, strict=True):
        close(one, other)


def model_logits(model: LanguageModel) -> torch.Tensor:
    return model.lm_head.output  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["for", "with"])
def test_a_late_step_is_no_longer_than_an_early_one(made: Made, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made
    of_the_engine(model)
    sent: list[tuple[int, int]] = []
    step = Handle.step

    def counted(self: Handle, graph: bytes, constants: list[torch.Tensor], end: bool) -> Any:
        sent.append((len(graph), len(constants)))
        return step(self, graph, constants, end)

    monkeypatch.setattr(Handle, "step", counted)
    states: list[Any] = []
    with model.generate(IDS, max_new_tokens=40, min_new_tokens=40, pad_token_id=0) as tracer:
        if form == "for":
            for _ in tracer.iter[:]:
                blocks(model)[0].output[0][:, -1] *= 0.9
                states.append(blocks(model)[1].output[0])
        else:
            with tracer.all():
                blocks(model)[0].output[0][:, -1] *= 0.9
                states.append(blocks(model)[1].output[0])
    assert len(states) == 40
    assert len(set(sent[1:])) == 1
