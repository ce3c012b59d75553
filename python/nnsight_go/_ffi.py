"""The engine's shared libraries, loaded once: the only module that knows where they lie.

``lib()`` is ``libnnsight_go`` (``capi/nng.h``), whose calls drop the global lock; ``py()`` is
``libnng_py`` (``pybind/pyobj.h``), whose calls keep it. ``check`` and ``call`` turn failures into
exceptions. The argument types of a function are declared beside its use or in the tables below.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import torch  # loads libtorch, which the engine shares

from .errors import ForkError, HandleError, InternalError, ModelLoadError, NnsightError, from_fault, users

ABI = 2  # must be the one that nng_version tells

OK, EFAULT, EHANDLE, EFORK, EBUSY, EPANIC = range(6)


class Buf(ctypes.Structure):
    """``nng_buf``: memory that the library gave and ``nng_free`` takes back."""

    _fields_ = [("data", ctypes.c_void_p), ("size", ctypes.c_int64)]

    def take(self) -> bytes:
        """Copies the bytes out and frees the buffer."""
        if not self.data:
            return b""
        out = ctypes.string_at(self.data, self.size)
        lib().nng_free(ctypes.byref(self))
        return out

    def take_array(self) -> bytearray:
        """As ``take``, for bytes that may be a tensor's memory."""
        out = bytearray((ctypes.c_char * self.size).from_address(self.data) if self.data else b"")
        lib().nng_free(ctypes.byref(self))
        return out


_HANDLE, _BUF, _I64 = ctypes.c_uint64, ctypes.POINTER(Buf), ctypes.c_int64
_HANDLES, _POINTERS = ctypes.POINTER(_HANDLE), ctypes.POINTER(ctypes.c_void_p)

# Functions of nng.h that give a code; those of tokenizers are declared in tokenizer.py.
_CODED: dict[str, list[Any]] = {
    "nng_version": [_BUF, _BUF],
    "nng_counters": [_BUF, _BUF],
    "nng_model_open": [ctypes.c_char_p, ctypes.c_char_p, _HANDLES, _BUF],
    "nng_model_load": [_HANDLE, _BUF],
    "nng_hosted_new": [ctypes.c_char_p, _HANDLES, _BUF],
    "nng_run_wanted": [_HANDLE, ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_int32), _BUF],
    "nng_run_feed": [_HANDLE, _POINTERS, _I64, _BUF],
    "nng_run_given": [_HANDLE, _BUF, ctypes.POINTER(_POINTERS), ctypes.POINTER(_I64), _BUF],
    "nng_model_train": [_HANDLE, ctypes.c_int32, _BUF],
    "nng_model_apart": [_HANDLE, ctypes.c_int32, _BUF],
    "nng_model_explain": [_HANDLE, ctypes.c_char_p, _I64, _I64, _BUF, _BUF],
    "nng_model_perform": [_HANDLE, ctypes.c_char_p, _I64, _BUF, _BUF],
    "nng_model_close": [_HANDLE, _BUF],
    "nng_model_describe": [_HANDLE, _BUF, _BUF],
    "nng_model_param": [_HANDLE, ctypes.c_char_p, _POINTERS, _BUF],
    "nng_run_new": [_HANDLE, ctypes.c_char_p, _I64, _POINTERS, _I64, ctypes.c_int32, _HANDLES, _BUF],
    "nng_run_more": [_HANDLE, ctypes.c_char_p, _I64, _POINTERS, _I64, ctypes.c_int32, _BUF],
    "nng_generation_new": [_HANDLE, ctypes.c_char_p, ctypes.c_char_p, _HANDLES, _BUF],
    "nng_generation_step": [_HANDLE, ctypes.c_char_p, _I64, _POINTERS, _I64, ctypes.c_int32, _HANDLES, _BUF],
    "nng_generation_next": [_HANDLE, _BUF, _BUF],
    "nng_generation_scores": [_HANDLE, _POINTERS, _BUF],
    "nng_generation_choose": [_HANDLE, ctypes.c_void_p, _POINTERS, _BUF, _BUF],
    "nng_generation_end": [_HANDLE, ctypes.POINTER(ctypes.c_int32), _I64, ctypes.POINTER(ctypes.c_int32), _BUF],
    "nng_generation_free": [_HANDLE, _BUF],
    "nng_stream_new": [_HANDLE, ctypes.c_int32, _HANDLES, _BUF],
    "nng_stream_step": [_HANDLE, ctypes.POINTER(_I64), _I64, ctypes.c_int32, _BUF, _BUF],
    "nng_stream_free": [_HANDLE, _BUF],
    "nng_graph_text": [ctypes.c_char_p, _I64, ctypes.c_int32, _BUF, _BUF],
    "nng_run_step": [_HANDLE, _I64, ctypes.POINTER(ctypes.c_int32), _BUF],
    "nng_run_results": [_HANDLE, _BUF, ctypes.POINTER(_POINTERS), ctypes.POINTER(_I64), _BUF],
    "nng_run_free": [_HANDLE, _BUF],
}


def directory() -> pathlib.Path:
    """Where the libraries lie: ``_lib`` in the package, or ``$NNSIGHT_GO_LIB``."""
    return pathlib.Path(os.environ.get("NNSIGHT_GO_LIB") or pathlib.Path(__file__).parent / "_lib")


