"""The access points of a model, read out of its description (``docs/architecture.md``)."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import torch

from . import wire


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor of an access point.

    ``shape`` holds sizes, ``"B"`` (rows of the invoke) and ``"S"`` (tokens of its longest row).
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def sizes(self, batch: int, seq: int) -> tuple[int, ...]:
        """The shape for a batch of that many rows and tokens."""
        return tuple(batch if d == "B" else seq if d == "S" else int(d) for d in self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """A plain value in a structure: ``None``, a bool, a number or a string."""

    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Sequence:
    """A tuple or list of values."""

    items: tuple[Tree, ...]
    is_list: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Mapping:
    """A dictionary, or an object with fields where ``cls`` is its class name."""

    fields: dict[str, Tree]
    cls: str = ""


Tree: TypeAlias = Leaf | Constant | Sequence | Mapping


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One side of a module, or a value inside one. ``order`` is its place in the forward pass."""

    path: str
    port: int
    order: float
    tree: Tree
    internal: bool = False

    @property
    def text(self) -> str:
        """How a user writes it: ``transformer.h.5.output``."""
        name = ("input", "output", "grad")[self.port]
        return f"{self.path}.{name}" if self.path else f"model.{name}"


def _ordered(description: dict[str, Any], key: str) -> dict[str, Any]:
    fields = description[key]
    return {name: fields[name] for name in description.get("order") or fields}


def _tree(description: Any) -> Tree:
    match description:
        case None:
            return Constant(None)
        case {"leaf": str(name), "shape": list(shape), "dtype": str(dtype)}:
            return Leaf(name, tuple(shape), getattr(torch, dtype))
        case {"value": value}:
            return Constant(value)
        case {"tuple": list(items)}:
            return Sequence(tuple(_tree(item) for item in items))
        case {"list": list(items)}:
            return Sequence(tuple(_tree(item) for item in items), is_list=True)
        case {"object": str(cls)}:
            return Mapping({k: _tree(v) for k, v in _ordered(description, "fields").items()}, cls)
        case {"dict": dict()}:
            return Mapping({k: _tree(v) for k, v in _ordered(description, "dict").items()})
        case {"args": list(args), "kwargs": dict()}:
            kwargs = {k: _tree(v) for k, v in _ordered(description, "kwargs").items()}
            return Mapping({"args": Sequence(tuple(_tree(item) for item in args)), "kwargs": Mapping(kwargs)})
    raise ValueError(f"not the structure of an access point: {description!r}")


def read(description: list[dict[str, Any]]) -> dict[tuple[str, int], Point]:
    """The points of a model by path and port, from the ``points`` of its description."""
    out = {}
    for order, entry in enumerate(description):
        port = wire.PORTS[entry["port"]]
        internal = bool(entry.get("internal"))
        out[entry["path"], port] = Point(entry["path"], port, order, _tree(entry["tree"]), internal)
    return out


def read_ops(description: list[dict[str, Any]]) -> dict[tuple[str, int], Point]:
    """The results of operators as points, from the ``ops`` of a model's description."""
    out = {}
    after, number = -1, 0
    for entry in description:
        number = number + 1 if entry["after"] == after else 1
        after = entry["after"]
        order = after - 1 / (number + 1)  # between two points, in the order in which they stand
        leaf = Leaf("", tuple(entry["shape"]), getattr(torch, entry["dtype"]))
        out[entry["path"], wire.OUTPUT] = Point(entry["path"], wire.OUTPUT, order, leaf, internal=True)
    return out
