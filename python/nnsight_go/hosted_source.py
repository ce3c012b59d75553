"""``module.source`` of a wrapped module: the torch calls that its forward makes itself.

Which there are is known of a kind of input, once a forward pass of it was tried out with them in view.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import positions, wire
from .errors import InputError, ModulePathError
from .inside import VALUE, Inside, Source
from .operations import prefix
from .points import Point
from .positions import here
from .recorder import current

if TYPE_CHECKING:
    from .wrapping import ModuleEnvoy


class HostedSource(Source):
    """The calls of a wrapped module, in their order, named by function and numbered.

    In a trace they are those of its input, and of the call that the module's lines mean; outside of one, those of
    the last trace or scan that asked for some.
    """

    _module: ModuleEnvoy

    def __init__(self, module: ModuleEnvoy) -> None:
        self._module = module
        self._points = _points(module)

    def _operation(self, name: str) -> Operation:
        return Operation(self._module, name)


class Operation(Inside):
    """The result of one call. It has an ``output`` and nothing else."""

    _of: ModuleEnvoy
    _called: str

    def __init__(self, module: ModuleEnvoy, name: str) -> None:
        super().__init__(module._native, f"{prefix(module._hosted.paths[module._path])}{name}", VALUE)
        self._of, self._called = module, name

    def _point(self, port: int) -> Point:
        if port != wire.OUTPUT:
            raise ModulePathError(
                f"{self._name()} is the result of a call, so it has no input",
                path=self._path,
                hint=self._never_runs(),
                **positions.fields(here()),
            )
        source = HostedSource(self._of)  # of the call that is meant by now
        point = source._points.get(self._called)
        if point is None:
            source._unknown(self._called)
        return point


def _points(module: ModuleEnvoy) -> dict[str, Point]:
    """The results of a module's calls by name."""
    rec: Any = current.recorder
    hosted, written = module._hosted, module._name("source")
    if rec is not None and rec.native is hosted:
        found: dict[str, Point] = rec.operations(module._path, written)
        return found
    layout = hosted.looked_into()
    if layout is None:
        raise InputError(
            f"{written} is known of an input, and none was traced with it yet",
            path=module.path,
            hint="Use it in `with model.trace(x):` or `with model.scan(x):`.",
            **positions.fields(here()),
        )
    return layout.operations.get((hosted.paths[module._path], 0), {})
