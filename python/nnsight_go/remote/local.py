"""``remote="local"``: requests that are performed in this process, by the model that is here.

All that travels to a server is written and read again, so that a program can be tried out before it is sent to one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import _ffi

if TYPE_CHECKING:
    from ..native import Native


class InProcess:
    """The way to a model of this process."""

    uploads = None

    def __init__(self, native: Native) -> None:
        self._native = native

    def perform(self, request: bytes) -> bytearray:
        """Has a request done, and gives the response."""
        return _ffi.call_for_array(_ffi.lib().nng_model_perform, self._native._handle, request, len(request))
