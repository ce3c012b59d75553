"""The wire form of graphs and results: MessagePack, described in ``docs/wire.md``.

A recorded node is a tuple ``(kind, invoke, position, mode, ...)`` whose arguments are already in wire
form. Values are named through a callback, so that this module knows nothing of proxies.
"""

from __future__ import annotations

import enum
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import msgspec
import torch

VERSION = 1


class Kind(enum.IntEnum):
    """What a node does."""

    CALL = 0
    INDEX = 1
    SET_INDEX = 2
    ITEM = 3
    READ = 4
    WRITE = 5
    MODULE = 6
    CONST = 7
    SAVE = 8
    TRACK = 9
    BACKWARD = 10
    GRAD = 11
    SET_GRAD = 12
    END = 13


class Tag(enum.IntEnum):
    """The first element of an argument that is not a plain MessagePack value."""

    REF = 0
    LIST = 1
    TUPLE = 2
    DICT = 3
    SLICE = 4
    ELLIPSIS = 5
    DTYPE = 6
    DEVICE = 7
    LAYOUT = 8
    MEMORY_FORMAT = 9
    COMPLEX = 10
    OBJECT = 11


INPUT, OUTPUT = 0, 1
PORTS = {"input": INPUT, "output": OUTPUT}

Node: TypeAlias = tuple[Any, ...]
# Gives the number of the node that defines a tensor.
Namer: TypeAlias = Callable[[torch.Tensor], int]


class Unrecordable(TypeError):
    """An argument that has no wire form (a generator, an object of the user's, ...)."""


_REF, _LIST, _TUPLE, _DICT, _SLICE = int(Tag.REF), int(Tag.LIST), int(Tag.TUPLE), int(Tag.DICT), int(Tag.SLICE)


def _sequence(tag: int) -> Callable[[Any, Namer], list[Any]]:
    return lambda x, name: [tag, *[argument(item, name) for item in x]]


def _dict(x: dict[Any, Any], name: Namer) -> list[Any]:
    out: list[Any] = [_DICT]
    for key, value in x.items():
        if type(key) is not str:
            raise Unrecordable(f"a dictionary with the key {key!r}: keys must be strings")
        out += [key, argument(value, name)]
    return out


def _slice(x: slice, name: Namer) -> list[Any]:
    return [_SLICE, argument(x.start, name), argument(x.stop, name), argument(x.step, name)]


def _torch_name(tag: Tag) -> Callable[[Any, Namer], list[Any]]:
    return lambda x, name: [int(tag), str(x).removeprefix("torch.")]


# Python types that torch takes where a dtype is wanted.
_DTYPES = {float: "float64", int: "int64", bool: "bool", complex: "complex128"}


def _python_type(x: type, name: Namer) -> list[Any]:
    if x not in _DTYPES:
        raise Unrecordable(f"the type {x.__name__}")
    return [int(Tag.DTYPE), _DTYPES[x]]


_PLAIN = frozenset((int, float, bool, str, type(None)))
_FORMS: dict[type, Callable[[Any, Namer], Any]] = {
    list: _sequence(_LIST),
    tuple: _sequence(_TUPLE),
    torch.Size: _sequence(_LIST),
    range: _sequence(_LIST),
    dict: _dict,
    slice: _slice,
    type(...): lambda x, name: [int(Tag.ELLIPSIS)],
    torch.dtype: _torch_name(Tag.DTYPE),
    torch.device: _torch_name(Tag.DEVICE),
    torch.layout: _torch_name(Tag.LAYOUT),
    torch.memory_format: _torch_name(Tag.MEMORY_FORMAT),
    complex: lambda x, name: [int(Tag.COMPLEX), x.real, x.imag],
    type: _python_type,
}


