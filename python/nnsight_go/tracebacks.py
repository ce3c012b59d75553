"""Tracebacks that end in the user's own line.

What a user calls is entered through a boundary (``pybind/boundary.h``) that leaves no frame of this
package in an error's traceback. An error of an operation that ran later than it was written shows the
line that wrote it, as if it had been raised there. ``NNSIGHT_GO_TRACEBACK=full`` shows all
frames, and so does ``CONFIG.APP.DEBUG``.
"""

from __future__ import annotations

import os
import threading
import types
from typing import Any

from . import _ffi, structures
from .config import CONFIG
from .errors import InternalError, NnsightError

# By class: what a user calls, sets or reads.
_ENTRANCES: dict[str, dict[str, list[str]]] = {
    "envoy": {
        "Envoy": [
            "output", "input", "inputs", "__call__", "skip", "get", "__getattr__", "__setattr__", "__getitem__",
        ]
    },
    "inside": {"Source": ["__getattr__"]},
    "edits": {"Editing": ["__enter__", "__exit__"]},
    "graphs": {"Graph": ["save", "load", "run"]},
    "model": {"LanguageModel": ["__init__", "trace", "scan", "session", "tokenizer"]},
    "proxy": {
        "Proxy": [
            "__torch_function__", "__getitem__", "__setitem__", "backward", "save", "value", "shape", "dtype", "ndim",
            "device", "__len__",
            "__iter__", "__format__", "__deepcopy__", "__reduce_ex__",
        ]
    },
    "structures": {
        "Items": ["__getitem__", "__setitem__", "__getattr__", "__add__", "__radd__", *structures.ARITHMETIC],
        "Fields": ["__getitem__", "__setitem__", "__getattr__", "__setattr__"],
    },
    "torchmap": {"Mode": ["__torch_function__"]},
    "barrier": {"Barrier": ["__call__"]},
    "cache": {"Cache": ["__getattr__", "__missing__"], "View": ["__getattr__", "__getitem__"]},
    "sessions": {"Session": ["__enter__"]},
    "tracing": {
        "Tracer": ["__enter__", "__exit__", "invoke", "stop", "barrier", "cache", "result", "__getattr__"],
        "Invoker": ["__enter__", "__exit__"],
    },
    "wrapping": {"NNsight": ["trace"]},
}  # fmt: skip

_lock = threading.Lock()
_installed = False


def install() -> None:
    """Readies builtins, and puts boundaries around what a user calls, once a process."""
    global _installed
    if _installed:
        return
    with _lock:
        if _installed:
            return
        import importlib

        from . import quick

        twins = quick.twins()
        full = os.environ.get("NNSIGHT_GO_TRACEBACK") == "full"
        for module, classes in _ENTRANCES.items() if not full else ():
            for cls, names in classes.items():
                for name in names:
                    _enter(getattr(importlib.import_module(f"{__package__}.{module}"), cls), name, twins)
        _installed = True


def _enter(cls: type, name: str, twins: dict[Any, Any]) -> None:
    attribute = cls.__dict__[name]
    if isinstance(attribute, property):
        get, put = (part and _boundary(twins.get(part, part)) for part in (attribute.fget, attribute.fset))
        setattr(cls, name, property(get, put, None, attribute.__doc__))
    elif isinstance(attribute, classmethod | staticmethod):
        setattr(cls, name, type(attribute)(_boundary(attribute.__func__)))
    else:
        setattr(cls, name, _boundary(twins.get(attribute, attribute)))


def _boundary(function: Any) -> Any:
    return _ffi.py().nngpy_boundary(function, cut)


def cut(error: BaseException) -> types.TracebackType | None:
    """The traceback that an error goes on with as it leaves this package."""
    traceback = error.__traceback__
    if CONFIG.APP.DEBUG:
        return traceback
    if isinstance(error, NnsightError) and not isinstance(error, InternalError):
        error.__suppress_context__ = True
        if error.file and error.late:
            return _at(error.file, error.line or 1, error.func or "<module>")
        return None
    if "_nng_users" in error.__dict__:
        return _without_ours(traceback)
    return traceback  # not expected: a bug, whose frames are wanted


def _without_ours(traceback: types.TracebackType | None) -> types.TracebackType | None:
    """The frames of a traceback that lie outside of this package."""
    if traceback is None:
        return None
    rest = _without_ours(traceback.tb_next)
    if traceback.tb_frame.f_code.co_filename.startswith(_OURS):
        return rest
    return types.TracebackType(rest, traceback.tb_frame, traceback.tb_lasti, traceback.tb_lineno)


_OURS = os.path.dirname(__file__) + os.sep


def _at(file: str, line: int, function: str) -> types.TracebackType | None:
    """A traceback of one frame, at a line that was left long ago."""
    code = compile("raise LookupError", file, "exec").replace(co_name=function, co_qualname=function)
    try:
        exec(code, {"__name__": "__main__", "__builtins__": {"LookupError": LookupError}})
    except LookupError as e:
        assert e.__traceback__ is not None and e.__traceback__.tb_next is not None
        frame = e.__traceback__.tb_next.tb_frame
        return types.TracebackType(None, frame, -1, line)  # -1: no columns, which are not known
    return None
