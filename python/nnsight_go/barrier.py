"""``tracer.barrier(n)``: a meeting point of invokes.

Values flow from earlier invokes to later ones without it; programs that mark the point where one waits
for another keep their meaning, and a barrier that not everyone reaches is still an error.
"""

from __future__ import annotations

import collections
from collections.abc import Callable

from . import positions
from .errors import InputError
from .positions import here


class Barrier:
    """A barrier of ``n`` invokes: each calls it once, at the point where it would wait for the others."""

    def __init__(self, invoke: Callable[[], int], at_end: list[Callable[[], None]], n: int) -> None:
        """Makes one.

        Args:
            invoke: gives the number of the invoke that is open, or a negative one.
            at_end: what is done at the end of the block, which gains a check of this barrier.
            n: how many invokes meet.
        """
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise InputError(
                f"a barrier is for a number of invokes, not {n!r}",
                hint="Give how many invokes meet there: tracer.barrier(2).",
                **positions.fields(here()),
            )
        self._invoke, self._n, self._place = invoke, n, here()
        self._reached: collections.Counter[int] = collections.Counter()  # how often, by invoke
        at_end.append(self._check)

    def __call__(self) -> None:
        """Says that this invoke has come to the barrier."""
        invoke = self._invoke()
        if invoke < 0:
            raise InputError(
                "a barrier is reached by an invoke, and this line stands outside of every invoke",
                hint="Call it inside `with tracer.invoke(...):`.",
                **positions.fields(here()),
            )
        self._reached[invoke] += 1

    def _check(self) -> None:
        # it opens when n have come, and nobody comes twice before it does
        total = self._reached.total()
        rounds, rest = divmod(total, self._n)
        if rest == 0 and all(times <= rounds for times in self._reached.values()):
            return
        who = ", ".join(f"{times} times by invoke {i}" for i, times in sorted(self._reached.items()))
        raise InputError(
            f"this barrier is for {self._n} invokes, and was reached {who}".replace(" 1 times", " once"),
            hint="Give it the number of invokes that call it.",
            **positions.fields(self._place),
        )
