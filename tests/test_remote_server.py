"""Remote traces on a real server: equal results, and nothing lost with a process.

The tests of the language run on one as well: ``on_a_server``.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import pathlib
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch

import on_a_server
import test_gradient_programs
import test_programs
from nnsight_go import LanguageModel, ModulePathError, OpError, RemoteError
from nnsight_go import remote as nng_remote
from references import Pair, tensor_of
from servers import Process, Server, key_command
from test_remote_local import Outcome, equal, steps_for, steps_with


def named(pair: Pair) -> str:
    """A model as ``--model`` names it."""
    return f"{pair.model.name_or_path}={pair.directory}"


@pytest.fixture(scope="module")
def host(gpt2_pair: Pair, llama_pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of both small models."""
    data = tmp_path_factory.mktemp("server")
    with Server(data, "--model", named(gpt2_pair), "--model", named(llama_pair), "--rate", 10000) as server:
        yield server.host
        assert server.end() == 0, "".join(server.said)


@pytest.fixture
def remote(either: Pair, host: str) -> Iterator[Pair]:
    """Both small models; their traces run on the server."""
    either.model._remote = host
    yield either
    either.model._remote = None


@pytest.mark.parametrize("seed", range(100, 130))
def test_random_programs(remote: Pair, seed: int) -> None:
    failure = test_programs.outcome(test_programs.maker(remote).make(seed), remote)
    assert failure is None, failure


@pytest.mark.parametrize("seed", range(100, 110))
def test_random_programs_with_gradients(remote: Pair, seed: int) -> None:
    failure = test_gradient_programs.outcome(test_gradient_programs.made(remote, seed), remote, seed)
    assert failure is None, failure


@pytest.mark.parametrize("name", sorted(on_a_server.listed(on_a_server.ONCE | on_a_server.DIFFERS)))
def test_what_is_listed_is_a_test(name: str) -> None:
    """Of the tests of the language, which run on a server as well."""
    module, _, test = name.partition("[")[0].partition(".")
    assert module in on_a_server.MODULES and callable(getattr(importlib.import_module(module), test))


@pytest.mark.parametrize("program", [steps_for, steps_with], ids=lambda f: f.__name__)
def test_generations(either: Pair, host: str, program: Callable[[Pair, Any], Outcome]) -> None:
    here, there = program(either, None), program(either, host)
    for name, want in here.items():
        equal(there[name], want, name)


