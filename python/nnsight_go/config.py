"""``CONFIG``: the settings that programs written for nnsight make.

``CONFIG.APP.DEBUG = True`` shows whole tracebacks, with the frames of this package. The others are kept
for those who read them again, and have no effect: there are no remote traces, ``.save()`` is always there,
and values always flow from one invoke to a later one. Nothing is written to a file.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Api:
    """Settings of remote traces."""

    HOST: str = ""
    APIKEY: str | None = dataclasses.field(default=None, repr=False)
    COMPRESS: bool = True


@dataclasses.dataclass(slots=True)
class App:
    """Settings of traces."""

    DEBUG: bool = False
    REMOTE_LOGGING: bool = True
    PYMOUNT: bool = True
    CROSS_INVOKER: bool = True
    TRACE_CACHING: bool = False
    CACHE_DIR: str = ""
    DISABLE_CPP_BACKTRACE: bool = True


@dataclasses.dataclass(slots=True)
class Config:
    """All settings. They last as long as the process."""

    API: Api = dataclasses.field(default_factory=Api)
    APP: App = dataclasses.field(default_factory=App)

    def set_default_api_key(self, api_key: str) -> None:
        """Sets ``API.APIKEY``."""
        self.API.APIKEY = api_key

    def set_default_app_debug(self, debug: bool) -> None:
        """Sets ``APP.DEBUG``."""
        self.APP.DEBUG = debug


CONFIG = Config()
