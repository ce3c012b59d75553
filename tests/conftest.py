"""Fixtures of many tests: small models, and that nothing stays behind in the engine."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nnsight_go import _ffi
from nnsight_go.native import Run
from nnsight_go.remote.runs import RemoteRun
from on_a_server import (  # noqa: F401
    farm,
    pytest_collection_modifyitems,
    pytest_generate_tests,
    pytest_pyfunc_call,
    runs_on,
)
from references import Pair, gpt2, llama, pair, tokenizer

# What needs a device other than the CPU has processes of its own: test_device.py.
collect_ignore = [] if "simdevice.plugin" in sys.modules else ["simdevice"]


@pytest.fixture(scope="session", autouse=True)
def own_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests, and the processes that they start, neither read nor write the user's settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        for name in ("NNSIGHT_GO_HOST", "NNSIGHT_GO_API_KEY"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def gpt2_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A small GPT-2. Its parameters are shared by all tests: put back what you change."""
    return pair(gpt2(), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def llama_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A small Llama. Its parameters are shared by all tests: put back what you change."""
    return pair(llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def text_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A small GPT-2 with a tokenizer."""
    directory = tmp_path_factory.mktemp("text")
    tokenizer().save_pretrained(directory)
    made = pair(gpt2(vocab_size=300), directory)
    assert made.model.tokenizer("Rome")["input_ids"]  # opens it: it stays open with the model
    return made


@pytest.fixture(params=["gpt2", "llama"])
def either(request: pytest.FixtureRequest) -> Pair:
    """Both small models, one after the other."""
    found: Pair = request.getfixturevalue(f"{request.param}_pair")
    return found


@pytest.fixture
def nothing_stays(gpt2_pair: Pair, llama_pair: Pair, text_pair: Pair) -> Iterator[None]:
    """Fails where the engine holds more tensors or handles after the test than before it."""
    before = _ffi.counters()
    yield
    after = _ffi.counters()
    if any(after[key] > before[key] for key in before):
        gc.collect()  # slow, and seldom needed: most of what a trace makes is in no cycle
        after = _ffi.counters()
    assert all(after[key] <= before[key] for key in before), (before, after)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each run of the engine, or of a server's."""
    counted: list[int] = []

    def counting(results: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any) -> Any:
            counted.append(1)
            return results(*args)

        return count

    for runner in (Run, RemoteRun):
        monkeypatch.setattr(runner, "results", counting(runner.results))
    return counted
