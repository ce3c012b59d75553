"""The tests of the language once more, with the traces of their models on a real server.

A test of ``MODULES`` that has its model from a fixture of ``MODELS`` runs twice: ``[here]`` and ``[loopback]``. So does
a new one, unless it is listed below, with the reason. What is in ``DIFFERS`` has to fail there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from nnsight_go import LanguageModel
from references import Pair
from servers import Process, Server

MODULES = (
    "test_cache test_edit_programs test_edits test_errors test_generate test_generate_more test_generate_parts "
    "test_gradients test_graphs test_inputs test_inside test_invokes test_pausing test_places test_saving test_trace "
    "test_tracebacks test_values test_verbs"
).split()
MODELS = "gpt2_pair llama_pair text_pair either made model real".split()

MOST_WORKERS = 8  # of which each holds all of libtorch

# Tests that run here only, by the reason.
ONCE = {
    "another one says the same, and transformers takes long for it": """
        test_generate_more.test_beams_of_a_real_model
        test_generate_more.test_stop_strings_are_transformers
    """,
    "its traces are in processes of its own, and run there": """
        test_graphs.test_another_process_runs_it
        test_places.test_a_file
        test_places.test_a_notebook
        test_places.test_the_debugger
        test_places.test_the_prompt
        test_tracebacks.test_all_frames_on_request
    """,
}

# Tests, or one of a test's parameters, that see a difference. Users read of them in docs/remote.md, "What differs".
DIFFERS = {
    "saved values have no history of autograd": """
        test_gradients.test_a_probe_is_trained
        test_gradients.test_backward_after_the_block
        test_gradients.test_parameters[after]
        test_trace.test_grad_mode_belongs_to_the_line
    """,
    "parameters are the server's, and have no .grad": """
        test_gradients.test_backward_of_chosen_inputs
        test_gradients.test_parameters[inside]
    """,
    "no gradient flows through a custom autograd.Function": """
        test_gradients.test_an_error_in_a_custom_backward
        test_gradients.test_custom_functions_keep_their_gradient
    """,
    "no two saved values share memory": "test_trace.test_saved_tensors_share_storage_as_in_torch",
    "a program is planned as a whole, however far the model had run when a value was needed": """
        test_gradients.test_a_leaf_is_filled_once_though_the_model_runs_again
    """,
    "a session is one job, done at its end": """
        test_verbs.test_a_session_keeps_no_temporaries
        test_verbs.test_errors_leave_a_session_clean[engine]
    """,
    "a server's default dtype is float32": "test_values.test_the_default_dtype_is_pythons",
    "a server computes on its own device": "test_cache.test_sizes_alone",
    "it watches the engine of this process": """
        test_generate_parts.test_a_late_step_is_no_longer_than_an_early_one
        test_pausing.test_a_value_at_each_layer_takes_one_run
        test_verbs.test_a_session_computes_only_what_is_held
    """,
    "a fork can use a server, and not the engine": "test_errors.test_a_forked_child_says_so",
}


def listed(tests: dict[str, str]) -> dict[str, str]:
    """The reason of each test."""
    return {name.strip(): reason for reason, names in tests.items() for name in names.strip().splitlines()}


_once, _differs = listed(ONCE), listed(DIFFERS)


def _name(function: Any) -> str:
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Has the tests of the language run twice."""
    name = _name(metafunc.function)
    ours = name.partition(".")[0] in MODULES and not set(MODELS).isdisjoint(metafunc.fixturenames)
    if ours and name not in _once:
        metafunc.parametrize("runs_on", ["here", "loopback"], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Leaves wrapped models out, which run here only."""
    items[:] = [item for item in items if "hosted-loopback" not in item.name]


def names(test: pytest.Function) -> tuple[str, ...]:
    """What a test may be listed by: its own name, and that with one of its parameters."""
    name, given = _name(test.function), getattr(test, "callspec", None)
    return (name, *(f"{name}[{part}]" for part in given.id.split("-"))) if given else (name,)


def _difference(test: pytest.Function) -> str | None:
    """Why a test fails on a server, where it does."""
    return next((_differs[n] for n in names(test) if n in _differs), None)


@dataclasses.dataclass
class Farm:
    """A server, and a worker for each model that tests have brought lately.

    Attributes:
        asked: how often the server was.
        workers: by the name of the model, the one that was used last at the end.
    """

    server: Server
    asked: int = 0
    workers: dict[str, Process] = dataclasses.field(default_factory=dict)

    def serve(self, model: LanguageModel) -> None:
        """Has a worker for a model."""
        name = model.name_or_path
        self.workers[name] = self.workers.pop(name, None) or self._start(name, model)
        if len(self.workers) > MOST_WORKERS:
            end(self.workers.pop(next(iter(self.workers))))

    def _start(self, name: str, model: LanguageModel) -> Process:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")  # models as small as these would have threads wait for each other
            started = Process("worker", "--nats", self.server.nats, "--model", f"{name}={model._directory}")
        started.wait_for("working")
        return started


def end(*programs: Process) -> None:
    """Asks programs to end, which they do in peace."""
    for program in programs:
        program.process.terminate()
    for program in programs:
        with program:
            assert program.end() == 0, "".join(program.said)


@pytest.fixture(scope="session")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """The server of all tests of the language."""
    data = tmp_path_factory.mktemp("farm")
    with Server(data, "--nats-listen", "127.0.0.1:0", "--rate", 10000) as server, pytest.MonkeyPatch.context() as patch:
        made, send = Farm(server), httpx2.Client.send

        def counting(*args: Any, **kwargs: Any) -> Any:
            made.asked += 1
            return send(*args, **kwargs)

        patch.setattr(httpx2.Client, "send", counting)
        yield made
        end(*made.workers.values())
        end(server)


def _models(request: pytest.FixtureRequest) -> Iterator[LanguageModel]:
    """Those that a test has from its fixtures."""
    for name in MODELS:
        if name in request.fixturenames:
            found = request.getfixturevalue(name)
            if isinstance(found, Pair):
                yield found.model
            else:
                yield found[0] if isinstance(found, tuple) else found


@pytest.fixture(autouse=True)
def runs_on(request: pytest.FixtureRequest) -> Iterator[Farm | None]:
    """Where the traces of a test run that do not say where: on a server, or None for here."""
    if getattr(request, "param", "here") == "here":
        yield None
        return
    if reason := _difference(request.node):
        request.applymarker(pytest.mark.xfail(reason=reason))
    found, farm = list(_models(request)), request.getfixturevalue("farm")
    for model in found:
        farm.serve(model)
    for model in found:
        model._remote = farm.server.host
    yield farm
    for model in found:
        model._remote = None


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """Counts no test as one on a server that has asked the server nothing."""
    farm = pyfuncitem.funcargs.get("runs_on")
    before = farm.asked if farm else 0
    result = yield
    if farm and farm.asked == before:
        pytest.skip("asks the server nothing")
    return result
