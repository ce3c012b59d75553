"""Times cases against each other in one process: interleaved, medians and spread.

Absolute times mean little on a shared machine; the ratio of two medians taken in the same minute does.
A slow case gets fewer rounds, so that a whole run ends.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

WARMUP = 6  # runs before the first that counts: the engine may pack weights after some
LEAST = 3  # rounds of the slowest case
SECONDS = 12.0  # that the rounds of one case may take, and those before them, if they are more than LEAST


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one contender: median, first and third quartile, number of rounds."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        scale, unit = (1e3, "ms") if self.median >= 1e-3 else (1e6, "us")
        return f"{self.median * scale:.2f} {unit} ({self.low * scale:.2f} to {self.high * scale:.2f})"


def interleave(
    contenders: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = WARMUP
) -> dict[str, Timing]:
    """Runs every contender once a round, in turn, and gives the timing of each."""
    return {name: summarize(taken) for name, taken in samples(contenders, rounds, warmup).items()}


def added(
    bare: Callable[[], object], contenders: dict[str, Callable[[], object]], rounds: int = 15, warmup: int = WARMUP
) -> tuple[Timing, dict[str, Timing]]:
    """The timing of a bare run, and what each contender takes beyond it.

    The differences are taken within a round, in which the machine is about equally slow for both.
    """
    taken = samples({"": bare, **contenders}, rounds, warmup)
    base = taken.pop("")
    beyond = {name: [a - b for a, b in zip(times, base, strict=True)] for name, times in taken.items()}
    return summarize(base), {name: summarize(times) for name, times in beyond.items()}


def samples(contenders: dict[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of every contender, one of each round.

    The order is drawn anew for every round, so that none always runs after the same neighbour or, at the
    end of one round and the beginning of the next, after itself: caches are warm then, which shows in microseconds.
    """
    draw = random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    last, until = 0.0, time.perf_counter() + SECONDS
    for i in range(warmup):
        last = sum(seconds(run) for run in contenders.values())
        if i + 1 >= LEAST and time.perf_counter() > until:
            break
    with quiet():
        for _ in range(min(rounds, max(LEAST, int(SECONDS / last)))):
            for name, run in draw.sample(list(contenders.items()), len(contenders)):
                taken[name].append(seconds(run))
    return taken


def seconds(run: Callable[[], object]) -> float:
    """What one run takes, to the end of what it has put on a GPU."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def summarize(taken: list[float]) -> Timing:
    if len(taken) < 2:
        return Timing(taken[0], taken[0], taken[0], 1)
    low, median, high = statistics.quantiles(taken, n=4, method="inclusive")
    return Timing(median, low, high, len(taken))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Python's collector out of the measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