def _load(name: str, loader: type[ctypes.CDLL]) -> ctypes.CDLL:
    path = directory() / name
    if not path.exists():
        raise ModelLoadError(
            f"the engine's library {name} is not in {path.parent}",
            hint="In a source tree run `make build`; else reinstall the package.",
        )
    try:
        return loader(str(path))
    except OSError as e:
        wanted = ".".join(torch.__version__.split(".")[:2])
        raise ModelLoadError(
            f"the engine's library {name} cannot be loaded: {e}",
            hint=f"It must have been built for the torch that is installed (here {wanted}, {torch.__file__}).",
        ) from None


@functools.cache
def lib() -> ctypes.CDLL:
    """``libnnsight_go``, with the functions of models and runs declared.

    Raises ``ModelLoadError`` where it is missing, built for another torch, or of another version.
    """
    library = _load("libnnsight_go.so", ctypes.CDLL)
    try:
        for name, arguments in _CODED.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        for name, plain in {
            "nng_free": [_BUF],
            "nng_tensors_free": [_POINTERS, _I64],
            "nng_tensor_free": [ctypes.c_void_p],
        }.items():
            function = getattr(library, name)
            function.argtypes, function.restype = plain, None
    except AttributeError as e:
        raise ModelLoadError(f"the engine's library lacks a function: {e}", hint="Build it anew.") from None
    out, err = Buf(), Buf()
    library.nng_version(ctypes.byref(out), ctypes.byref(err))
    version = json.loads(ctypes.string_at(out.data, out.size)) if out.data else {}
    library.nng_free(ctypes.byref(out))
    library.nng_free(ctypes.byref(err))
    if version.get("abi") != ABI:
        raise ModelLoadError(
            f"the engine's library speaks ABI {version.get('abi')}, this package speaks {ABI}", hint="Build both anew."
        )
    return library


@functools.cache
def py() -> ctypes.PyDLL:
    """``libnng_py``, declared. Its failures are Python exceptions already."""
    lib()  # brings in nng_aten, which it shares
    library = _load("libnng_py.so", ctypes.PyDLL)
    library.nngpy_unwrap.argtypes, library.nngpy_unwrap.restype = [ctypes.py_object], ctypes.c_void_p
    library.nngpy_wrap.argtypes, library.nngpy_wrap.restype = [ctypes.c_void_p], ctypes.py_object
    library.nngpy_adopt.argtypes = [ctypes.py_object, _POINTERS, ctypes.py_object]
    library.nngpy_adopt.restype = ctypes.c_int
    library.nngpy_calls.argtypes, library.nngpy_calls.restype = [], ctypes.py_object
    library.nngpy_tensor_free.argtypes, library.nngpy_tensor_free.restype = [ctypes.c_void_p], None
    library.nngpy_boundary.argtypes = [ctypes.py_object, ctypes.py_object]
    library.nngpy_boundary.restype = ctypes.py_object
    assert isinstance(library, ctypes.PyDLL)
    return library


@functools.cache
def calls() -> dict[str, Callable[..., Any]]:
    """What every trace calls of ``libnng_py``, as builtins: ``pyobj.h``."""
    found: dict[str, Callable[..., Any]] = py().nngpy_calls()
    return found


def check(function: Any, *args: Any) -> None:
    """Calls a function of ``nng.h``; the error buffer is added. Raises what went wrong."""
    err = Buf()
    try:
        code = function(*args, ctypes.byref(err))
    except SystemError as error:  # Python that the engine called, a backward of the user's, has raised
        err.take()
        raise users(error.__cause__ or error) from None
    if code != OK:
        raise failure(code, err.take())


class Owner:
    """Has a handle of the engine's, and gives it back.

    An interrupt may come between any two lines, after the engine has made something too. So the handle is one of this
    object's before the engine fills it in, and what nobody has freed goes when nobody holds the object any more.
    """

    frees: str  # the function that does
    _handle: ctypes.c_uint64  # 0: none

    def __init__(self) -> None:
        self._handle = ctypes.c_uint64()

    def free(self) -> None:
        """Ends it, finished or not. Calling it again does nothing."""
        if self._handle.value:
            check(getattr(lib(), self.frees), self._handle)
            self._handle.value = 0

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # also one that was freed, and interrupted before it was said so
            Owner.free(self)


def call(function: Any, *args: Any) -> bytes:
    """As ``check``, for functions whose last result is a buffer: gives its bytes."""
    out = Buf()
    check(function, *args, ctypes.byref(out))
    return out.take()


def call_for_array(function: Any, *args: Any) -> bytearray:
    """As ``call``, for bytes that may be a tensor's memory."""
    out = Buf()
    check(function, *args, ctypes.byref(out))
    return out.take_array()


def failure(code: int, text: bytes) -> NnsightError:
    """The exception for a code and the fault beside it."""
    if code == EFORK:
        return ForkError(
            "the engine cannot be used in a forked process: its threads stayed in the parent",
            hint='Start processes with multiprocessing.get_context("spawn"), or open the model in the child.',
        )
    try:
        fault = json.loads(text)
    except ValueError:
        fault = {}
    if code == EHANDLE and not fault:
        return HandleError("a model or run that was closed has been used")
    if not fault:
        return InternalError(f"the engine failed with code {code}: {text.decode(errors='replace')}")
    return from_fault(fault)


def counters() -> dict[str, int]:
    """How many tensors and handles the engine holds now, for tests."""
    out: dict[str, int] = json.loads(call(lib().nng_counters))
    return out


def version() -> dict[str, Any]:
    """Version of library, ABI, torch and Go, and the architectures the engine knows."""
    out: dict[str, Any] = json.loads(call(lib().nng_version))
    return out
