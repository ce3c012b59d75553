"""Nothing grows: resident memory, tensors, handles, garbage; and Ctrl-C stops a forward pass and breaks nothing."""

from __future__ import annotations

import gc
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from typing import Any

import pytest
import torch

from nnsight_go import LanguageModel, _ffi
from references import Pair, close, gpt2, main, pair

TESTS = pathlib.Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent / "python"), str(TESTS)))}

SOAK = """
import gc, sys
import psutil, torch
from nnsight_go import LanguageModel, OpError, _ffi

torch.set_num_threads(1)
model = LanguageModel(sys.argv[1], dispatch=True)
h, head = model.transformer.h, model.lm_head
vector, large = torch.ones(48), torch.ones(400, 48)
ids = [3, 1, 4, 1, 5]


def saves():
    with model.trace(ids):
        states = [block.output[0] for block in h].save()
        out = head.output.save()
    assert len(states) == 3 and out.shape == (1, 5, 61)


def edits():
    with model.trace(ids):
        h[0].output[0][:, -1, :] = vector
        h[1].mlp.output *= 0.5
        h[1].output[0] = h[1].output[0] + 0.1 * torch.randn_like(h[1].output[0])
        out = (head.output.sum() + large).save()
    assert out.shape == large.shape


def invokes():
    with model.trace() as tracer:
        with tracer.invoke(ids):
            state = h[2].output[0][:, -1]
        with tracer.invoke([2, 7]):
            h[0].output[0][:, -1] = state
            head(model.transformer.ln_f(h[1].output[0])).save()


def values():
    with model.trace(ids):
        x = h[1].output[0]
        if x.sum() > 1e9:
            x[:] = 0
        x[x > 0.5] = 0
        x.std(dim=-1).save()


def raises():
    try:
        with model.trace(ids):
            h[1].output[0].save()
            raise KeyError
    except KeyError:
        pass


def fails():
    try:
        with model.trace(ids):
            (h[1].output[0] + torch.ones(5)).save()
    except OpError:
        pass


def unsaved():
    with model.trace(ids):
        h[1].output[0].mean()


jobs = [saves, edits, invokes, values, raises, fails, unsaved]
process = psutil.Process()


def rounds(n):
    for i in range(n):
        jobs[i % len(jobs)]()


def now():
    gc.collect()
    return process.memory_info().rss, _ffi.counters()


rounds(2000)
rss, counters = now()
rounds(10000)
rss_after, counters_after = now()
print("kilobytes", (rss_after - rss) // 1024)
print("counters", counters == counters_after)
print("garbage", len(gc.garbage))
print("handles", len(process.open_files()), process.num_threads())
"""


@pytest.mark.slow
def test_ten_thousand_traces_leave_memory_flat(gpt2_pair: Pair) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SOAK, gpt2_pair.directory], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    # a leak of one tensor of a trace would be 10,000 times a kilobyte
    assert int(found["kilobytes"]) < 3000, found
    assert found["counters"] == "True" and found["garbage"] == "0", found


def test_a_trace_leaves_no_garbage(gpt2_pair: Pair) -> None:
    """What a trace makes goes with its last name: no cycle waits for the collector."""

    def trace() -> None:
        with gpt2_pair.model.trace(gpt2_pair.ids()):
            hidden = gpt2_pair.layers[1].output[0]
            hidden[:, -1] *= 2
            kept = [hidden.save(), gpt2_pair.model.output.logits.save()]
            float(hidden.mean())
        assert len(kept) == 2

    trace()
    gc.collect()
    before = _ffi.counters()
    gc.disable()
    try:
        tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
        for _ in range(5):
            trace()
        assert _ffi.counters() == before
        assert sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()) <= tensors
    finally:
        gc.enable()
    assert not gc.garbage


