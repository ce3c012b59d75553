"""``tracer.iter``: the steps of a trace. A trace runs the model once, so it has one: step 0."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType

from . import positions
from .errors import InputError
from .positions import here


class Steps:
    """``tracer.iter[:]``, ``tracer.iter[0]``, ``tracer.iter[[0, 2]]``: steps by number."""

    def __getitem__(self, which: int | slice | list[int]) -> Chosen:
        if isinstance(which, slice):
            return Chosen(0 in range(which.start or 0, 1 if which.stop is None else which.stop, which.step or 1))
        return Chosen(which == 0 if isinstance(which, int) else 0 in which)


class Chosen:
    """Steps to go through: ``for step in tracer.iter[:]:``. Steps that the trace does not have are left out."""

    def __init__(self, first: bool) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        return iter([0] if self._first else [])

    def __enter__(self) -> int:
        if not self._first:
            raise InputError(
                "this trace runs the model once, and has none of these steps",
                hint="Its step is 0. `for step in tracer.iter[...]:` leaves out steps that do not happen.",
                **positions.fields(here()),
            )
        return 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
