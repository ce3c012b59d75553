"""A model that the engine computes itself: its handle, its description, its parameters, its runs and generations."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import _ffi, points, wire
from .points import Point
from .runners import Drawn, Rows, Wants

if TYPE_CHECKING:
    from .proxy import Proxy

# A run comes back to Python this often (milliseconds), so that Ctrl-C is seen.
STEP_MS = 100


class Native:
    """A model directory opened by the engine. Any number of threads may use it.

    Args:
        directory: holds ``config.json`` and the weights.
        dtype: of the parameters; None keeps what the checkpoint holds.
        device: where the model computes.
        load: map the weights now, rather than before the first run.
        prepack: packed copies of weights: whether to make them, or how many bytes of them.
        captures: for how many shapes of traces a GPU keeps the pass, to do it again.
        bare: there need be no weights: the model is computed elsewhere.

    Raises:
        ModelLoadError: a file is missing or spoilt, a tensor has another shape than the architecture
            asks for, or the architecture is not one of the engine's.
    """

    job = None  # values are there when a run has ended
    by_input = False  # which access points there are does not depend on the input

    def __init__(
        self,
        directory: str | os.PathLike[str],
        dtype: torch.dtype | None,
        device: torch.device,
        load: bool = False,
        prepack: bool | int = True,
        bare: bool = False,
        captures: int = 0,
    ) -> None:
        room = 0 if prepack is True else prepack or -1  # to the engine 0 is its default
        options: dict[str, Any] = {"device": str(device), "load": load, "bare": bare}
        options |= {"prepack": room, "captures": captures}
        if dtype is not None:
            options["dtype"] = str(dtype).removeprefix("torch.")
        handle = ctypes.c_uint64()
        lib = _ffi.lib()
        _ffi.check(lib.nng_model_open, os.fsencode(directory), json.dumps(options).encode(), ctypes.byref(handle))
        self._handle = handle.value
        self.close = weakref.finalize(self, _close, lib, self._handle)
        """Gives the weights back; runs under way end first. Calling it again does nothing."""
        self.device = device
        self.training = False
        self.shares = True  # tokens that are equal, or that nobody looks at, are not computed each
        self._parameters: dict[str, torch.nn.Parameter | torch.Tensor] = {}
        self._stand_ins: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What there is to know without the weights: ``docs/architecture.md``, "Model description"."""
        out: dict[str, Any] = json.loads(_ffi.call(_ffi.lib().nng_model_describe, self._handle))
        return out

    @functools.cached_property
    def points(self) -> dict[tuple[str, int], Point]:
        """The access points by path and port."""
        return points.read(self.description["points"])

    @functools.cached_property
    def ops(self) -> dict[tuple[str, int], Point]:
        """The results of operators inside modules, by path and port."""
        return points.read_ops(self.description["ops"])

    @functools.cached_property
    def parameter_info(self) -> dict[str, dict[str, Any]]:
        """Shape, dtype and kind of every parameter and buffer, by name."""
        return {p["name"]: p for p in self.description["params"]}

    @property
    def loaded(self) -> bool:
        """Whether the weights are mapped."""
        return bool(json.loads(_ffi.call(_ffi.lib().nng_model_describe, self._handle))["loaded"])

    def load(self) -> None:
        """Maps the weights, if they are not yet."""
        _ffi.check(_ffi.lib().nng_model_load, self._handle)

    def train(self, on: bool) -> None:
        """Switches dropout on or off, for runs that begin from now on."""
        _ffi.check(_ffi.lib().nng_model_train, self._handle, on)
        self.training = on

    def share(self, on: bool) -> None:
        """Switches the sharing of tokens on or off, for runs that begin from now on."""
        _ffi.check(_ffi.lib().nng_model_apart, self._handle, not on)
        self.shares = on

    def explain(self, graph: bytes, constants: int) -> str:
        """What a run of a whole graph in wire form with that many constants would compute."""
        return _ffi.call(_ffi.lib().nng_model_explain, self._handle, graph, len(graph), constants).decode()

    def parameter(self, name: str) -> torch.Tensor:
        """The live tensor of a parameter or buffer: changing it in place changes the model."""
        with self._lock:
            known = self._parameters.get(name)
            if known is None:
                pointer = ctypes.c_void_p()
                _ffi.check(_ffi.lib().nng_model_param, self._handle, name.encode(), ctypes.byref(pointer))
                known = _ffi.py().nngpy_wrap(pointer)
                _ffi.py().nngpy_tensor_free(pointer)
                assert isinstance(known, torch.Tensor)
                if not self.parameter_info[name].get("buffer") and type(known) is torch.Tensor:
                    # the same object the engine computes with, not a view of it
                    known.__class__ = torch.nn.Parameter
                self._parameters[name] = known
            return known

    def stand_in(self, name: str) -> torch.Tensor:
        """A tensor without values that means a parameter or buffer where there are no weights: always the same one."""
        with self._lock:
            known = self._stand_ins.get(name)
            if known is None:
                info = self.parameter_info[name]
                dtype = getattr(torch, info["dtype"])
                known = self._stand_ins[name] = torch.empty(info["shape"], dtype=dtype, device="meta")
            return known

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """The parameter or buffer that a tensor is, or stands for; None where it is none."""
        known = (self._stand_ins if tensor.is_meta else self._parameters).items()
        return next((name for name, parameter in known if parameter is tensor), None)

    def begin(self, graph: bytes, constants: Sequence[torch.Tensor], end: bool) -> Run:
        """Starts a run of a graph in wire form on this thread.

        Args:
            graph: each of its save nodes keeps one tensor.
            constants: the tensors that its const nodes number.
            end: nothing will be added to it.
        """
        return Run(_ffi.lib().nng_run_new, self._handle, graph, constants, end)

    def generation(self, rows: Rows, masks: Rows | None, settings: dict[str, Any], wants: Wants) -> Handle:
        """Begins to generate.

        Args:
            rows: the prompts, as token ids.
            masks: 0 for tokens that nothing looks at.
            settings: as ``nng_generation_new`` takes them.
            wants: what of each step's tokens is asked for.
        """
        return Handle(self, rows, masks, settings)


