"""How a remote job goes, on one line: on the terminal, or below a notebook's cell."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

from ..config import CONFIG

# A job that has ended by then is not shown.
QUICK = 0.5


class Display:
    """A line that is written again and again, and is gone at the end.

    Attributes:
        shown: whether there is somebody to see it.
    """

    def __init__(self) -> None:
        self._handle = _notebook() if CONFIG.APP.REMOTE_LOGGING else None
        self._terminal = self._handle is None and bool(getattr(sys.stderr, "isatty", bool)())
        self.shown = bool(CONFIG.APP.REMOTE_LOGGING and (self._handle is not None or self._terminal))
        self._start, self._width = time.monotonic(), 0

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._width:
            self._write("")

    def update(self, job: dict[str, Any]) -> None:
        """Shows what is known of a job now."""
        seconds = time.monotonic() - self._start
        if self.shown and seconds >= QUICK:
            self._write(line(job, seconds))

    def _write(self, text: str) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": text}, raw=True)
        else:
            sys.stderr.write(f"\r{text.ljust(self._width)}" + ("" if text else "\r"))
            sys.stderr.flush()
        self._width = len(text)


def line(job: dict[str, Any], seconds: float) -> str:
    """What is shown of a job."""
    position = job.get("position")
    ahead = f", {position} before it" if position and job.get("state") == "QUEUED" else ""
    return f"job {str(job.get('id', ''))[:8]}: {str(job.get('state', '?')).lower()}{ahead}, {seconds:.0f} s"


def _notebook() -> Any:
    """A place below the cell that runs, in a notebook; None elsewhere."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    display: Any = importlib.import_module("IPython.display").display
    return display({"text/plain": ""}, raw=True, display_id=True)
