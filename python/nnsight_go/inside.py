"""Values in the middle of a module's forward pass: ``module.source`` and ``attention.heads``.

Each is read and assigned like what a module gives: ``attention.heads.pattern.output``,
``module.source.add_0.output``. They are computed whether anybody looks or not, but for the scores and
the pattern of attention: a trace that names one of these has its attention done step by step, and any
other trace has it done by one fused operator.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

from . import positions, wire
from .envoy import Envoy
from .errors import ModulePathError
from .points import Constant, Leaf, Mapping, Point, Sequence, Tree
from .positions import here

if TYPE_CHECKING:
    from .native import Native

HEADS = ("q", "k", "v", "scores", "pattern", "z")
VALUE = {"class": "value", "extra": "", "params": []}  # what an envoy is told of one


class Inside(Envoy):
    """One value inside a module. It has an ``output`` and nothing else."""

    def _never_runs(self) -> str:
        return f"It is a value in the middle of a module's forward pass: use {self._name('output')}."

    def __repr__(self) -> str:
        point = self._point(wire.OUTPUT)
        return f"{self._name()}: {_sizes(point)}"


def _sizes(point: Point) -> str:
    return _told(point.tree)


def _told(tree: Tree) -> str:
    match tree:
        case Leaf():
            return f"[{', '.join(map(str, tree.shape))}] {str(tree.dtype).removeprefix('torch.')}"
        case Sequence():
            return f"({', '.join(map(_told, tree.items))})"
        case Mapping():
            return f"({', '.join(f'{key} {_told(part)}' for key, part in tree.fields.items())})"
        case Constant():
            return repr(tree.value)


def _value(native: Native, path: str) -> Inside:
    return Inside(native, path, VALUE)


class Heads:
    """The values inside an attention module, a head for itself.

    Attributes:
        q: queries ``[batch, heads, seq, dim]``, rotated where the architecture rotates them.
        k: keys ``[batch, kv_heads, seq, dim]``, rotated likewise.
        v: values ``[batch, kv_heads, seq, dim]``.
        scores: ``[batch, heads, seq, seq]``, q times k, scaled; -inf where a query may not look.
        pattern: ``[batch, heads, seq, seq]``, their softmax over the last axis.
        z: ``[batch, heads, seq, dim]``, what each head gives, before the output projection.
    """

    q: Inside
    k: Inside
    v: Inside
    scores: Inside
    pattern: Inside
    z: Inside

    def __init__(self, attention: Envoy) -> None:
        for name in HEADS:
            setattr(self, name, _value(attention._native, f"{attention.path}.heads.{name}"))

    def __repr__(self) -> str:
        return "\n".join(repr(getattr(self, name)) for name in HEADS)


class Source:
    """The operators that a module's forward pass calls itself, in their order, named and numbered.

    ``print(module.source)`` lists them; ``module.source.add_0.output`` is the result of one.
    """

    def __init__(self, module: Envoy) -> None:
        self._module = module
        prefix = f"{module.path}.source." if module.path else "source."
        ops = module._native.ops.items()
        self._points = {path.removeprefix(prefix): point for (path, _), point in ops if path.startswith(prefix)}

    def _operation(self, name: str) -> Inside:
        return _value(self._module._native, self._points[name].path)

    def _unknown(self, name: str) -> NoReturn:
        near = difflib.get_close_matches(name, self._points, n=3)
        some = ", ".join(list(self._points)[:12]) + (", ..." if len(self._points) > 12 else "")
        said = f"Nearest: {', '.join(near)}." if near else f"It calls {some or 'none itself'}."
        raise ModulePathError(
            f"{self._module._name()} calls no operator {name!r}",
            path=self._module.path,
            hint=said,
            **positions.fields(here()),
        )

    def __getattr__(self, name: str) -> Inside:
        if name.startswith("__"):
            raise AttributeError(name)
        if name not in self._points:
            self._unknown(name)
        return self._operation(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __dir__(self) -> list[str]:
        return list(self._points)

    def __repr__(self) -> str:
        width = max(map(len, self._points), default=0)
        lines = [f"  {name:{width}}  {_sizes(point)}" for name, point in self._points.items()]
        head = f"{self._module._name()} ({self._module._class}) calls"
        return "\n".join([head, *lines]) if lines else f"{head} no operator itself"
