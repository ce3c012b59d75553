"""``model.session()``: several traces in which values flow from one to the next without being saved."""

from __future__ import annotations

import contextlib
import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from . import positions, saving
from .errors import InputError, NnsightError
from .positions import here
from .recorder import current

if TYPE_CHECKING:
    from .proxy import Proxy
    from .recorder import Recorder
    from .remote.gathering import Gathered
    from .remote.jobs import Job


class _Open(threading.local):
    """The session that this thread is inside of."""

    session: Session | None = None


opened = _Open()


class Session:
    """Traces that share their values: at the end of each, every value that is still in use becomes its tensor.

    Traces of a session that run on a server are one job, which is done when the session ends, or when a line needs one
    of their values.

    Args:
        remote: where its traces run, unless one says otherwise.
        blocking: wait for the values of such a job at the end.

    Attributes:
        job: that of the session, where nobody waits for it.
    """

    job: Job | None = None

    def __init__(self, remote: bool | str | None = None, blocking: bool = True) -> None:
        self.remote, self._blocking = remote, blocking
        self._gathered: Gathered | None = None  # the traces that wait

    def __enter__(self) -> Session:
        if opened.session is not None:
            self._refuse("a session cannot begin inside another one", "Put its traces into the one that is open.")
        if current.recorder is not None:
            self._refuse("a session cannot begin inside a trace", "Open it around the trace.")
        saving.mount()
        opened.session = self
        return self

    def _refuse(self, message: str, hint: str) -> NoReturn:
        raise InputError(message, hint=hint, **positions.fields(here()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        opened.session = None
        if self._gathered is None:
            return
        if kind is not None and self._blocking and issubclass(kind, Exception):
            with contextlib.suppress(NnsightError):  # the error that came goes on; what ended before it has its values
                self._gathered.flush()
        elif kind is not None:
            self._gathered.abandon(f"its session was left by {kind.__name__}")
        elif self._blocking:
            self._gathered.flush()
        else:
            self.job = self._gathered.submit()

    def begins(self, rec: Recorder) -> None:
        """Notes that a trace begins: it waits with those that have ended, where it can, or they are done now."""
        from .remote.gathering import Gathered
        from .remote.runs import Remote

        rec.living = Living()
        if not rec.plain or not isinstance(rec.runner, Remote):
            self.flush()
            return
        if self._gathered is None or not self._gathered.goes_with(rec.runner):
            self.flush()
            self._gathered = Gathered(rec.runner)
        rec.runner.session = self
        rec.gather(self._gathered)

    def flush(self) -> None:
        """Has the traces done that wait."""
        if self._gathered is not None:
            self._gathered.flush()


def flush() -> None:
    """Has the traces done that wait in the session of this thread, before something that is none of them begins."""
    if opened.session is not None:
        opened.session.flush()


def session(remote: bool | str | None = None, blocking: bool = True) -> Session:
    """Several traces in which values flow from one to the next without being saved: ``model.session()``."""
    return Session(remote, blocking)


class Living:
    """The proxies of a recording that are still in use somewhere."""

    def __init__(self) -> None:
        self._all: list[weakref.ref[Proxy]] = []

    def add(self, proxy: Proxy) -> None:
        """Notes a new proxy."""
        self._all.append(weakref.ref(proxy))

    def now(self) -> list[Proxy]:
        """Those that somebody holds."""
        return [proxy for ref in self._all if (proxy := ref()) is not None]
