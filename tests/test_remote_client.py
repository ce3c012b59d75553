"""The client of the remote protocol against a server of this process, and one that fails."""

from __future__ import annotations

import _thread
import asyncio
import io
import json
import multiprocessing
import pathlib
import stat
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import nnsight_go
from nnsight_go import CONFIG, CancelledError, InputError, LanguageModel, NNsight, OpError, RemoteError
from nnsight_go.remote import Job, generations, progress
from nnsight_go.remote import server as http
from references import Pair
from remoteserver import KEY, Server, accepted_then_dropped, drop, half, serving, slow, status

PROMPT = "The Eiffel Tower"


@pytest.fixture(autouse=True)
def settings(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has settings of its own, and pauses that are short."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(CONFIG.API, "given", {"APIKEY": KEY})
    monkeypatch.setattr(CONFIG.APP, "given", {})
    monkeypatch.setattr(http, "PAUSE", 0.01)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel("nnsight-go/landmarks")


@pytest.fixture
def server(model: LanguageModel) -> Iterator[Server]:
    yield from serving(model)


def posts(server: Server) -> int:
    return sum(method == "POST" for method, _ in server.seen)


def logits(model: LanguageModel, remote: Any = None, **options: Any) -> torch.Tensor:
    with model.trace(PROMPT, remote=remote, **options):
        out = model.lm_head.output[0, -1].save()
    return out


# ---- what works ----


def test_a_trace_on_a_server(model: LanguageModel, server: Server) -> None:
    assert torch.allclose(logits(model, server.host), logits(model), atol=1e-5)
    with model.trace(PROMPT, remote=server.host) as tracer:
        h = model.transformer.h[1].output[0]
        if h.norm() > 0:  # a value in the middle
            h[:, -1] = 0
        got = h.save()
    with pytest.raises(InputError, match="no job"):
        _ = tracer.job
    assert (got[:, -1] == 0).all() and (got[:, 0] != 0).any()
    assert server.connections == 1, "one connection serves all requests"


def test_connections_are_shared_by_threads(model: LanguageModel, server: Server) -> None:
    want, got = logits(model), [None] * 6
    threads = [
        threading.Thread(target=lambda i=i: got.__setitem__(i, logits(model, server.host)))  # type: ignore[misc]
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(x is not None and torch.allclose(x, want, atol=1e-5) for x in got)
    logits(model, server.host)
    assert server.connections <= 6


def test_generation_and_stream(model: LanguageModel, server: Server) -> None:
    def run(remote: Any) -> tuple[list[int], list[torch.Tensor], str]:
        torch.manual_seed(5)
        with model.generate(PROMPT, max_new_tokens=4, do_sample=True, remote=remote) as tracer:
            states = []
            for _ in tracer.iter[:]:
                model.transformer.h[1].output[0][:, -1] *= 0.9
                states.append(model.lm_head.output[0, -1].save())
            tokens = model.generator.output.save()
        return tokens.tolist(), states, "".join(model.stream(PROMPT, max_new_tokens=3, remote=remote))

    mine, theirs = run(None), run(server.host)
    assert mine[0] == theirs[0] and mine[2] == theirs[2]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine[1], theirs[1], strict=True))


@pytest.mark.parametrize("what", ["plain", "all", "outside", "tokens", "cached", "many", "ended"])
def test_steps_that_need_nothing_of_python_go_together(
    model: LanguageModel, server: Server, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generations.RemoteGeneration, "together", 64)
    end = {"ended": {"eos_token_id": [model.tokenizer(" Paris")["input_ids"][0]]}}
    new = 70 if what == "many" else 6
    settings = {"max_new_tokens": new, "eos_token_id": [], "pad_token_id": 0} | end.get(what, {})

    def run(remote: Any) -> list[Any]:
        out: list[Any] = []
        with model.generate("The Eiffel Tower is in the city of", remote=remote, **settings) as tracer:
            cache = tracer.cache(modules=[model.transformer.h[0]]) if what == "cached" else {}
            first = model.transformer.h[1].output[0][:, -1]
            if what != "plain":
                with tracer.all():
                    if what == "outside":
                        model.transformer.h[2].output[0][:, -1] += first * 0.1
                    elif what == "tokens":
                        out.append(model.generator.streamer.output)
                    model.transformer.h[3].output[0][:, -1] *= 0.9
                    out.append(model.lm_head.output[0, -1])
            tokens = model.generator.output.save()
        entries = cache.get("model.transformer.h.0", [])
        return [tokens, *out, *(entry.output[0] for entry in entries)]

    here, there = run(None), run(server.host)
    assert len(here) == len(there) and all(torch.allclose(a, b, atol=1e-4) for a, b in zip(here, there, strict=True))
    # the first step's value is there once it has run; each step's tokens once the one before has
    assert posts(server) == {"outside": 2, "tokens": 6, "many": 2}.get(what, 1)


