"""``module.skip(value)``: what the module gives is set, and what it would have done is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import positions, wire
from .errors import OutOfOrderError
from .positions import Place, here

if TYPE_CHECKING:
    from .envoy import Envoy
    from .points import Point
    from .recorder import Recorder


def skip(envoy: Envoy, value: Any) -> None:
    """Records that an invoke does not run a module."""
    rec = envoy._recorder("output")
    invoke = rec.touch(envoy._point(wire.INPUT))  # nothing of it may have run
    envoy._write(wire.OUTPUT, value)
    rec.skipped[invoke, envoy.path] = here()


def check(rec: Recorder, point: Point) -> None:
    """Raises where a value is asked for that a skipped module would have computed."""
    outer = rec.skipped_around(rec.invoke, point)
    if outer is not None:
        raise not_computed(rec, rec.invoke, point, outer, here())


def not_computed(rec: Recorder, invoke: int, point: Point, outer: str, place: Place) -> OutOfOrderError:
    """The error of a value that a module which an invoke skips would have computed."""
    side, path = ("input", "output", "gradient")[point.port], point.path
    skips = rec.skipped.get((invoke, outer))
    return OutOfOrderError(
        f"model{path and '.' + path}.{side} is not computed: "
        f"{'an earlier line' if skips else 'an edit'} skips model{outer and '.' + outer}",
        path=path,
        hint="Leave the skip out, or write it into another invoke.",
        **positions.fields(place),
        **positions.other_fields(skips),
    )


def around(rec: Recorder, invoke: int, path: str) -> str | None:
    """The module around another one, by its path, that an invoke skips, if there is one."""
    if not rec.skipped or not path:
        return None
    parts = path.split(".")
    around = (".".join(parts[:i]) for i in range(len(parts)))
    return next((outer for outer in around if (invoke, outer) in rec.skipped), None)
