"""Generations that nobody waits for: ``model.generate(prompt, remote=..., blocking=False)``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nnsight_go import InputError, NotSavedError, OpError, RemoteError, _ffi
from references import Pair
from servers import Server

SETTINGS: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": [], "pad_token_id": 0}


@pytest.fixture(scope="module")
def host(gpt2_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of GPT-2."""
    model = f"{gpt2_pair.model.name_or_path}={gpt2_pair.directory}"
    with Server(tmp_path_factory.mktemp("alone"), "--model", model, "--rate", 10000) as server:
        yield server.host


def run(pair: Pair, where: Any, **more: Any) -> tuple[Any, list[Any]]:
    """The block of a generation, and what it keeps: a value of step 0, one a step, tokens, a cache."""
    model, kept = pair.model, []
    with model.generate(pair.ids(5), **SETTINGS, remote=where, **more) as tracer:
        first = model.transformer.h[0].output[0].save()
        with tracer.iter[1:4]:
            model.transformer.h[1].output[0][:, -1] += 0.1
            kept.append(model.lm_head.output[0, -1].save())
        cache = tracer.cache(["transformer.h.2"])
        tokens = model.generator.output.save()
    return tracer, [first, kept, tokens, cache]


def equal(got: list[Any], want: list[Any]) -> None:
    assert torch.equal(got[2], want[2])
    torch.testing.assert_close([got[0], *got[1]], [want[0], *want[1]], rtol=1e-4, atol=1e-4)
    assert len(got[1]) == 3 and all(type(x) is torch.Tensor for x in got[1])


@pytest.mark.usefixtures("nothing_stays")
def test_it_is_what_it_is_here(gpt2_pair: Pair, host: str) -> None:
    _, want = run(gpt2_pair, None)
    before = _ffi.counters()
    tracer, got = run(gpt2_pair, host, blocking=False)
    assert tracer.job.id
    for value in (got[0], got[2]):
        with pytest.raises(RemoteError, match="not there yet"):
            value.sum()
    assert got[1] == []
    values = tracer.job.result()
    equal(got, want)
    assert [values[0] is got[0], values[-1] is got[2], len(values)] == [True, True, 3]
    assert tracer.job.result() is values and tracer.job.status == "COMPLETED"
    assert _ffi.counters() == before


def test_awaited(gpt2_pair: Pair, host: str) -> None:
    async def both() -> list[list[Any]]:
        runs = [run(gpt2_pair, host, blocking=False) for _ in range(3)]
        await asyncio.gather(*[_wait(tracer.job) for tracer, _ in runs])
        return [kept for _, kept in runs]

    _, want = run(gpt2_pair, None)
    for got in asyncio.run(both()):
        equal(got, want)


async def _wait(job: Any) -> None:
    await job


def test_sampled(gpt2_pair: Pair, host: str) -> None:
    """Each draws what its seed says, the first what is drawn here, and no two the same."""

    def sampled() -> list[torch.Tensor]:
        torch.manual_seed(3)
        found = []
        for _ in range(2):
            with gpt2_pair.model.generate(
                gpt2_pair.ids(5), **SETTINGS, do_sample=True, remote=host, blocking=False
            ) as tracer:
                tokens = gpt2_pair.model.generator.output.save()
            found.append((tracer.job, tokens))
        state = torch.get_rng_state()
        for job, _ in reversed(found):
            job.result()
        assert torch.equal(state, torch.get_rng_state())
        return [tokens for _, tokens in found]

    torch.manual_seed(3)
    with gpt2_pair.model.generate(gpt2_pair.ids(5), **SETTINGS, do_sample=True):
        here = gpt2_pair.model.generator.output.save()
    one, two = sampled(), sampled()
    assert torch.equal(one[0], here)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and not torch.equal(one[0], one[1])


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"max_new_tokens": 9}], ids=["beams", "scores"])
def test_other_generations(gpt2_pair: Pair, host: str, more: dict[str, Any]) -> None:
    model, found = gpt2_pair.model, []
    for where in (None, host):
        scored = {"output_scores": True} if "num_beams" not in more else {}
        options = {**SETTINGS, **more, **scored, "remote": where, "blocking": where is None}
        with model.generate(gpt2_pair.ids(5), **options) as tracer:
            tokens = model.generator.output.save()
        if where is not None:
            tracer.job.result()
        found.append([tokens, *(tracer.scores if scored else [])])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_one_that_ends_early(gpt2_pair: Pair, host: str) -> None:
    _, (_, _, tokens, _) = run(gpt2_pair, None)
    ends = {**SETTINGS, "eos_token_id": [int(tokens[0, 7])]}
    model = gpt2_pair.model
    with model.generate(gpt2_pair.ids(5), **ends) as tracer:
        want = model.generator.output.save()
    with model.generate(gpt2_pair.ids(5), **ends, remote=host, blocking=False) as tracer:
        late = []
        with tracer.iter[:]:
            late.append(model.lm_head.output[0, -1].save())
        got = model.generator.output.save()
    tracer.job.result()
    assert torch.equal(got, want) and len(late) == want.shape[1] - 5


def test_an_error(gpt2_pair: Pair, host: str) -> None:
    model = gpt2_pair.model
    with model.generate(gpt2_pair.ids(5), **SETTINGS, remote=host, blocking=False) as tracer:
        kept = model.transformer.h[0].output[0].save()
        with tracer.iter[2:3]:
            model.transformer.h[0].output[0].index_select(1, torch.tensor([77])).save()
        tokens = model.generator.output.save()
    for _ in range(2):
        with pytest.raises(OpError, match="index") as caught:
            tracer.job.result()
        assert caught.value.step == 2 and caught.value.file == __file__
    for value in (kept, tokens):
        with pytest.raises(NotSavedError):
            value.sum()


def test_what_must_be_waited_for(gpt2_pair: Pair, host: str) -> None:
    model, ids = gpt2_pair.model, gpt2_pair.ids(5)
    alone: dict[str, Any] = {**SETTINGS, "remote": host, "blocking": False}
    with pytest.raises(InputError, match="later step"), model.generate(ids, **alone) as tracer:
        for _ in tracer.iter[:]:
            model.lm_head.output.save()
    with pytest.raises(InputError, match="between its steps"):  # noqa: SIM117
        with model.generate(ids, **alone, logits_processor=[lambda ids, scores: scores]):
            model.generator.output.save()
    with pytest.raises(InputError, match="between its steps"), model.generate(ids, **alone) as tracer:
        first = model.lm_head.output[0, -1]
        with tracer.iter[1:]:
            (model.lm_head.output[0, -1] + first).save()
    with pytest.raises(InputError, match="stopped"), model.generate(ids, **alone) as tracer:
        tracer.stop()
    with pytest.raises(InputError, match="several invokes"):  # noqa: SIM117
        with model.generate(**alone) as tracer, tracer.invoke(ids):
            pass
    with pytest.raises(InputError, match="of a session"), model.session():  # noqa: SIM117
        with model.generate(ids, **alone):
            pass
    with pytest.raises(InputError, match="no queue|in this process"):  # noqa: SIM117
        with model.generate(ids, **{**alone, "remote": "local"}):
            model.generator.output.save()
    with model.generate(ids, **SETTINGS) as tracer:
        pass
    with pytest.raises(InputError, match="no job"):
        _ = tracer.job
