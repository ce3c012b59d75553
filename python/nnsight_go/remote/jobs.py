"""Jobs that nobody waits for: ``model.trace(prompt, remote=True, blocking=False)``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CancelledError, NnsightError
from ..native import become
from . import messages
from .server import FINAL, Server

if TYPE_CHECKING:
    from ..proxy import Proxy


class Job:
    """A trace that a server runs: ``tracer.job``, or by its id, in whatever process.

    Args:
        id: of the job.
        host: the server, ``https://...``; by default ``CONFIG.API.HOST``.
        key: the key that it was submitted with; by default ``CONFIG.API.APIKEY``.

    Raises:
        InputError: no server is known.
    """

    def __init__(self, id: str, host: str | None = None, key: str | None = None) -> None:
        self._start(id, Server(host, key), (), torch.device("cpu"))

    def _start(self, id: str, server: Server, adopt: Sequence[Proxy], device: torch.device) -> None:
        self.id, self._server = id, server
        self._adopt, self._device = list(adopt), device
        self._which: Sequence[int] | None = None  # of its values the program has saved
        self._lock = threading.Lock()
        self._values: list[torch.Tensor] | None = None
        self._read: Callable[[messages.Answer], list[torch.Tensor]] | None = None  # of a generation
        self._error: NnsightError | None = None
        self._when_done: list[Callable[[], None]] = []
        self._when_failed: list[Callable[[NnsightError], None]] = []

    @classmethod
    def _submitted(cls, id: str, server: Server, adopt: Sequence[Proxy], device: torch.device) -> Job:
        """One that was submitted by this process."""
        job = cls.__new__(cls)
        job._start(id, server, adopt, device)
        return job

    def __repr__(self) -> str:
        return f"<Job {self.id} on {self._server.host}>"

    @property
    def host(self) -> str:
        """The server."""
        return self._server.host

    @property
    def about(self) -> dict[str, Any]:
        """What the server says of it: ``id``, ``model``, ``state``, ``position`` in the queue, ``created``, ..."""
        return self._server.about(self.id)

    @property
    def status(self) -> str:
        """``"RECEIVED"``, ``"QUEUED"``, ``"RUNNING"``, ``"COMPLETED"``, ``"ERROR"`` or ``"CANCELLED"``."""
        return str(self.about.get("state", ""))

    @property
    def log(self) -> list[str]:
        """What the server's workers say of it, a line each: when it began, how it ended, with how many."""
        return [f"{line['time'][:19]}Z {line['text']}" for line in self.about.get("log", [])]

    @property
    def done(self) -> bool:
        """Whether nothing more happens to it."""
        return self._values is not None or self._error is not None or self.status in FINAL

    def result(self, timeout: float | None = None) -> list[torch.Tensor]:
        """Waits for the saved values, and gives them in the order in which they were saved.

        In the process that submitted it, what the block has saved is tensors from then on. It may be asked again.

        Args:
            timeout: for how many seconds it waits at most.

        Raises:
            TimeoutError: it has not ended by then.
            CancelledError: it was cancelled.
            NnsightError: it failed, with the line that did where that is known; or the server cannot be reached.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._values is None:
                try:
                    self._fill(self._server.wait(self.id, timeout))
                except CancelledError as error:
                    self._fail(error)
                    raise
                except NnsightError as error:
                    if error.late or self._ended():
                        self._fail(error)
                    raise
            assert self._values is not None
            return self._values

    def _ended(self) -> bool:
        try:
            return self.status in FINAL
        except NnsightError:
            return False

    def _fill(self, data: bytearray) -> None:
        answer = messages.Answer(data, self._device)
        if self._read is not None:
            self._values = self._read(answer)
        else:
            values = answer.all_results()
            adopt, self._adopt = self._adopt, []
            if adopt:
                become(adopt, values)
                values = list(adopt)
            self._values = values if self._which is None else [values[i] for i in self._which]
        for act in self._when_done:
            act()
        self._when_done, self._when_failed = [], []

    def _fail(self, error: NnsightError) -> None:
        self._error, self._adopt = error, []
        for act in self._when_failed:
            act(error)
        self._when_done, self._when_failed = [], []

    def _reads(
        self, read: Callable[[messages.Answer], list[torch.Tensor]], failed: Callable[[NnsightError], None]
    ) -> None:
        """Notes who makes values of what comes, and what is to be done if nothing ever will."""
        self._read = read
        self._when_failed.append(failed)

    def _then(self, which: Sequence[int], done: Callable[[], None], failed: Callable[[NnsightError], None]) -> None:
        """Notes what is to be done once the values are there, or will never be."""
        self._which = which
        self._when_done.append(done)
        self._when_failed.append(failed)

    def __await__(self) -> Generator[Any, None, list[torch.Tensor]]:
        return asyncio.to_thread(self.result).__await__()

    def cancel(self) -> None:
        """Stops it, if it has not ended."""
        self._server.cancel(self.id)
