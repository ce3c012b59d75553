"""The errors of the package.

Each is also the built-in exception a person expects (``ModulePathError`` is an ``AttributeError``),
and carries what is known about its place as attributes.
"""

from __future__ import annotations

import linecache
import re
from typing import Any


class NnsightError(Exception):
    """Base of all errors of this package.

    Attributes (``None`` where unknown): ``path`` module path, ``op`` operator, ``node`` node of the
    recorded graph, ``invoke`` number of the invoke, ``step`` generation step, ``file``, ``line`` and
    ``func`` the user's line, ``other_file`` and ``other_line`` a second line the message speaks of,
    ``cause`` what lies beneath, ``hint`` what to do.
    """

    path: str | None = None
    op: str | None = None
    node: int | None = None
    invoke: int | None = None
    step: int | None = None
    file: str | None = None
    line: int | None = None
    func: str | None = None
    other_file: str | None = None
    other_line: int | None = None
    cause: str | None = None
    hint: str | None = None
    late = False  # raised after the line it names had been left: operations run later than they are written

    def __init__(self, message: str = "", **fields: Any) -> None:
        self.message = message
        super().__init__(message)
        for name, value in fields.items():
            if name not in _FIELDS:
                raise TypeError(f"{type(self).__name__} has no field {name!r}")
            setattr(self, name, value)

    def __str__(self) -> str:
        lines = [self.message]
        for label, value in (("module", self.path), ("op", self.op)):
            if value:
                lines.append(f"  {label}: {value}")
        if self.invoke:
            lines.append(f"  invoke: {self.invoke}")
        if self.step and self.step > 0:
            lines.append(f"  step: {self.step}")
        lines += _source("your line", self.file, self.line)
        lines += _source("earlier line", self.other_file, self.other_line)
        if self.cause:
            lines.append(f"  cause: {self.cause}")
        if self.hint:
            lines.append(f"  {self.hint}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: value for name in _FIELDS if (value := getattr(self, name)) is not None}
        return _rebuild, (type(self), self.message, fields)


_FIELDS = tuple(name for name in NnsightError.__annotations__)


def _rebuild(cls: type[NnsightError], message: str, fields: dict[str, Any]) -> NnsightError:
    return cls(message, **fields)


def _source(label: str, file: str | None, line: int | None) -> list[str]:
    """Two lines that show a place: file and number, then the source text where it can be read."""
    if not file:
        return []
    out = [f"  {label}: {file}:{line}"]
    text = linecache.getline(file, line or 0).strip()
    if text:
        out.append(f"      {text}")
    return out


def users(error: BaseException) -> BaseException:
    """Marks an error that a user's own operation raised in here: its traceback needs no frames of ours."""
    error.__dict__["_nng_users"] = True
    return error


class NotSavedError(NnsightError, ValueError):
    """A value of a trace was used after the block without having been saved."""


class OutOfOrderError(NnsightError, ValueError):
    """A module that had already run was written to."""


class ModulePathError(NnsightError, AttributeError):
    """There is no module, access point or field of that name."""


class OpError(NnsightError, RuntimeError):
    """An operation of the trace failed. It is an ``IndexError`` too where PyTorch raises one."""

    def __new__(cls, message: str = "", **fields: Any) -> OpError:
        """One that is an ``IndexError`` too where the message is of an index."""
        kind = OpIndexError if cls is OpError and re.match(_INDEX_ERRORS, message) else cls
        return super().__new__(kind, message)


class OpIndexError(OpError, IndexError):
    """An operation of the trace was given an index that is out of range."""


class GradientError(NnsightError, RuntimeError):
    """A gradient was asked for that cannot exist."""


# How messages begin for which PyTorch raises IndexError.
_INDEX_ERRORS = r"(\w+\(\): )?index -?\d+ (is out of bounds|out of range)|Dimension out of range|too many indices"


class ModelLoadError(NnsightError, OSError):
    """A model could not be found or opened."""


class InputError(NnsightError, ValueError):
    """An input of a trace cannot be used."""


class RemoteError(NnsightError, RuntimeError):
    """A server could not be reached or refused."""


class CancelledError(NnsightError, RuntimeError):
    """A run was cancelled."""


class GraphError(NnsightError, ValueError):
    """A recorded graph is not well formed."""


class TokenizerError(NnsightError, ValueError):
    """Text or ids could not be tokenized, or a tokenizer not be opened."""


class HandleError(NnsightError, RuntimeError):
    """Something that was already closed was used."""


class ForkError(HandleError):
    """The engine was used in a process forked from the one that loaded it."""


class StepLoopError(NnsightError, RuntimeError):
    """The body of a step loop cannot be replayed."""


class InternalError(NnsightError, RuntimeError):
    """A bug in this package."""


CLASSES: dict[str, type[NnsightError]] = {
    cls.__name__: cls
    for cls in (
        NotSavedError,
        OutOfOrderError,
        ModulePathError,
        OpError,
        GradientError,
        ModelLoadError,
        InputError,
        RemoteError,
        CancelledError,
        GraphError,
        TokenizerError,
        HandleError,
        StepLoopError,
        InternalError,
    )
}


def from_fault(fault: dict[str, Any]) -> NnsightError:
    """Makes the exception that a fault of the engine describes (its JSON form: ``nng.h``)."""
    cls = CLASSES.get(fault.get("code", ""), InternalError)
    fields = {k: v for k, v in fault.items() if k in _FIELDS and v not in (None, "", -1)}
    error = cls(fault.get("message", "the engine failed without saying why"), **fields)
    error.late = error.file is not None
    return error
