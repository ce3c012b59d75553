"""``tracer.barrier(n)``: a meeting point of invokes.

Values flow from earlier invokes to later ones without it; programs that mark the point where one waits
for another keep their meaning, and a barrier that not everyone reaches is still an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import positions
from .errors import InputError
from .positions import here

if TYPE_CHECKING:
    from .recorder import Recorder


class Barrier:
    """A barrier of ``n`` invokes: each calls it once, at the point where it would wait for the others."""

    def __init__(self, recorder: Recorder, n: int) -> None:
        if not isinstance(n, int) or n < 1:
            raise InputError(
                f"a barrier is for a number of invokes, not {n!r}",
                hint="Give how many invokes meet there: tracer.barrier(2).",
                **positions.fields(here()),
            )
        self._recorder, self._n, self._place = recorder, n, here()
        self._reached: list[int] = []
        recorder.at_end.append(self._check)

    def __call__(self) -> None:
        """Says that this invoke has come to the barrier."""
        if self._recorder.invoke < 0:
            raise InputError(
                "a barrier is reached by an invoke, and this line stands outside of every invoke",
                hint="Call it inside `with tracer.invoke(...):`.",
                **positions.fields(here()),
            )
        self._reached.append(self._recorder.invoke)

    def _check(self) -> None:
        if len(self._reached) % self._n == 0:
            return
        who = ", ".join(map(str, sorted(set(self._reached))))
        raise InputError(
            f"this barrier is for {self._n} invokes, and was reached {len(self._reached)} times (by invoke {who})",
            hint="Give it the number of invokes that call it.",
            **positions.fields(self._place),
        )