def test_saved_tensors_are_freed_when_dropped(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        hidden = gpt2_pair.layers[1].output[0].save()
        view = hidden[:, -1].save()
        other = (hidden * 2).save()
    references = [weakref.ref(x) for x in (hidden, view, other)]
    del other
    assert references[2]() is None
    del hidden
    assert view.sum().isfinite() and view._base is references[0](), "a view keeps its base, as in PyTorch"
    del view
    assert [r() for r in references] == [None] * 3


def test_values_that_are_not_saved_are_freed_before_the_end(gpt2_pair: Pair) -> None:
    """The peak of a trace does not hold every value it has seen."""
    ids = gpt2_pair.ids(40)
    with gpt2_pair.model.trace(ids):
        x = gpt2_pair.layers[0].output[0]
        for _ in range(200):
            x = x + 1
        x.save()
    assert _ffi.counters()["tensors"] < 200
    close(x, main(gpt2_pair.run(ids), f"{gpt2_pair.blocks}.0") + 200, tolerance=1e-3)


def test_models_come_and_go(gpt2_pair: Pair) -> None:
    gc.collect()
    before = _ffi.counters()
    for dispatch in (True, False, True):
        model = LanguageModel(gpt2_pair.directory, dispatch=dispatch)
        with model.trace([1, 2, 3]):
            model.lm_head.output.save()
        assert model.lm_head.weight.shape == (61, 48)
        del model
        gc.collect()
        assert _ffi.counters() == before


INTERRUPTED = """
import sys, time
import torch
from nnsight_go import LanguageModel, _ffi

torch.set_num_threads(1)
model = LanguageModel(sys.argv[1], dispatch=True, prepack=False)  # whose copies would move the last digits
def small():
    with model.trace([1, 2, 3]):
        return model.lm_head.output.save()

want, before = small(), _ffi.counters()
try:
    print("running", flush=True)
    for _ in range(20):  # so that the signal finds a forward pass, however late it comes
        if sys.argv[2] == "generate":  # in its prompt or in a step
            with model.generate([[7] * 400] * 4, max_new_tokens=600, min_new_tokens=600) as tracer:
                states = list().save()
                for step in tracer.iter[:]:
                    states.append(model.transformer.h[3].output[0])
                out = tracer.result.save()
            continue
        with model.trace([[7] * 1000] * 4):
            if sys.argv[2] == "end":
                out = model.lm_head.output.save()
            else:
                out = float(model.lm_head.output.sum())
    print("finished", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
states = out = None
import gc; gc.collect()
assert torch.equal(small(), want)
assert _ffi.counters() == before, (_ffi.counters(), before)
print("usable", flush=True)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A model whose forward pass over 4000 tokens takes seconds on one core."""
    return pair(gpt2(n_embd=384, n_head=6, n_layer=16, n_positions=1024), tmp_path_factory.mktemp("large"))


@pytest.mark.parametrize("where", ["end", "value", "generate"])
def test_an_interrupt_returns_within_a_second(large: Pair, where: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(large.directory), where]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        try:
            assert child.stdout.readline() == "running\n", child.stderr.read()
            time.sleep(0.5)
            child.send_signal(signal.SIGINT)
            start = time.monotonic()
            line = child.stdout.readline()
            took = time.monotonic() - start
            assert line == "interrupted\n", line + child.stderr.read()
            assert took < 1, took
            assert child.stdout.readline() == "usable\n", child.stderr.read()
            assert child.wait(60) == 0
        finally:
            child.kill()


@pytest.mark.parametrize("function", ["nng_run_new", "nng_generation_new", "nng_generation_step"])
def test_an_interrupt_behind_a_call_loses_nothing(
    function: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has made something by then, which Python does not know of yet."""
    model = LanguageModel(pair(gpt2(), tmp_path).directory, tokenizer=False, dispatch=True)

    def run() -> None:
        if function == "nng_run_new":
            with model.trace([1, 2, 3]):
                model.lm_head.output.save()
        else:
            with model.generate([[1, 2, 3]], max_new_tokens=3):
                model.lm_head.output.save()

    run()
    gc.collect()
    before, check = _ffi.counters(), _ffi.check

    def interrupted(called: Any, *args: Any) -> None:
        check(called, *args)
        if called.__name__ == function:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(_ffi, "check", interrupted)
        run()
    gc.collect()
    assert _ffi.counters() == before
    run()
