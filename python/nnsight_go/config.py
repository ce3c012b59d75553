"""``CONFIG``: settings that last longer than a call.

A setting is what the program has made it; else what the environment says (``NNSIGHT_GO_HOST``,
``NNSIGHT_GO_API_KEY``); else what stands in the user's file, ``~/.config/nnsight-go/config.json``, which
``CONFIG.save()`` and ``CONFIG.set_default_api_key(key)`` write; else its default. Environment and file are
read when a setting is asked for.

``CONFIG.APP.DEBUG = True`` shows whole tracebacks, with the frames of this package. ``PYMOUNT``,
``CROSS_INVOKER``, ``TRACE_CACHING``, ``CACHE_DIR`` and ``DISABLE_CPP_BACKTRACE`` are kept for those who read
them again, and have no effect: ``.save()`` is always there, and values always flow from one invoke to a later one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, overload

T = TypeVar("T")


def path() -> Path:
    """The user's file, whether it is there or not."""
    return _path(os.environ.get("XDG_CONFIG_HOME"), os.environ.get("HOME"))


@functools.lru_cache(maxsize=1)
def _path(*_: str | None) -> Path:
    import platformdirs

    return platformdirs.user_config_path("nnsight-go") / "config.json"


def _stored() -> dict[str, dict[str, Any]]:
    """What the user's file says; nothing where it is not there or makes no sense."""
    where = path()
    try:
        now = where.stat()
    except OSError:
        return {}
    return _read(where, now.st_ino, now.st_mtime_ns, now.st_size)


@functools.lru_cache(maxsize=1)
def _read(where: Path, *_: int) -> dict[str, dict[str, Any]]:
    """What a file says, read once for each version of it."""
    try:
        found = json.loads(where.read_text())
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, dict)} if isinstance(found, dict) else {}


class _Setting(Generic[T]):
    """One setting, as an attribute of its group."""

    def __init__(self, default: T, variable: str = "", secret: bool = False) -> None:
        self._default, self._variable, self.secret = default, variable, secret

    def __set_name__(self, owner: type[_Group], name: str) -> None:
        self._name = name
        owner.known = {**owner.known, name: self}

    @overload
    def __get__(self, group: None, owner: type[_Group]) -> _Setting[T]: ...

    @overload
    def __get__(self, group: _Group, owner: type[_Group]) -> T: ...

    def __get__(self, group: _Group | None, owner: type[_Group]) -> T | _Setting[T]:
        if group is None:
            return self
        if self._name in group.given:
            found: T = group.given[self._name]
            return found
        if self._variable and (text := os.environ.get(self._variable)):
            return text  # type: ignore[return-value]
        stored = _stored().get(group.title, {}).get(self._name, self._default)
        fits = self._default is None or isinstance(stored, type(self._default))
        return stored if fits else self._default

    def __set__(self, group: _Group, value: T) -> None:
        group.given[self._name] = value


class _Group:
    """Settings that belong together.

    Attributes:
        given: what the program has set.
    """

    __slots__ = ("given",)
    title: ClassVar[str]
    known: ClassVar[dict[str, _Setting[Any]]] = {}

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def __repr__(self) -> str:
        shown = (f"{n}={getattr(self, n)!r}" for n, setting in self.known.items() if not setting.secret)
        return f"{type(self).__name__}({', '.join(shown)})"


class Api(_Group):
    """Settings of remote traces.

    Attributes:
        HOST: the server that ``remote=True`` means, ``https://...``.
        APIKEY: what it knows the user by. It is shown nowhere.
        COMPRESS: whether requests and responses are compressed; None: where the server is another machine.
    """

    __slots__ = ()
    title = "API"
    HOST = _Setting("", "NNSIGHT_GO_HOST")
    APIKEY = _Setting[str | None](None, "NNSIGHT_GO_API_KEY", secret=True)
    COMPRESS = _Setting[bool | None](None)


class App(_Group):
    """Settings of traces.

    Attributes:
        REMOTE_LOGGING: show how a remote job goes, where there is a terminal or a notebook.
    """

    __slots__ = ()
    title = "APP"
    DEBUG = _Setting(False)
    REMOTE_LOGGING = _Setting(True)
    PYMOUNT = _Setting(True)
    CROSS_INVOKER = _Setting(True)
    TRACE_CACHING = _Setting(False)
    CACHE_DIR = _Setting("")
    DISABLE_CPP_BACKTRACE = _Setting(True)


class Config:
    """All settings."""

    __slots__ = ("API", "APP")

    def __init__(self) -> None:
        self.API, self.APP = Api(), App()

    def __repr__(self) -> str:
        return f"Config(API={self.API!r}, APP={self.APP!r})"

    def save(self) -> None:
        """Writes what the program has set into the user's file, beside what stands there; only the user may read it."""
        stored = dict(_stored())
        for group in (self.API, self.APP):
            if group.given:
                stored[group.title] = stored.get(group.title, {}) | group.given
        file = path()
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".config")  # for the user alone, as it is made
        try:
            with os.fdopen(handle, "w") as out:
                json.dump(stored, out, indent=2)
            os.replace(temporary, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def set_default_api_key(self, api_key: str) -> None:
        """Sets ``API.APIKEY``, and keeps it in the user's file."""
        self.API.APIKEY = api_key
        self.save()

    def set_default_app_debug(self, debug: bool) -> None:
        """Sets ``APP.DEBUG``, and keeps it in the user's file."""
        self.APP.DEBUG = debug
        self.save()


CONFIG = Config()
