"""Sessions whose traces a server runs as one job: they give what sessions here give."""

from __future__ import annotations

import asyncio
import pathlib
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nnsight_go import InputError, NNsight, NotSavedError, OpError, RemoteError, _ffi
from nnsight_go.remote import file
from nnsight_go.remote.local import InProcess
from references import Pair, tensor_of
from servers import Server

pytestmark = pytest.mark.usefixtures("nothing_stays")

Program = Callable[[Pair, Any], dict[str, Any]]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was asked of this process, and with how many values it was answered."""
    seen: list[dict[str, Any]] = []
    perform = InProcess.perform

    def noted(self: InProcess, request: bytes) -> bytearray:
        import msgspec

        asked = msgspec.json.decode(file.File(bytearray(request)).bytes("request"))
        seen.append(asked)
        answer = perform(self, request)
        said = msgspec.json.decode(file.File(bytearray(answer)).bytes("response"))
        asked["tensors"] = sum(len(step.get("tensors", ())) for step in said["steps"])
        return answer

    monkeypatch.setattr(InProcess, "perform", noted)
    return seen


def layer(pair: Pair, i: int) -> torch.Tensor:
    return tensor_of(pair, f"{pair.blocks}.{i}")


def replace(pair: Pair, i: int, value: torch.Tensor) -> None:
    block = pair.layers[i]
    block.output = (value, *block.output[1:])


def equal(got: Any, want: Any) -> None:
    assert type(got) is type(want) is torch.Tensor
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def both(pair: Pair, program: Program) -> None:
    """A program gives the same here and by the protocol."""
    here, there = program(pair, None), program(pair, "local")
    assert here.keys() == there.keys()
    for name, value in here.items():
        equal(there[name], value)


# ---- what flows ----


def flows(pair: Pair, where: Any) -> dict[str, Any]:
    kept: list[Any] = []
    with pair.model.session(remote=where):
        with pair.model.trace(pair.ids(7)):
            state = layer(pair, 1)[:, -1]
            kept.append(layer(pair, 0))
            several = layer(pair, 2).topk(2, dim=-1)
        with pair.model.trace() as tracer:
            with tracer.invoke(pair.ids(4, seed=2)):
                layer(pair, 1)[:, -1] = state * 2
                middle = pair.model.lm_head.output
            with tracer.invoke(pair.ids(7)):
                layer(pair, 0)[:] = kept[0] + several.values.mean()
                last = layer(pair, 2)
        with pair.model.trace(pair.ids(4)):
            tensor_of(pair, f"{pair.blocks}.1")[:, 0] = last[:, -1] + middle.mean()
            out = {"logits": pair.model.lm_head.output, "normed": pair.model.lm_head(last)}.save()
    return {"state": state, "kept": kept[0], "middle": middle, "last": last, **out}


def replaces(pair: Pair, where: Any) -> dict[str, Any]:
    with pair.model.session(remote=where):
        with pair.model.trace(pair.ids(5)):
            first = layer(pair, 0).clone()
            shape = first.shape
        assert shape == (1, 5, pair.width)
        with pair.model.trace(pair.ids(5)):
            replace(pair, 1, first)
            a = pair.model.lm_head.output.save()
        with pair.model.trace(pair.ids(5)):
            replace(pair, 1, first * 2 + torch.ones(pair.width))
            b = pair.model.lm_head.output.save()
    return {"a": a, "b": b, "first": first}


def values_in_the_middle(pair: Pair, where: Any) -> dict[str, Any]:
    with pair.model.session(remote=where):
        with pair.model.trace(pair.ids(5)):
            norm = layer(pair, 0).norm()
        scale = 2.0 if float(norm) > 0 else 3.0
        with pair.model.trace(pair.ids(5)):
            h = layer(pair, 1)
            if (h.sum() > norm) or True:
                h[:, -1] *= scale
            more = h[:, -1] + norm
        with pair.model.trace(pair.ids(5)):
            chosen = layer(pair, 1)[:, int(more.argmax()) % 5].save()
    return {"norm": norm, "more": more, "chosen": chosen}


def changes_in_place(pair: Pair, where: Any) -> dict[str, Any]:
    with pair.model.session(remote=where):
        with pair.model.trace(pair.ids(5)):
            a, b, c = (layer(pair, i).clone() for i in range(3))
        a[:, 0] = 0
        with pair.model.trace(pair.ids(5)):
            b += 1  # the value itself, there and then
            c[:, 1] = layer(pair, 0)[:, 1]
            out = (layer(pair, 1) + b).save()
    return {"a": a, "b": b, "c": c, "out": out}


def other_kinds(pair: Pair, where: Any) -> dict[str, Any]:
    with pair.model.session(remote=where):
        with pair.model.trace(pair.ids(5)):
            h = layer(pair, 1)[:, -1]
        with pair.model.generate(pair.ids(5), max_new_tokens=3, eos_token_id=[], pad_token_id=0):
            layer(pair, 1)[:, -1] = h
            tokens = pair.model.generator.output.save()
        with pair.model.trace(pair.ids(5)):
            again = layer(pair, 1)[:, -1] + h
        with pair.model.trace(pair.ids(5)) as tracer:
            cache = tracer.cache([f"{pair.blocks}.0"])
            layer(pair, 0)[:, -1] = again
        cached = cache[f"model.{pair.blocks}.0"].output
        with pair.model.trace(pair.ids(5)):
            x = layer(pair, 1)
            x.retain_grad()
            loss = pair.model.lm_head.output.sum() + again.sum()
            loss.backward()
            grad = x.grad.save()
        with pair.model.trace(pair.ids(5)):
            end = (layer(pair, 2) * grad).save()
    first = cached[0] if isinstance(cached, tuple) else cached
    return {"h": h, "tokens": tokens, "again": again, "cached": first, "grad": grad, "end": end}


@pytest.mark.parametrize(
    "program", [flows, replaces, values_in_the_middle, changes_in_place, other_kinds], ids=lambda p: p.__name__
)
def test_it_is_what_it_is_here(either: Pair, program: Program) -> None:
    both(either, program)


@pytest.mark.parametrize("seed", range(20))
def test_random_sessions(either: Pair, seed: int) -> None:
    """Traces that take values of any earlier one, change what they come to by them, and keep some."""

    def program(pair: Pair, where: Any) -> dict[str, Any]:
        draw = random.Random(seed)
        values: list[Any] = []
        with pair.model.session(remote=where):
            for number in range(draw.randint(2, 5)):
                with pair.model.trace(pair.ids(draw.randint(1, 6), seed=number)):
                    for i in range(3):
                        kind = draw.randrange(5)
                        value = draw.choice(values) if values else torch.ones(1, pair.width)
                        if kind == 0:
                            layer(pair, i)[:, -1] = value
                        elif kind == 1:
                            layer(pair, i)[:, 0] += value * 0.5
                        elif kind == 2:
                            values.append((layer(pair, i)[:, -1] + value).tanh())
                        elif kind == 3:
                            values.append(layer(pair, i)[:, -1].clone())
                if draw.random() < 0.3 and values:
                    values.append(values[-1] * 2)  # outside of every trace
                if draw.random() < 0.3 and len(values) > 1:
                    del values[draw.randrange(len(values))]
        return {str(i): value for i, value in enumerate(values)}

    both(either, program)


# ---- one job ----


def test_all_traces_are_one_request(gpt2_pair: Pair, requests: list[dict[str, Any]]) -> None:
    flows(gpt2_pair, "local")
    assert [(r["kind"], len(r["steps"])) for r in requests] == [("session", 3)]
    places = [c["result"] for step in requests[0]["steps"] for c in step["constants"] if "result" in c]
    assert places and not any(c.get("tensor") for step in requests[0]["steps"] for c in step["constants"])


def test_what_nobody_holds_does_not_come_back(gpt2_pair: Pair, requests: list[dict[str, Any]]) -> None:
    model = gpt2_pair.model
    with model.session(remote="local"):
        with model.trace(gpt2_pair.ids(5)):
            h = model.transformer.h[1].output[0][:, -1]
        with model.trace(gpt2_pair.ids(5)):
            model.transformer.h[1].output[0][:, -1] = h
            out = model.lm_head.output.save()
        del h
    assert requests[0]["tensors"] == 1 and requests[0]["steps"][0]["unsent"] == [0]
    assert out.shape[1] == 5


def test_values_that_are_needed_send_what_there_is(gpt2_pair: Pair, requests: list[dict[str, Any]]) -> None:
    values_in_the_middle(gpt2_pair, "local")
    # a value between the traces; one inside the second, for which the first is there; two more inside; the rest
    assert [r["kind"] for r in requests][:2] == ["trace", "trace"]  # one alone is no session
    requests.clear()
    model = gpt2_pair.model
    with model.session(remote="local"):
        with model.trace(gpt2_pair.ids(5)):
            h = model.transformer.h[1].output[0]
        assert (
            h.shape == (1, 5, gpt2_pair.width) and h.dtype == torch.float32 and len(h) == 1 and h.device.type == "cpu"
        )
        assert "Proxy" in repr(h) and not requests
        copied = pickle.loads(pickle.dumps(h))
        assert len(requests) == 1 and torch.equal(copied, h)


def test_a_trace_outside_of_the_session_is_one_of_its_own(gpt2_pair: Pair, requests: list[dict[str, Any]]) -> None:
    model = gpt2_pair.model
    with model.session(remote="local"):
        with model.trace(gpt2_pair.ids(5)):
            h = model.transformer.h[1].output[0][:, -1]
        with model.trace(gpt2_pair.ids(5), remote=False):
            model.transformer.h[1].output[0][:, -1] = h
            here = model.lm_head.output.save()
        assert len(requests) == 1
        net = NNsight(torch.nn.Linear(gpt2_pair.width, 2))
    with net.trace(h):
        assert net.output.save().shape == (1, 2)
    assert here.shape[1] == 5 and len(requests) == 1


# ---- what goes wrong ----


def test_an_error_names_the_line_and_nothing_has_a_value(gpt2_pair: Pair, requests: list[dict[str, Any]]) -> None:
    model = gpt2_pair.model
    with pytest.raises(OpError, match="index") as caught, model.session(remote="local"):
        with model.trace(gpt2_pair.ids(5)):
            h = model.transformer.h[0].output[0].save()
        with model.trace(gpt2_pair.ids(5)):
            wrong = model.transformer.h[1].output[0].index_select(1, torch.tensor([77])).save()
        with model.trace(gpt2_pair.ids(5)):
            after = (model.transformer.h[1].output[0] + wrong).save()
    assert caught.value.file == __file__ and caught.value.step is None
    line = (caught.value.line or 0) - 1
    assert "index_select" in pathlib.Path(__file__).read_text().splitlines()[line]
    assert len(requests) == 1
    for value in (h, wrong, after):
        with pytest.raises(NotSavedError, match="session failed with OpError"):
            value.sum()


def test_a_session_that_is_left(gpt2_pair: Pair, requests: list[dict[str, Any]]) -> None:
    """By an error: what ended before it has its values. By an interrupt: nothing runs any more."""
    model = gpt2_pair.model
    found = []
    for kind in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(kind), model.session(remote="local"):
            with model.trace(gpt2_pair.ids(5)):
                found.append(model.transformer.h[0].output[0].save())
            raise kind
    assert len(requests) == 1 and type(found[0]) is torch.Tensor
    with pytest.raises(NotSavedError, match="left by KeyboardInterrupt"):
        found[1].sum()
    with pytest.raises(ZeroDivisionError), model.session(remote="local"):
        with model.trace(gpt2_pair.ids(5)):
            lost = model.transformer.h[0].output[0].index_select(1, torch.tensor([77])).save()
        raise ZeroDivisionError
    with pytest.raises(NotSavedError, match="failed with OpError"):
        lost.sum()


def test_values_of_a_trace_that_failed_to_record(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    with model.session(remote="local"):
        with model.trace(gpt2_pair.ids(5)):
            h = model.transformer.h[0].output[0]
        with pytest.raises(ValueError), model.trace(gpt2_pair.ids(5)):
            lost = model.transformer.h[1].output[0] + h
            raise ValueError
        with model.trace(gpt2_pair.ids(5)):
            out = (model.transformer.h[1].output[0] + h).save()
        with pytest.raises(NotSavedError, match="left by ValueError"):
            lost.sum()
    assert out.shape == h.shape


def test_the_graph_of_a_trace_that_uses_what_is_not_there(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    with model.session(remote="local"):
        with model.trace(gpt2_pair.ids(5)) as first:
            h = model.transformer.h[0].output[0]
        with model.trace(gpt2_pair.ids(5)) as tracer:
            (model.transformer.h[1].output[0] + h).save()
        assert "transformer.h.0" in str(first.graph)
        with pytest.raises(InputError, match="earlier one of its session"):
            str(tracer.graph)


def test_memory_after_many(gpt2_pair: Pair) -> None:
    flows(gpt2_pair, "local")
    before = _ffi.counters()
    for _ in range(20):
        flows(gpt2_pair, "local")
        with pytest.raises(OpError), gpt2_pair.model.session(remote="local"):
            with gpt2_pair.model.trace(gpt2_pair.ids(5)):
                h = layer(gpt2_pair, 0)
            with gpt2_pair.model.trace(gpt2_pair.ids(5)):
                h.index_select(1, torch.tensor([77])).save()
    assert _ffi.counters() == before


# ---- a real server ----


@pytest.fixture(scope="module")
def host(gpt2_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of GPT-2."""
    model = f"{gpt2_pair.model.name_or_path}={gpt2_pair.directory}"
    with Server(tmp_path_factory.mktemp("sessions"), "--model", model, "--rate", 10000) as server:
        yield server.host


