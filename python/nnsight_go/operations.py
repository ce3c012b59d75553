"""The torch calls that modules make themselves while a forward pass runs: each is named, numbered and visited.

No code is rewritten. Hooks tell which module's forward is running, and a mode of torch sees every call of its
functions on this thread. The mode is off while it handles one, so that what a torch function calls inside does
not count. Compiled modules run uncompiled meanwhile: their calls could not be seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from . import positions, wire
from .errors import InputError
from .hosting import Mounted, Spot, Visit
from .points import Point, Tree
from .positions import here
from .torchmap import transforms

if TYPE_CHECKING:
    from .hosted import Layout

# Methods of the right operand (1 - x) and of assignments (x &= y), which do what the others do.
_OTHER_SIDE = re.compile(r"__[ri](add|sub|mul|div|truediv|floordiv|mod|pow|matmul|and|or|xor|lshift|rshift)__")
_NO_CALLS = {"__get__"}  # attributes, such as x.T


@dataclasses.dataclass(slots=True)
class _Frame:
    """A module's forward that is running."""

    path: str
    call: int
    counts: dict[str, int]


class _Calls(TorchFunctionMode):
    """Sees torch calls, of whatever module is running."""

    def __init__(self, visit: Visit, wanted: Container[str] | None) -> None:
        super().__init__()
        self._visit, self._wanted = visit, wanted
        self._running: list[_Frame] = []
        self._times: dict[str, int] = {}  # by path: how often a module was called
        self._visiting = False
        self._owner = threading.get_ident()

    def enters(self, path: str) -> Callable[..., None]:
        """The hook of a module that begins."""

        def hook(module: Any, args: Any) -> None:
            if threading.get_ident() == self._owner:
                call = self._times.get(path, 0)
                self._times[path] = call + 1
                self._running.append(_Frame(path, call, {}))

        return hook

    def leaves(self, path: str) -> Callable[..., None]:
        """The hook of a module that has ended, or has raised an error that its caller may catch."""

        def hook(module: Any, args: Any, output: Any) -> None:
            running = self._running
            if threading.get_ident() == self._owner and running and running[-1].path == path:
                running.pop()

        return hook

    def at_side(self, spot: Spot, value: Any) -> Any:
        """Visits a side of a module. What the visit calls is no call of a module."""
        self._visiting = True
        try:
            return self._visit(spot, value)
        finally:
            self._visiting = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **kwargs) if kwargs else func(*args)
        if self._visiting or not self._running or not _has_tensors(out):
            return out
        called = getattr(func, "__name__", "")
        if called in _NO_CALLS or transforms.active() is not None:  # under vmap, tensors are nothing to hand out
            return out
        running, name = self._running[-1], named(called)
        number = running.counts.get(name, 0)
        running.counts[name] = number + 1
        path = f"{prefix(running.path)}{name}_{number}"
        if self._wanted is not None and path not in self._wanted:
            return out
        return self._visit(Spot(path, wire.OUTPUT, running.call), out)


def prefix(path: str) -> str:
    """What the names of a module's operations begin with."""
    return f"{path}.source." if path else "source."


@functools.lru_cache(maxsize=1024)
def named(function: str) -> str:
    """What the operation of a torch function is called: ``add`` for ``add``, ``add_`` and ``__radd__``."""
    other = _OTHER_SIDE.fullmatch(function)
    name = other[1] if other else function.partition(".")[0].strip("_")  # add.Tensor, an overload
    return name if name.isidentifier() else "call"


def _has_tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return not isinstance(value, torch.Size) and any(map(_has_tensors, value))
    return isinstance(value, torch.Tensor)


@contextlib.contextmanager
def seen(modules: dict[str, torch.nn.Module], visit: Visit, wanted: Container[str] | None) -> Iterator[Visit]:
    """Calls ``visit`` at the results of operations of modules while it is entered, in passes of this thread.

    ``wanted`` are the names of operations, or None for all. Gives what is to be called at sides of modules.
    """
    calls, mount = _Calls(visit, wanted), Mounted()
    try:
        for path, module in modules.items():
            mount(module._forward_pre_hooks, calls.enters(path))
            mount(module._forward_hooks, calls.leaves(path))
            mount(module._forward_hooks_always_called, True)
        with transforms.uncompiled(), calls:
            yield calls.at_side
    finally:
        mount.undo()


def between(layout: Layout, modules: Container[str], spots: list[Spot], trees: dict[tuple[str, int], Tree]) -> Layout:
    """A layout with the results of operations between its access points, which stay what they are.

    Args:
        layout: of modules alone.
        modules: their paths.
        spots: what a pass came to, operations too.
        trees: the structure of each.

    Raises:
        InputError: the pass came to other modules than those of the layout.
    """
    points = dict(layout.points)
    before = number = 0
    for spot in spots:
        if spot.path in modules:
            before, number = before + 1, 0
            continue
        key, number = (spot.name, spot.port), number + 1
        # in the order in which they stand, and never at a module's own place
        points[key] = Point(*key, before - 1 / (number + 1), trees[key], internal=True)
    if [spot for spot in spots if spot.path in modules] != layout.spots:
        raise InputError(
            "the forward pass goes another way than when it was tried out first, so its operations are not known",
            hint="The order of its modules depends on more than the sizes of the input.",
            **positions.fields(here()),
        )
    return dataclasses.replace(layout, spots=spots, points=points)
