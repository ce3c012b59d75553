"""What a part of the benchmark gives: rows that compare two ways, and curves over a size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from .harness import Timing
from .install import Library

Tensors = list[torch.Tensor]
# Of the largest value: float32 differs by the order of sums, bfloat16 by where values are rounded.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one way: the median of its runs, the least and the most."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median / 2**20:.0f} MiB ({self.low / 2**20:.0f} to {self.high / 2**20:.0f})"


Measured = Timing | Memory


@dataclasses.dataclass(frozen=True)
class Row:
    """Ours against another way. `theirs` is None where that way could not be had; the note says why."""

    case: str
    ours: Measured
    against: str
    theirs: Measured | None
    target: float | None = None  # the ratio is to be at most this
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """None where there is nothing to compare: what a way adds may drown in the noise, and seem negative."""
        if self.theirs is None or self.theirs.median <= 0 or self.ours.median <= 0:
            return None
        return self.ours.median / self.theirs.median

    @property
    def met(self) -> bool | None:
        """None where there is no target, or nothing to hold to it."""
        return None if self.target is None or self.ratio is None else self.ratio <= self.target

    def as_json(self) -> dict:
        return {**dataclasses.asdict(self), "ratio": self.ratio, "met": self.met}


@dataclasses.dataclass(frozen=True)
class Curve:
    """Medians, in seconds, of several ways at several sizes."""

    title: str
    size: str  # what is counted along the axis
    points: dict[str, dict[int, Timing]]  # by way, by size

    def as_json(self) -> dict:
        return dataclasses.asdict(self)


def against(
    case: str, ours: Timing, library: Library, theirs: Timing | None, target: float | None = None, note: str = ""
) -> Row:
    """A row against a library, which may be missing."""
    why = f"not installed: {library.missing}" if theirs is None else ""
    return Row(case, ours, library.label, theirs, target, "; ".join(filter(None, (note, why))))


def agree(ways: Mapping[str, Callable[[], Tensors]], dtype: torch.dtype = torch.float32) -> float:
    """The largest relative difference between the first way and the others. AssertionError where it is too large."""
    results = {name: run() for name, run in ways.items()}
    (first, expected), *others = results.items()
    worst = 0.0
    for name, values in others:
        assert [v.shape for v in values] == [v.shape for v in expected], f"{name} gives other shapes than {first}"
        for value, wanted in zip(values, expected, strict=True):
            scale = wanted.float().abs().max().item() or 1.0
            worst = max(worst, (value.float() - wanted.float()).abs().max().item() / scale)
            assert worst <= TOLERANCE[dtype], f"{name} and {first} differ by {worst:.1e} of the largest value"
    return worst
