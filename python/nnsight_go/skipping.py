"""``module.skip(value)``: what the module gives is set, and what it would have done is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import positions, wire
from .errors import OutOfOrderError
from .positions import here

if TYPE_CHECKING:
    from .envoy import Envoy
    from .recorder import Recorder


def skip(envoy: Envoy, value: Any) -> None:
    """Records that an invoke does not run a module."""
    rec = envoy._recorder("output")
    invoke = rec.touch(envoy._point(wire.INPUT), writing=True)  # nothing of it may have run
    envoy._write(wire.OUTPUT, value)
    rec.skipped[invoke, envoy.path] = here()


def check(rec: Recorder, path: str, port: int) -> None:
    """Raises where a value is asked for that a skipped module would have computed."""
    for (invoke, skipped), place in rec.skipped.items():
        if invoke == rec.invoke and path.startswith(skipped + "."):
            side = ("input", "output", "gradient")[port]
            raise OutOfOrderError(
                f"model.{path}.{side} is not computed: an earlier line skips model.{skipped}",
                path=path,
                hint="Read it before skip() is called, or leave the skip out.",
                **positions.fields(here()),
                **positions.other_fields(place),
            )
