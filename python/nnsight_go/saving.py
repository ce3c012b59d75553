"""``.save()`` and ``.value`` on everything that a block can make: tensors, containers and numbers.

They are mounted on the types themselves, once a process, when the first trace begins. Outside of a
trace, and where a class has attributes of these names of its own, what was there before is used.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from typing import Any, TypeVar

import torch

from . import positions, sessions
from .errors import InputError
from .positions import here
from .recorder import current

T = TypeVar("T")

TYPES = (torch.Tensor, torch.Size, list, dict, tuple, int, float, bool)

_lock = threading.Lock()
_mounted = False


def save(value: T) -> T:
    """Keeps a value of the trace: after the block every proxy in it is its tensor.

    Args:
        value: a proxy, or a list, tuple, dict or number; containers may be filled later in the block.

    Returns:
        The value itself.

    Raises:
        InputError: there is no trace to keep it from.
    """
    rec = current.recorder
    if rec is None and sessions.opened.session is not None:
        return value  # between the traces of a session: what they put in it later becomes real with them
    if rec is None:
        raise InputError(
            "save() keeps values of a trace, and this line stands outside of one",
            hint="Call it inside the block. What was saved there is a plain value afterwards.",
            **positions.fields(here()),
        )
    rec.save(value)
    return value


def mount() -> None:
    """Gives ``save`` and ``value`` to the types."""
    global _mounted
    if _mounted:
        return
    with _lock:
        if not _mounted:
            for cls in TYPES:
                _put(cls, "save", _save_of(cls, cls.__dict__.get("save")))
                _put(cls, "value", property(_value_of(cls, cls.__dict__.get("value")), doc="The value itself."))
            _mounted = True


def _put(cls: type, name: str, attribute: Any) -> None:
    if cls.__flags__ & (1 << 9):  # Py_TPFLAGS_HEAPTYPE: an ordinary class
        setattr(cls, name, attribute)
        return
    # The dictionary behind the read-only view of a built-in type.
    (attributes,) = (d for d in gc.get_referents(cls.__dict__) if isinstance(d, dict))
    attributes[name] = attribute
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(cls))


def _inherited(cls: type, value: Any, name: str, earlier: Any) -> Any:
    """What ``value.name`` was before: an earlier mount's, or that of a class further up. Raises AttributeError."""
    if earlier is not None:
        return earlier.__get__(value, type(value))
    return getattr(super(cls, value), name)


def _save_of(cls: type, earlier: Any) -> Any:
    def save_(self: Any, *args: Any, **kwargs: Any) -> Any:
        if current.recorder is None:
            try:
                former = _inherited(cls, self, "save", earlier)
            except AttributeError:
                return save(self)  # which tells what is wrong
            return former(*args, **kwargs)
        return save(self)

    save_.__name__ = "save"
    save_.__qualname__ = f"{cls.__name__}.save"
    save_.__doc__ = "Keeps the value, and every proxy in it: after the block they are tensors."
    return save_


def _value_of(cls: type, earlier: Any) -> Any:
    def value(self: Any) -> Any:
        try:
            return _inherited(cls, self, "value", earlier)
        except AttributeError:
            return self

    return value