class NoTensor(Exception):
    """A value that was asked for is none.

    Args:
        number: which of them.
    """

    def __init__(self, number: int) -> None:
        super().__init__("a value that was asked for is no tensor")
        self.number = number


class Run(_ffi.Owner):
    """A trace on its way through the engine, of a graph in wire form that a function of ``nng.h`` starts.

    It holds tensors until it is freed.
    """

    frees = "nng_run_free"

    def __init__(self, start: Any, of: Any, graph: bytes, constants: Sequence[torch.Tensor], end: bool) -> None:
        super().__init__()
        with _pointers(constants) as pointers:
            _ffi.check(start, of, graph, len(graph), pointers, len(constants), end, ctypes.byref(self._handle))

    def more(self, graph: bytes, constants: Sequence[torch.Tensor], end: bool) -> None:
        """Adds what the program says next: a graph whose nodes, invokes and positions are numbered on."""
        with _pointers(constants) as pointers:
            _ffi.check(_ffi.lib().nng_run_more, self._handle, graph, len(graph), pointers, len(constants), end)

    def results(self, adopt: Sequence[Proxy] | None) -> list[torch.Tensor]:
        """Works until the values that were asked for last are there, and gives them in the order of their nodes.

        With ``adopt`` these proxies become the values instead: all of them or, where anything fails, none.
        """
        self._work()
        return self._found(adopt)

    def _work(self) -> int:
        """Works until the engine has more to say than that it works, and gives that: ``done`` of ``nng_run_step``."""
        lib, done = _ffi.lib(), ctypes.c_int32()
        while not done.value:
            _ffi.check(lib.nng_run_step, self._handle, STEP_MS, ctypes.byref(done))
        return done.value

    def _found(self, adopt: Sequence[Proxy] | None) -> list[torch.Tensor]:
        """The values that are there, as ``results`` gives them."""
        lib, py = _ffi.lib(), _ffi.py()
        array, count = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_int64()
        out = _ffi.Buf()
        _ffi.check(lib.nng_run_results, self._handle, ctypes.byref(out), ctypes.byref(array), ctypes.byref(count))
        try:
            numbers = [i for _, i in sorted(wire.results(out.take(), range(count.value)))]
            if None in numbers:
                raise NoTensor(numbers.index(None))
            pointers = (ctypes.c_void_p * len(numbers))(*[array[i] for i in numbers])
            if adopt is not None:
                py.nngpy_adopt(list(adopt), pointers, torch.Tensor)
                return []
            return [py.nngpy_wrap(p) for p in pointers]
        finally:
            lib.nng_tensors_free(array, count)


