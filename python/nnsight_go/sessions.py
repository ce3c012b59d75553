"""``model.session()``: several traces in which values flow from one to the next without being saved."""

from __future__ import annotations

import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from . import positions, saving
from .errors import InputError
from .positions import here
from .recorder import current

if TYPE_CHECKING:
    from .proxy import Proxy


class _Open(threading.local):
    """The session that this thread is inside of."""

    session: Session | None = None


opened = _Open()


class Session:
    """Traces that share their values: at the end of each, every value that is still in use becomes its tensor.

    Args:
        remote: where its traces run, unless one says otherwise.
    """

    def __init__(self, remote: bool | str | None = None) -> None:
        self.remote = remote

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


def session(remote: bool | str | None = None) -> Session:
    """Several traces in which values flow from one to the next without being saved: ``model.session()``."""
    return Session(remote)


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