def test_sampling_follows_the_seed(either: Pair, host: str) -> None:
    found = []
    for where in (None, host):
        torch.manual_seed(3)
        with either.model.generate(
            either.ids(4), max_new_tokens=6, do_sample=True, eos_token_id=None, pad_token_id=0, remote=where or False
        ):
            tokens = either.model.generator.output.save()
        found.append((tokens, torch.rand(2)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_errors_are_those_of_here(remote: Pair) -> None:
    """The class, and the user's own line."""
    with pytest.raises(OpError, match="size of tensor a") as caught, remote.model.trace(remote.ids(4)):
        hidden = tensor_of(remote, f"{remote.blocks}.1")
        (hidden.flatten()[: hidden.flatten().sum().long() * 0 + 5] + hidden.flatten()[:3]).save()  # this line
    assert caught.value.file == __file__
    with pytest.raises(ModulePathError), remote.model.trace(remote.ids(4)):
        _ = remote.model.nothing.output


def test_a_job_that_nobody_waits_for(either: Pair, host: str) -> None:
    ids = either.ids(5)
    with either.model.trace(ids, remote=host, blocking=False) as tracer:
        logits = either.model.lm_head.output.save()
    here = nng_remote.Job(tracer.job.id, host=host).result()
    tracer.job.result()
    with either.model.trace(ids):
        want = either.model.lm_head.output.save()
    equal(logits, want, "logits")
    equal(here[0], want, "those that another process sees")
    assert tracer.job.status == "COMPLETED"
    begun, done = tracer.job.log
    assert begun.endswith("Z begun") and "Z done after" in done


def test_generations_at_once(gpt2_pair: Pair, host: str) -> None:
    """Many clients, whose generations share their steps: each has the tokens that it has alone."""

    def tokens(i: int, remote: str | None) -> torch.Tensor:
        with gpt2_pair.model.generate(
            gpt2_pair.ids(2 + i % 5, seed=i), max_new_tokens=4 + i % 9, remote=remote
        ) as tracer:
            out = tracer.result.save()
        return out

    wanted = [tokens(i, None) for i in range(24)]
    with concurrent.futures.ThreadPoolExecutor(12) as clients:
        for got, want in zip(clients.map(lambda i: tokens(i, host), range(24)), wanted, strict=True):
            assert torch.equal(got, want)


def test_generations_with_lines_at_once(gpt2_pair: Pair, host: str) -> None:
    """Each has what it has alone: its tokens, what it has changed, and what it keeps of each step."""

    def run(i: int, remote: str | None) -> tuple[list[torch.Tensor], torch.Tensor]:
        kept: list[torch.Tensor] = []
        model, rows = gpt2_pair.model, [gpt2_pair.ids(3 + i % 3, seed=i + k) for k in range(1 + i % 2)]
        settings: dict[str, Any] = {"max_new_tokens": 3 + i % 6, "eos_token_id": [], "pad_token_id": 0}
        with model.generate(rows, **settings, remote=remote) as tracer:
            with tracer.iter[i % 3 :]:
                model.transformer.h[1].output[0][:, -1] *= 1 + 0.1 * (i % 4)
                kept.append(model.transformer.h[2].output[0].save())
            tokens = tracer.result.save()
        return kept, tokens

    wanted = [run(i, None) for i in range(24)]
    with concurrent.futures.ThreadPoolExecutor(12) as clients:
        for (kept, got), (want_kept, want) in zip(clients.map(lambda i: run(i, host), range(24)), wanted, strict=True):
            assert torch.equal(got, want)
            assert len(kept) == len(want_kept) > 0
            torch.testing.assert_close(kept, want_kept, rtol=1e-4, atol=1e-4)


def test_another_model(gpt2_pair: Pair, host: str) -> None:
    model = LanguageModel(str(gpt2_pair.directory), tokenizer=False)
    model._name_or_path = "no/such"
    with pytest.raises(RemoteError, match='no model "no/such"'), model.trace([1, 2], remote=host):
        model.lm_head.output.save()


def test_keys(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    ada = key_command(tmp_path, "create", "Ada").strip()
    with Server(tmp_path, "--model", named(gpt2_pair)) as server:
        trace = {"remote": server.host}
        with pytest.raises(RemoteError, match="API key"), gpt2_pair.model.trace([1, 2], **trace):
            gpt2_pair.model.lm_head.output.save()
        request = urllib.request.Request(server.host + "/v1/models", headers={"Authorization": f"Bearer {ada}"})
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["models"][0]["workers"] == 1
        key_command(tmp_path, "revoke", key_command(tmp_path, "list").split()[0])
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request)
        assert ada not in "".join(server.said)


def test_limits_of_a_key(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    """What a job would take is refused before it runs, at the line that takes most."""
    guest = key_command(tmp_path, "create", "--max-output", "1000", "--max-work", "2e6", "Guest").strip()
    assert "max-work=2e+06  max-output=1000" in key_command(tmp_path, "list")
    model, ids = gpt2_pair.model, gpt2_pair.ids(6)
    with Server(tmp_path, "--model", named(gpt2_pair)) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NNSIGHT_GO_API_KEY", guest)
        with model.trace(ids, remote=server.host):
            best = model.lm_head.output[0, -1].argmax().save()
        much = pytest.raises(RemoteError, match=r"would take .*, and a job may send 1000 bytes")
        with much as caught, model.trace(ids, remote=server.host):
            tensor_of(gpt2_pair, f"{gpt2_pair.blocks}.1").save()
            model.lm_head.output.repeat(1, 100, 1).save()  # this line
        assert caught.value.file == __file__
        long = pytest.raises(RemoteError, match="multiplications, and a job may take 2.0e[+]06")
        with long, model.generate(gpt2_pair.ids(20), max_new_tokens=40, remote=server.host):
            model.generator.output.save()
    with model.trace(ids):
        assert torch.equal(best, model.lm_head.output[0, -1].argmax().save())


def submitted(pair: Pair, host: str, jobs: int) -> list[tuple[Any, torch.Tensor, list[int]]]:
    """Jobs that nobody waits for yet, with what each saves. None shares a pass with the next: their modes differ."""
    out = []
    for i in range(jobs):
        ids = pair.ids(5, seed=i)
        with torch.set_grad_enabled(i % 2 == 0), pair.model.trace(ids, remote=host, blocking=False) as tracer:
            logits = pair.model.lm_head.output.save()
        out.append((tracer.job, logits, ids))
    return out


def check(pair: Pair, jobs: list[tuple[Any, torch.Tensor, list[int]]]) -> None:
    """Waits for jobs, and compares them with what they give here."""
    for job, logits, ids in jobs:
        job.result()
        with pair.model.trace(ids):
            want = pair.model.lm_head.output.save()
        equal(logits, want, "logits")


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_no_job(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    with Server(tmp_path, "--nats-listen", "127.0.0.1:0", "--rate", 10000) as server:
        worker = ("worker", "--nats", server.nats, "--model", named(gpt2_pair))
        with Process(*worker) as first:
            first.wait_for("working")
            jobs = submitted(gpt2_pair, server.host, 50)
            first.wait_for("state=COMPLETED", 5)
            first.kill()
            done = sum("state=COMPLETED" in line for line in first.said)
        assert done < 50, "it was killed in the middle"
        with Process(*worker) as second:
            check(gpt2_pair, jobs)
            assert second.end() == 0
        assert any("state=COMPLETED" in line for line in second.said)


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_no_generation(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    """Those that were growing in the same steps come again, those that had left the batch do not."""
    with Server(tmp_path, "--nats-listen", "127.0.0.1:0", "--rate", 10000) as server:
        worker = ("worker", "--nats", server.nats, "--model", named(gpt2_pair))

        def tokens(i: int, remote: str | None) -> torch.Tensor:
            with gpt2_pair.model.generate(
                gpt2_pair.ids(2 + i % 3, seed=i), max_new_tokens=1 + i % 12, remote=remote
            ) as t:
                out = t.result.save()
            return out

        wanted = [tokens(i, None) for i in range(40)]
        with Process(*worker) as first, concurrent.futures.ThreadPoolExecutor(40) as clients:
            first.wait_for("working")
            got = [clients.submit(tokens, i, server.host) for i in range(40)]
            first.wait_for("state=COMPLETED", 3)
            first.kill()
            with Process(*worker) as second:
                for i, future in enumerate(got):
                    assert torch.equal(future.result(), wanted[i])
                assert second.end() == 0
        again = sum("state=COMPLETED" in line for line in second.said)
        assert again < 40  # what the first had done, of which it may not have said so, is not done again


@pytest.mark.slow
def test_a_server_that_is_killed_keeps_jobs_and_results(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    with Server(tmp_path, "--model", named(gpt2_pair)) as server:
        before = submitted(gpt2_pair, server.host, 20)
        before[9][0].result()
        server.kill()
    with Server(tmp_path, "--model", named(gpt2_pair)) as server:
        for job, _, ids in before:
            found = nng_remote.Job(job.id, host=server.host).result()
            with gpt2_pair.model.trace(ids):
                want = gpt2_pair.model.lm_head.output.save()
            equal(found[0], want, "logits")


def test_memory_stays_flat(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    """Over 10,000 jobs, once as many are kept as come in the time that they are kept for."""
    with Server(tmp_path, "--model", named(gpt2_pair), "--keep", "3s") as server:
        model = LanguageModel(gpt2_pair.model.name_or_path, remote=server.host, tokenizer=False)

        def run(count: int) -> None:
            for i in range(count):
                with model.trace([i % 7 + 1]):
                    model.lm_head.output.save()

        def private() -> int:
            return psutil.Process(server.process.pid).memory_full_info().uss

        with concurrent.futures.ThreadPoolExecutor(8) as clients:
            list(clients.map(run, [500] * 8))
            before = private()
            list(clients.map(run, [1250] * 8))
            grown = private() - before
        assert grown < 40 * 2**20, f"{grown / 2**20:.0f} MiB more after 10,000 jobs"