class Handle(_ffi.Owner):
    """A generation in the engine."""

    frees = "nng_generation_free"
    together = 1  # there is nothing to gain

    def __init__(self, native: Native, rows: Rows, masks: Rows | None, settings: dict[str, Any]) -> None:
        super().__init__()
        given = (json.dumps({"rows": rows, "masks": masks}).encode(), json.dumps(settings).encode())
        _ffi.check(_ffi.lib().nng_generation_new, native._handle, *given, ctypes.byref(self._handle))

    def step(self, graph: bytes, constants: list[torch.Tensor], end: bool) -> Run:
        """Starts the run of the next step."""
        return Run(_ffi.lib().nng_generation_step, self._handle, graph, constants, end)

    def gather(self) -> NoReturn:
        """Not here."""
        raise NotImplementedError

    flush = gather

    def next(self, left: bool = False) -> tuple[Drawn, torch.Tensor | None]:
        """Draws the tokens of the step that is done; with ``left`` also gives what the filters left of its scores."""
        if left:
            return self.choose(self.scores())
        return Drawn(**json.loads(_ffi.call(_ffi.lib().nng_generation_next, self._handle))), None

    def scores(self) -> torch.Tensor:
        """The scores of the step that is done, to be changed: the first half of ``next``."""
        pointer = ctypes.c_void_p()
        _ffi.check(_ffi.lib().nng_generation_scores, self._handle, ctypes.byref(pointer))
        return _taken(pointer)

    def choose(self, scores: torch.Tensor) -> tuple[Drawn, torch.Tensor]:
        """The second half of ``next``: draws from scores, and gives what the filters left of them as well."""
        left = ctypes.c_void_p()
        with _pointers([scores]) as pointers:
            given = (self._handle, pointers[0], ctypes.byref(left))
            out = json.loads(_ffi.call(_ffi.lib().nng_generation_choose, *given))
        return Drawn(**out), _taken(left)

    def end(self, rows: list[bool]) -> bool:
        """Ends rows, and tells whether all have ended."""
        done = ctypes.c_int32()
        given = (self._handle, (ctypes.c_int32 * len(rows))(*rows), len(rows), ctypes.byref(done))
        _ffi.check(_ffi.lib().nng_generation_end, *given)
        return bool(done.value)


def _taken(pointer: ctypes.c_void_p) -> torch.Tensor:
    """A tensor that the engine gave away."""
    py = _ffi.py()
    try:
        out: torch.Tensor = py.nngpy_wrap(pointer)
        return out
    finally:
        py.nngpy_tensor_free(pointer)


def become(proxies: list[Any], tensors: list[Any]) -> None:
    """Turns proxies into tensors: all of them or, where anything fails, none."""
    if proxies:
        _ffi.calls()["become"](proxies, tensors, torch.Tensor)


@contextlib.contextmanager
def _pointers(tensors: Sequence[torch.Tensor | None]) -> Iterator[Any]:
    """References on tensors, for the time of a call; null for none."""
    py = _ffi.py()
    out = (ctypes.c_void_p * len(tensors))()
    try:
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                out[i] = py.nngpy_unwrap(tensor)
        yield out
    finally:
        for pointer in out:
            if pointer:
                py.nngpy_tensor_free(pointer)


def _close(lib: ctypes.CDLL, handle: int) -> None:
    err = _ffi.Buf()
    lib.nng_model_close(handle, ctypes.byref(err))  # nothing to be done where it fails: a fork's child, say
    lib.nng_free(ctypes.byref(err))