def test_an_error_of_one_of_several_steps(model: LanguageModel, server: Server) -> None:
    with (
        pytest.raises(OpError, match="ones") as caught,
        model.generate(PROMPT, max_new_tokens=5, eos_token_id=[], pad_token_id=0, remote=server.host) as tracer,
        tracer.iter[2:],
    ):
        (model.transformer.h[0].output[0] @ torch.ones(3, 3)).save()
    assert caught.value.step == 2 and posts(server) == 1


def test_sessions_and_the_default_host(model: LanguageModel, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NNSIGHT_GO_HOST", server.host)
    with model.session(remote=True):
        with model.trace(PROMPT):
            h = model.transformer.h[1].output[0][:, -1]
        with model.trace(PROMPT):
            model.transformer.h[2].output[0][:, -1] = h
            got = model.lm_head.output[0, -1].save()
        with model.trace(PROMPT, remote=False):
            logits_here = model.lm_head.output[0, -1].save()
    assert posts(server) == 1
    assert not torch.allclose(got, logits_here)
    with (
        pytest.raises(InputError, match="is waited for"),
        model.session(remote=True),
        model.trace(PROMPT, blocking=False),
    ):
        model.lm_head.output.save()


def test_large_constants_are_sent_once(model: LanguageModel, server: Server) -> None:
    width = int(model.config.hidden_size)
    large, small = torch.randn(width, 400), torch.randn(width)

    def run(remote: Any) -> torch.Tensor:
        with model.trace(PROMPT, remote=remote):
            out = ((model.transformer.h[1].output[0] + small) @ large).save()
        return out

    want = run(None)
    for _ in range(3):
        assert torch.allclose(run(server.host), want, atol=1e-4)
    assert [m for m, p in server.seen if "/tensors/" in p] == ["HEAD", "PUT", "HEAD", "HEAD"]
    large *= 2
    assert torch.allclose(run(server.host), run(None), atol=1e-4)
    assert len(server.uploads) == 2


def test_compression_where_it_is_wanted(model: LanguageModel, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [list(range(100)) for _ in range(80)]
    for compress in (True, False, None):  # this machine's server is no reason to
        monkeypatch.setitem(CONFIG.API.given, "COMPRESS", compress)
        with model.trace(rows, remote=server.host):
            got = model.lm_head.output[:, -1].save()
        assert got.shape[0] == 80


def test_nothing_is_mapped_here(server: Server) -> None:
    other = LanguageModel("nnsight-go/landmarks")
    with other.trace(PROMPT, remote=server.host):
        weight = other.lm_head.weight
        assert weight.shape == (other.config.vocab_size, other.config.hidden_size)
        unembedded = (other.transformer.ln_f.output @ weight.T).save()
        out = other.lm_head.output.save()
    assert not other.dispatched
    assert torch.allclose(unembedded, out, atol=1e-4)
    request = next(iter(server.jobs.values())).request
    assert len(request) < 5000, "the weight was named, not sent"


# ---- jobs that nobody waits for ----


def test_a_job_that_nobody_waits_for(model: LanguageModel, server: Server) -> None:
    server.hold.clear()
    with model.trace(PROMPT, remote=server.host, blocking=False) as tracer:
        cache = tracer.cache(modules=[model.transformer.h[0]])
        out = model.lm_head.output[0, -1].save()
        first = model.transformer.h[0].output[0].save()
    job = tracer.job
    assert job.status == "QUEUED" and not job.done and job.about["position"] == 2 and job.host == server.host
    with pytest.raises(RemoteError, match="not there yet"):
        out.sum()
    assert "not been waited for" in repr(out)
    with pytest.raises(TimeoutError):
        job.result(timeout=0.05)
    server.hold.set()
    values = job.result()
    assert values[0] is out and type(out) is torch.Tensor and values[1] is first and job.done
    assert torch.allclose(out, logits(model), atol=1e-5)
    assert torch.equal(cache["model.transformer.h.0"].output[0], first)
    assert job.result() == values
    assert job.status == "COMPLETED"


def test_it_can_be_awaited(model: LanguageModel, server: Server) -> None:
    with model.trace(PROMPT, remote=server.host, blocking=False) as tracer:
        out = model.lm_head.output[0, -1].save()

    async def both() -> Any:
        return await tracer.job

    assert asyncio.run(both())[0] is out


def reattached(id: str, host: str, key: str) -> list[list[float]]:
    return [x.flatten().tolist() for x in Job(id, host, key).result()]


def test_it_can_be_found_again(model: LanguageModel, server: Server) -> None:
    with model.trace(PROMPT, remote=server.host, blocking=False) as tracer:
        model.lm_head.output[0, -1].save()
        model.transformer.h[0].output[0][0, 0].save()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got = pool.apply(reattached, (tracer.job.id, server.host, KEY))
    want = tracer.job.result()
    assert [len(x) for x in got] == [x.numel() for x in want]
    assert got[0] == want[0].tolist()


def test_cancelling(model: LanguageModel, server: Server) -> None:
    server.hold.clear()
    with model.trace(PROMPT, remote=server.host, blocking=False) as tracer:
        out = model.lm_head.output[0, -1].save()
    tracer.job.cancel()
    for _ in range(2):
        with pytest.raises(CancelledError):
            tracer.job.result()
    with pytest.raises(ValueError, match="failed with CancelledError"):
        out.sum()


def test_a_job_that_fails(model: LanguageModel, server: Server) -> None:
    with model.trace(PROMPT, remote=server.host, blocking=False) as tracer:
        h = model.transformer.h[0].output[0]
        out = (h @ torch.ones(3, 3)).save()
    with pytest.raises(OpError, match="test_remote_client.py"):
        tracer.job.result()
    with pytest.raises(ValueError, match="failed with OpError"):
        out.sum()


def test_a_trace_without_a_job(model: LanguageModel, server: Server) -> None:
    with model.trace(PROMPT, remote=server.host, blocking=False) as tracer:
        _ = model.lm_head.output
    with pytest.raises(InputError, match="no job"):
        _ = tracer.job
    with pytest.raises(InputError, match="no job to leave"), model.trace(PROMPT, remote="local", blocking=False):
        model.lm_head.output.save()


def test_interrupting_cancels(model: LanguageModel, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WAIT", 0.5)
    for after in (0.1, 0.8):  # while it is submitted, while it is waited for
        server.hold.clear()
        before = set(server.jobs)
        timer = threading.Timer(after, _thread.interrupt_main)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            logits(model, server.host)
        timer.join()
        (job,) = (server.jobs[id] for id in server.jobs if id not in before)
        assert job.state == "CANCELLED"
        server.hold.set()
    assert torch.allclose(logits(model, server.host), logits(model), atol=1e-5)


# ---- what fails ----


def test_the_users_line_is_named(model: LanguageModel, server: Server) -> None:
    with pytest.raises(OpError) as caught, model.trace(PROMPT, remote=server.host):
        h = model.transformer.h[0].output[0]
        (h @ torch.ones(3, 3)).save()
    assert caught.value.file == __file__ and "ones(3, 3)" in str(caught.value)


@pytest.mark.parametrize("fault", [drop, half, accepted_then_dropped, slow(0.2), status(503), status(502)])
def test_a_failing_way_is_tried_again(model: LanguageModel, server: Server, fault: Any) -> None:
    server.faults["POST"].append(fault)
    assert torch.allclose(logits(model, server.host), logits(model), atol=1e-5)
    assert len(server.jobs) == 1, "it was submitted once"
    assert server.resends == (fault is accepted_then_dropped)


def test_a_result_that_is_lost_is_asked_for_again(
    model: LanguageModel, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "WAIT", 0.05)
    server.hold.clear()
    server.faults["GET"] += [drop, half, status(503)]
    threading.Timer(0.3, server.hold.set).start()
    assert torch.allclose(logits(model, server.host), logits(model), atol=1e-5)
    assert posts(server) == 1


def test_the_server_says_how_long(model: LanguageModel, server: Server) -> None:
    server.faults["POST"].append(status(429, Retry_After="0.3"))
    start = time.monotonic()
    logits(model, server.host)
    assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize("code", [429, 503])
def test_a_server_that_stays_busy(model: LanguageModel, server: Server, code: int) -> None:
    fault = status(code, {"error": {"code": "RemoteError", "message": "come back tomorrow"}}, Retry_After="0.01")
    server.faults["POST"] += [fault] * http.TRIES
    with pytest.raises(RemoteError, match="come back tomorrow"):
        logits(model, server.host)
    assert posts(server) == http.TRIES


def test_a_server_that_is_not_there(model: LanguageModel) -> None:
    with pytest.raises(RemoteError, match="cannot be reached") as caught:
        logits(model, "http://127.0.0.1:9")
    assert caught.value.file == __file__ and caught.value.hint


def test_a_wrong_key(model: LanguageModel, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIG.API.given, "APIKEY", "a wrong one")
    with pytest.raises(RemoteError, match="no such key") as caught:
        logits(model, server.host)
    assert "CONFIG.set_default_api_key" in str(caught.value) and "a wrong one" not in str(caught.value)
    assert posts(server) == 1


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (status(413, {"error": {"code": "RemoteError", "message": "too large"}}), "too large"),
        (status(403), "answered 403"),
        (status(404, {"error": {"code": "RemoteError", "message": "no such model"}}), "no such model"),
        (status(500, b"the key is " + KEY.encode()), "answered 500: the key is ..."),
        (status(410, {"error": {"code": "RemoteError", "message": "expired"}}), "expired"),
        (status(422, {"error": {"code": "ModulePathError", "message": "none"}}), "none"),
        (status(422, {"error": 3}), "answered 422"),
        (status(200, b""), "not well formed: it has 0 bytes"),
        (status(200, b"\xff" * 40), "claims"),
        (status(200, (2).to_bytes(8, "little") + b"{}"), "no tensor 'response'"),
        (status(200, (4).to_bytes(8, "little") + b"{]  "), "not well formed"),
        (status(200, b"zzz", Content_Encoding="zstd"), "cannot be decompressed"),
        (status(200, b"zzz", Content_Encoding="gzip"), "was not asked for"),
        (status(202, b"[]"), "no JSON object"),
    ],
)
def test_answers_that_are_errors(model: LanguageModel, server: Server, fault: Any, says: str) -> None:
    server.faults["POST"].append(fault)
    with pytest.raises(nnsight_go.NnsightError) as caught:
        logits(model, server.host)
    assert says in str(caught.value) and KEY not in str(caught.value)
    assert caught.value.file == __file__ or "well formed" in str(caught.value)
    assert posts(server) == 1


def test_what_says_nothing_about_a_server(model: LanguageModel) -> None:
    with pytest.raises(InputError, match="no server is known"):
        model.trace(PROMPT, remote=True)
    with pytest.raises(InputError, match="no address"):
        model.trace(PROMPT, remote="somewhere")


def test_wrapped_models_run_here(server: Server) -> None:
    wrapped = NNsight(torch.nn.Linear(3, 3))
    with pytest.raises(InputError, match="wrapped model"):
        wrapped.trace(torch.ones(1, 3), remote=server.host)
    with pytest.raises(InputError, match="wrapped model"):
        wrapped.session(remote="local")


def test_a_model_in_training(gpt2_pair: Pair, server: Server) -> None:
    gpt2_pair.model.train()
    try:
        with pytest.raises(InputError, match="dropout"):
            gpt2_pair.model.trace(gpt2_pair.ids(), remote=server.host)
    finally:
        gpt2_pair.model.eval()


# ---- around ----


def test_status(server: Server) -> None:
    CONFIG.API.HOST = server.host
    assert nnsight_go.status()["m"] == {"name": "m", "architecture": "G", "dtype": "float32", "workers": 1}
    assert nnsight_go.is_model_running("m") and not nnsight_go.is_model_running("n", server.host)
    with pytest.raises(RemoteError, match="cannot be reached"):
        nnsight_go.status("http://127.0.0.1:9")


def test_settings(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CONFIG.API.given.clear()
    file = tmp_path / "config" / "nnsight-go" / "config.json"
    assert CONFIG.API.HOST == "" and CONFIG.API.APIKEY is None and CONFIG.API.COMPRESS is None
    CONFIG.set_default_api_key("from the file")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    CONFIG.API.given.clear()
    assert CONFIG.API.APIKEY == "from the file"
    monkeypatch.setenv("NNSIGHT_GO_API_KEY", "from the environment")
    monkeypatch.setenv("NNSIGHT_GO_HOST", "http://there")
    assert (CONFIG.API.APIKEY, CONFIG.API.HOST) == ("from the environment", "http://there")
    CONFIG.API.APIKEY, CONFIG.API.COMPRESS = "from the program", False
    assert CONFIG.API.APIKEY == "from the program"
    assert "from" not in repr(CONFIG) and "COMPRESS=False" in repr(CONFIG)
    CONFIG.API.given.clear()
    CONFIG.API.HOST = "http://elsewhere"
    CONFIG.save()
    assert json.loads(file.read_text()) == {"API": {"APIKEY": "from the file", "HOST": "http://elsewhere"}}
    with pytest.raises(AttributeError):
        CONFIG.API.HOTS = "?"  # type: ignore[attr-defined]
    for text in ("[]", "{", '{"API": 3}', '{"API": {"HOST": 3}}'):
        CONFIG.API.given.clear()
        monkeypatch.delenv("NNSIGHT_GO_HOST", raising=False)
        file.write_text(text)
        assert CONFIG.API.HOST == ""


def test_how_a_job_goes_is_shown(model: LanguageModel, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(http, "SHOWN_WAIT", 0.05)
    monkeypatch.setattr(progress, "QUICK", 0.1)
    for logging in (True, False):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setitem(CONFIG.APP.given, "REMOTE_LOGGING", logging)
        server.hold.clear()
        threading.Timer(0.5, server.hold.set).start()
        monkeypatch.setattr(http, "WAIT", 0.05)
        logits(model, server.host)
        shown = terminal.getvalue()
        assert ("queued, 2 before it, 0 s" in shown and shown.endswith("\r")) == logging
        assert bool(shown) == logging


# ---- models whose weights are elsewhere ----


@pytest.fixture
def bare(model: LanguageModel, tmp_path: pathlib.Path) -> pathlib.Path:
    """The model's directory without its weights."""
    for file in model.directory.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_model_without_weights(model: LanguageModel, server: Server, bare: pathlib.Path) -> None:
    there = LanguageModel(bare, remote=server.host)
    assert torch.allclose(logits(there), logits(model), atol=1e-5)
    assert len(server.jobs) == 1 and not there.dispatched
    assert "".join(there.stream(PROMPT, max_new_tokens=3)) == "".join(model.stream(PROMPT, max_new_tokens=3))
    with there.edit() as edited:
        edited.transformer.h[1].output[0][:] = 0
    assert not torch.allclose(logits(edited), logits(model))
    with there.scan(PROMPT):
        shape = there.lm_head.output.save().shape
    assert shape[0] == 1
    with pytest.raises(nnsight_go.ModelLoadError, match="without weights"):
        logits(there, False)
    with pytest.raises(nnsight_go.ModelLoadError, match="without weights"):
        _ = there.lm_head.weight
    with pytest.raises(nnsight_go.ModelLoadError, match="no safetensors weights"):
        LanguageModel(bare)


def test_a_model_that_only_the_server_knows(model: LanguageModel, server: Server) -> None:
    there = LanguageModel("somebody/something", remote=server.host, local_files_only=True)
    assert there.dtype == torch.float32 and there.config == model.config | {"dtype": "float32"}
    with there.trace([1, 2, 3]):
        got = there.lm_head.output.save()
    with model.trace([1, 2, 3]):
        want = model.lm_head.output.save()
    assert torch.allclose(got, want, atol=1e-5)
    with pytest.raises(nnsight_go.TokenizerError, match="token ids instead"):
        there.trace("text")
    server.faults["GET"].append(status(404, {"error": {"code": "RemoteError", "message": "no such model"}}))
    with pytest.raises(nnsight_go.ModelLoadError, match="no such model"):
        LanguageModel("somebody/something", remote=server.host, local_files_only=True)