def argument(x: Any, name: Namer) -> Any:
    """The wire form of an argument. Raises ``Unrecordable`` for what has none."""
    kind = type(x)
    if kind in _PLAIN:
        return x
    form = _FORMS.get(kind)
    if form is not None:
        return form(x, name)
    if isinstance(x, torch.Tensor):
        return [_REF, name(x)]
    if isinstance(x, bool | int | float | str):  # subclasses: enums, numpy's float64
        for plain in (bool, int, float, str):
            if isinstance(x, plain):
                return plain(x)
    if isinstance(x, numbers.Number) and hasattr(x, "item"):  # numpy's scalars
        return x.item()
    if type(x).__module__ == "numpy":
        return [_REF, name(torch.as_tensor(x))] if x.ndim else x.item()
    if isinstance(x, tuple | list):
        return _FORMS[tuple if isinstance(x, tuple) else list](x, name)
    raise Unrecordable(f"a {type(x).__module__}.{type(x).__qualname__}")


_CALLED = (int(Kind.CALL), int(Kind.MODULE))


def references(node: Node) -> Iterator[int]:
    """The numbers of the nodes that a node uses."""
    called = node[0] in _CALLED
    arguments = [*node[5], *(node[6] or {}).values()] if called else list(node[4:])
    while arguments:
        x = arguments.pop()
        if type(x) is not list:
            continue
        if x[0] == _REF:
            yield x[1]
        elif x[0] in (_LIST, _TUPLE, _DICT, _SLICE, Tag.OBJECT):
            arguments += x[1:]


def mapped(node: Node, number: Callable[[int], int]) -> Node:
    """A node with the numbers of the nodes it uses replaced."""

    def argument(x: Any) -> Any:
        if type(x) is not list:
            return x
        if x[0] == _REF:
            return [_REF, number(x[1])]
        return [x[0], *map(argument, x[1:])] if x[0] in (_LIST, _TUPLE, _DICT, _SLICE, Tag.OBJECT) else x

    if node[0] in (Kind.CALL, Kind.MODULE):
        named = {k: argument(x) for k, x in node[6].items()} if node[6] else None
        return (*node[:5], [argument(x) for x in node[5]], named)
    return (*node[:4], *map(argument, node[4:]))


def renumbered(node: Node, invoke: int, nodes: int, constants: int) -> Node:
    """A node as part of another recording, where its nodes and constants are numbered on from others."""
    if node[0] == Kind.CONST:
        return (node[0], invoke, *node[2:4], node[4] + constants)
    kind, _, *rest = mapped(node, lambda ref: ref + nodes)
    return (kind, invoke, *rest)


_encoder = msgspec.msgpack.Encoder()


def graph(invokes: Sequence[Any], nodes: Sequence[Node], positions: Sequence[Any]) -> bytes:
    """Encodes a graph.

    Args:
        invokes: for each invoke ``[rows, masks]``, lists of rows of ints or ``None``.
        nodes: with positions as indices into ``positions``, or -1.
        positions: ``[file, line, function]`` each.
    """
    return _encoder.encode([VERSION, invokes, nodes, positions])


def results(data: bytes, tensors: Sequence[Any]) -> list[tuple[int, Any]]:
    """Decodes results into ``(node, value)`` pairs; ``tensors`` are what the references number."""
    return [(node, value(x, tensors)) for node, x in msgspec.msgpack.decode(data)]


def _pairs(items: Iterable[Any]) -> Iterable[tuple[Any, Any]]:
    it = iter(items)
    return zip(it, it, strict=True)


def value(x: Any, tensors: Any) -> Any:
    """An argument out of its wire form; ``tensors`` has what references number."""
    if type(x) is not list:
        return x
    if x[0] == _REF:
        return tensors[x[1]]
    if x[0] == _SLICE:
        return slice(*[value(item, tensors) for item in x[1:]])
    tag, rest = Tag(x[0]), x[1:]
    match tag:
        case Tag.LIST | Tag.TUPLE:
            items = [value(item, tensors) for item in rest]
            return items if tag is Tag.LIST else tuple(items)
        case Tag.DICT | Tag.OBJECT:
            return {k: value(v, tensors) for k, v in _pairs(rest[1:] if tag is Tag.OBJECT else rest)}
        case Tag.DTYPE | Tag.LAYOUT | Tag.MEMORY_FORMAT:
            return getattr(torch, rest[0])
        case Tag.DEVICE:
            return torch.device(rest[0])
        case Tag.COMPLEX:
            return complex(rest[0], rest[1])
        case Tag.ELLIPSIS:
            return ...