def kinds(host: str) -> list[str]:
    """What jobs the server has had, the latest first."""
    import json
    import urllib.request

    with urllib.request.urlopen(f"{host}/v1/jobs") as answer:
        return [job["kind"] for job in json.load(answer)["jobs"]]


def test_one_job_on_a_server(gpt2_pair: Pair, host: str) -> None:
    before = len(kinds(host))
    want, got = flows(gpt2_pair, None), flows(gpt2_pair, host)
    for name, value in want.items():
        equal(got[name], value)
    assert len(kinds(host)) == before + 1 and kinds(host)[0] == "session"


def test_a_session_that_nobody_waits_for(gpt2_pair: Pair, host: str) -> None:
    model = gpt2_pair.model
    with model.session(remote=host, blocking=False) as session:
        with model.trace(gpt2_pair.ids(5)):
            h = model.transformer.h[1].output[0][:, -1]
            first = model.transformer.h[0].output[0].save()
        with model.trace(gpt2_pair.ids(5)):
            model.transformer.h[1].output[0][:, -1] = h * 2
            out = model.lm_head.output.save()
    assert session.job is not None and session.job.id
    with pytest.raises(RemoteError, match=r"session\.job\.result"):
        out.sum()
    values = asyncio.run(_awaited(session.job))
    assert [value is kept for value, kept in zip(values, (first, out), strict=True)] == [True, True]
    assert type(h) is torch.Tensor and session.job.status == "COMPLETED"
    with model.trace(gpt2_pair.ids(5)):
        model.transformer.h[1].output[0][:, -1] = h * 2
        want = model.lm_head.output.save()
    equal(out, want)
    with model.session(remote=host, blocking=False) as session:
        pass
    assert session.job is None


async def _awaited(job: Any) -> list[torch.Tensor]:
    return await job  # type: ignore[no-any-return]


def test_a_session_that_fails_and_nobody_waits_for(gpt2_pair: Pair, host: str) -> None:
    model = gpt2_pair.model
    with model.session(remote=host, blocking=False) as session:
        with model.trace(gpt2_pair.ids(5)):
            h = model.transformer.h[0].output[0].save()
        with model.trace(gpt2_pair.ids(5)):
            h.index_select(1, torch.tensor([77])).save()
    assert session.job is not None
    with pytest.raises(OpError, match="index") as caught:
        session.job.result()
    assert caught.value.file == __file__ and caught.value.step is None
    with pytest.raises(NotSavedError, match="failed with OpError"):
        h.sum()


def test_no_job_is_left_alone_in_this_process(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    with pytest.raises(InputError, match="no queue|runs a trace in this process"):  # noqa: SIM117
        with model.session(remote="local", blocking=False), model.trace(gpt2_pair.ids(5)):
            model.lm_head.output.save()
