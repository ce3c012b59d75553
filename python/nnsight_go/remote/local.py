"""``remote="local"``: requests that are performed in this process, by the model that is here.

All that travels to a server is written and read again, so that a program can be tried out before it is sent to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch

from .. import _ffi, positions
from ..errors import InputError
from ..positions import here

if TYPE_CHECKING:
    from ..native import Native
    from ..proxy import Proxy


class InProcess:
    """The way to a model of this process."""

    def __init__(self, native: Native) -> None:
        self._native = native

    @property
    def where(self) -> object:
        """All ways to this process are alike."""
        return None

    @property
    def uploads(self) -> None:
        """None: everything travels in the request."""
        return None

    def perform(self, request: bytes) -> bytearray:
        """Has a request done, and gives the response."""
        return _ffi.call_for_array(_ffi.lib().nng_model_perform, self._native._handle, request, len(request))

    def submit(self, request: bytes, adopt: Sequence[Proxy], device: torch.device) -> NoReturn:
        """Refuses: there is no queue here."""
        raise InputError(
            'remote="local" runs a trace in this process, so there is no job to leave alone',
            hint="Leave blocking=False out, or give the address of a server.",
            **positions.fields(here()),
        )
