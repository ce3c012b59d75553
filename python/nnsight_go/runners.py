"""Where recordings run: what a recorder asks of the engine, or of a server that stands in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from .proxy import Proxy
    from .remote.jobs import Job

Rows = list[list[int]]


class Drawn(NamedTuple):
    """What a step gave.

    Attributes:
        tokens: one a row.
        done: whether it was the last step.
        rows: in a beam search all tokens of its beams, or at the end of what it found.
    """

    tokens: list[int]
    done: bool
    rows: Rows | None = None


class Wants(NamedTuple):
    """What a program has to do with the tokens of a generation's steps.

    Attributes:
        scores: it changes the scores that they are drawn from.
        left: it keeps what the filters left of them.
    """

    scores: bool = False
    left: bool = False


class Running(Protocol):
    """A trace, or a step of a generation, on its way."""

    def more(self, graph: bytes, constants: Sequence[torch.Tensor], end: bool) -> None:
        """Adds what the program says next: a graph whose nodes, invokes and positions are numbered on."""

    def results(self, adopt: Sequence[Proxy] | None) -> list[torch.Tensor]:
        """The values that were asked for last, or, with ``adopt``, nothing: these proxies become them."""

    def free(self) -> None:
        """Ends it, finished or not."""


class Continuing(Protocol):
    """A generation on its way.

    Attributes:
        together: how many steps it takes at once, where nothing happens here between them.
    """

    together: int

    def gather(self) -> None:
        """Has the runs of the steps that follow wait for ``flush``; only what takes several at once is asked."""

    def flush(self) -> int:
        """Does all of them, and tells how many happened; then ``next`` gives the tokens of one after the other."""

    def step(self, graph: bytes, constants: list[torch.Tensor], end: bool) -> Running:
        """Starts the run of the next step."""

    def next(self, left: bool = False) -> tuple[Drawn, torch.Tensor | None]:
        """Draws the tokens of the step that is done; with ``left`` also gives what the filters left of its scores."""

    def scores(self) -> torch.Tensor:
        """The scores of the step that is done, to be changed: the first half of ``next``."""

    def choose(self, scores: torch.Tensor) -> tuple[Drawn, torch.Tensor]:
        """The second half of ``next``: draws from scores, and gives what the filters left of them as well."""

    def end(self, rows: list[bool]) -> bool:
        """Ends rows, and tells whether all have ended."""

    def free(self) -> None:
        """Gives the memory back."""


class Runner(Protocol):
    """Where recordings run: a model here, or one elsewhere."""

    @property
    def job(self) -> Job | None:
        """What the trace that ended last waits for, where its values are not there yet."""

    def begin(self, graph: bytes, constants: Sequence[torch.Tensor], end: bool) -> Running:
        """Starts a run of a graph in wire form; ``end``: nothing will be added to it."""

    def generation(self, rows: Rows, masks: Rows | None, settings: dict[str, Any], wants: Wants) -> Continuing:
        """Begins to generate."""
