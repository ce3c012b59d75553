"""``tracer.stop()``: leaves the block there and then."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .recorder import Recorder


class Stop(BaseException):
    """Carries control out of a block; the block's end takes it in. No error, so ``except Exception`` lets it pass."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        super().__init__("tracer.stop() was called outside of its trace")
