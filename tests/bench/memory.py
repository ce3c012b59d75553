"""Peak memory of one job, measured in a process of its own.

What counts is memory that only this process can use: anonymous pages and private copies, sampled
while the job runs. Mapped weights that the page cache shares are told apart from it.
"""

from __future__ import annotations

import pathlib
import threading
import time

_FIELDS = ("Anonymous", "Private_Dirty", "Rss")


def usage() -> dict[str, int]:
    """Bytes of this process now, by kind."""
    text = pathlib.Path("/proc/self/smaps_rollup").read_text()
    values = dict.fromkeys(_FIELDS, 0)
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name in values:
            values[name] = int(rest.split()[0]) * 1024
    return values


class Peak:
    """Samples memory from a thread while a job runs: `with Peak() as p: job()`, then p.bytes."""

    def __init__(self, interval: float = 0.002) -> None:
        self.bytes = dict.fromkeys(_FIELDS, 0)
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _sample(self) -> None:
        for name, value in usage().items():
            self.bytes[name] = max(self.bytes[name], value)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._sample()
            time.sleep(self._interval)

    def __enter__(self) -> Peak:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._sample()
        self._stop.set()
        self._thread.join()
