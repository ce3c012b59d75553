"""Times cases against each other in one process: interleaved A B A B, medians and spread.

Absolute times mean little on a shared machine; the ratio of two medians taken in the same minute does.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one contender: median, first and third quartile, number of rounds."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.median * 1e3:9.2f} ms  ({self.low * 1e3:.2f} to {self.high * 1e3:.2f})"


def interleave(contenders: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = 3) -> dict[str, Timing]:
    """Runs every contender once a round, in turn, and gives the timing of each.

    The order alternates from round to round, so that none always runs after the same neighbour.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(warmup):
        for run in contenders.values():
            run()
    with quiet():
        for i in range(rounds):
            order = list(contenders.items())
            for name, run in order if i % 2 == 0 else reversed(order):
                start = time.perf_counter()
                run()
                samples[name].append(time.perf_counter() - start)
    return {name: summarize(s) for name, s in samples.items()}


def summarize(samples: list[float]) -> Timing:
    if len(samples) < 2:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4)
    return Timing(median, low, high, len(samples))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Python's collector out of the measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def ratio(ours: Timing, theirs: Timing) -> str:
    return f"{ours.median / theirs.median:.2f}x"
