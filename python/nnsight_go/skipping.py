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
    outer = skipped(rec, rec.invoke, path)
    if outer is not None:
        side = ("input", "output", "gradient")[port]
        raise OutOfOrderError(
            f"model.{path}.{side} is not computed: an earlier line skips model{outer and '.' + outer}",
            path=path,
            hint="Leave the skip out, or write it into another invoke.",
            **positions.fields(here()),
            **positions.other_fields(rec.skipped[rec.invoke, outer]),
        )


def skipped(rec: Recorder, invoke: int, path: str) -> str | None:
    """The module around another one that an invoke skips, if there is one."""
    if not rec.skipped or not path:
        return None
    parts = path.split(".")
    around = (".".join(parts[:i]) for i in range(len(parts)))
    return next((outer for outer in around if (invoke, outer) in rec.skipped), None)
