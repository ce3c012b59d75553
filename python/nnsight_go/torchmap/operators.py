"""A call of one ATen operator."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from .. import shapes
from ..proxy import Proxy
from ..recorder import Recorder
from ..wire import Unrecordable
from .computing import compute

# rule(recorder, function, args, kwargs) -> what the call gives
Rule: TypeAlias = Callable[[Recorder, Any, tuple[Any, ...], dict[str, Any]], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Operator:
    """What the schemas of an operator say.

    ``results`` is the number of tensors that it gives (one tensor: 1), -1 for a list of tensors, 0
    where overloads differ, and None where something else than tensors comes out. ``self_at`` is the
    place of the argument that a method is called on. ``out`` are the argument names of the overloads
    that take ``out=``. ``draws``: its numbers are random. ``changes`` are the places of arguments that
    it changes though neither its name nor ``out`` tells. ``autocast``: autocast makes something else of
    it, or of what it calls.
    """

    name: str
    arguments: frozenset[str]
    results: int | None
    positional: int
    self_at: int = 0
    out: frozenset[str] = frozenset()
    draws: bool = False
    changes: frozenset[int] = frozenset()
    autocast: bool = False


def find(name: str) -> Operator | None:
    """The operator ``aten::name``, or None."""
    schemas = [s for s in torch._C._jit_get_schemas_for_operator(f"aten::{name}") if _has_kernel(s)]
    if not schemas:
        return None
    functional = [s for s in schemas if not any(a.is_out for a in s.arguments)] or schemas
    counts = {_count(s) for s in functional}
    in_place = is_in_place(name)
    return Operator(
        f"aten::{name}",
        frozenset(a.name for s in functional for a in s.arguments),
        counts.pop() if len(counts) == 1 else (None if None in counts else 0),
        _POSITIONAL.get(name.rstrip("_")) or max(sum(not a.kwarg_only for a in s.arguments) for s in functional),
        min((_index_of_self(s) for s in functional), default=0),
        frozenset(a.name for s in schemas if any(a.name == "out" for a in s.arguments) for a in s.arguments),
        _seeded(name, functional),
        frozenset(i for s in functional for i, a in enumerate(s.arguments) if _writes(a) and (i or not in_place)),
        any(_has_kernel(s, key) for s in functional for key in ("AutocastCPU", "CompositeImplicitAutograd")),
    )


def need(name: str) -> Operator:
    """The operator ``aten::name``, which must be there."""
    op = find(name)
    if op is None:
        from ..errors import InternalError

        raise InternalError(f"torch {torch.__version__} has no operator aten::{name}")
    return op


def is_in_place(name: str) -> bool:
    """Whether a function of that name changes its first argument."""
    return name.endswith("_") and not name.endswith("__")


def changes_first(name: str) -> bool:
    """The same of methods as well: ``__iadd__`` and kin."""
    return is_in_place(name) or (name.startswith("__i") and name.endswith("__"))


def _full_name(schema: Any) -> str:
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)


def _has_kernel(schema: Any, key: str | None = None) -> bool:
    if key is None:
        return bool(torch._C._dispatch_has_kernel(_full_name(schema)))
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(_full_name(schema), key))


def _index_of_self(schema: Any) -> int:
    return next((i for i, a in enumerate(schema.arguments) if a.name == "self"), 0)


def _writes(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _seeded(name: str, schemas: list[Any]) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    overloads = (getattr(packet, s.overload_name or "default", None) for s in schemas)
    return any(torch.Tag.nondeterministic_seeded in o.tags for o in overloads if o is not None)


def _count(schema: Any) -> int | None:
    kinds = [str(r.type) for r in schema.returns]
    if kinds and all(k == "Tensor" for k in kinds):
        return len(kinds)
    return -1 if kinds == ["List[Tensor]"] else None


# Names that torch's Python functions take for arguments of ATen's.
_ALIASES = {"input": "self", "axis": "dim", "keepdims": "keepdim", "x": "self", "x1": "self", "x2": "other"}

# Where a schema has an argument that Python takes by name only, or in an older order: add(x, alpha, y).
_POSITIONAL = {"add": 2, "sub": 2}

# What takes sizes one by one: x.view(2, 3).
_VARARGS_METHODS = frozenset(
    "view reshape expand permute repeat flip tile new_zeros new_ones new_empty broadcast_to resize_".split()
)
_VARARGS_FACTORIES = frozenset("zeros ones empty".split())

# In-place operations that change the sizes of what they work on.
RESHAPING = frozenset("t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_ resize_ resize_as_ as_strided_".split())


def direct(op: Operator, func: Any = None, name: str | None = None) -> Rule:
    """The rule of a function that is one operator.

    ``name`` is that of the kind of tuple that several results come in, where it is not the operator's.
    """
    name = op.name.removeprefix("aten::") if name is None else name
    if is_in_place(name):
        return _in_place(op, name)
    target = op.name
    one = op.results == 1
    varargs = 1 if name in _VARARGS_METHODS else 0 if name in _VARARGS_FACTORIES else -1
    swap = op.self_at if isinstance(func, types.MethodDescriptorType | types.WrapperDescriptorType) else 0
    autocast, most = op.autocast, op.positional

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if autocast and torch._C._is_any_autocast_enabled():
            return compute(rec, func, args, kwargs)
        named = kwargs
        if kwargs:
            if kwargs.get("out") is not None:
                return _into(rec, op, func, args, kwargs)
            named = _named(op, kwargs)
        if varargs >= 0 and _are_sizes(args, varargs):
            args = (*args[:varargs], list(args[varargs:]))
        if len(args) > most:  # an older order of arguments, which no schema knows
            return compute(rec, func, args, kwargs)
        for x in args:
            if type(x) is list:  # the caller may change it later
                args = tuple(list(x) if type(x) is list else x for x in args)
                break
        given = args
        if swap:
            given = (*args[1 : swap + 1], args[0], *args[swap + 1 :])
        node = rec.call(target, given, named, (func, args, kwargs))
        if one:
            return Proxy._make(rec, node)
        return several(rec, node, op, name)

    return rule


def _are_sizes(args: tuple[Any, ...], first: int) -> bool:
    """Whether sizes are given one by one from ``first`` on; a single number is no list only where it is a proxy."""
    if len(args) <= first or isinstance(args[first], list | tuple | torch.dtype):
        return False
    return len(args) > first + 1 or type(args[first]) is Proxy


def _named(op: Operator, kwargs: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for k, v in kwargs.items():
        if k not in op.arguments:
            k = _ALIASES.get(k, k)
            if k not in op.arguments and (v is None or k in ("out", "names", "requires_grad")):
                continue
        out[k] = v
    return out


def several(rec: Recorder, node: int, op: Operator, name: str) -> Any:
    """Proxies for the several results of a node, in the kind of tuple that torch gives."""
    rec.several.add(node)
    if op.results is not None and op.results > 1:
        items = [rec.item(node, i) for i in range(op.results)]
        cls = getattr(torch.return_types, name, None)
        return cls(items) if cls is not None else tuple(items)
    known = rec.structure(node)
    if isinstance(known, torch.Tensor):
        rec.several.discard(node)
        return Proxy._make(rec, node)
    if not isinstance(known, tuple | list):
        raise Unrecordable(name)
    items = [rec.item(node, i) for i in range(len(known))]
    cls = type(known)
    return tuple(items) if cls is tuple else cls(items)


def plain(op: Operator, overload: str) -> Rule:
    """The rule of an operator that is called by its own name: ``torch.ops.aten.add.Tensor``."""
    target = op.name + overload
    in_place = is_in_place(op.name)

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "out" in kwargs or (in_place and type(args[0]) is not Proxy):
            return compute(rec, func, args, kwargs)
        if in_place:
            rec.call(target, args, kwargs, (shapes.same, (args[0],), None))
            return args[0]
        node = rec.call(target, args, kwargs, (func, args, kwargs))
        return Proxy._make(rec, node) if op.results == 1 else several(rec, node, op, "")

    return rule


# ---- changes in place ----


def _in_place(op: Operator, name: str) -> Rule:
    reshapes = name in RESHAPING
    autocast, most = op.autocast, op.positional

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or type(args[0]) is not Proxy or (len(args) > most and not reshapes):
            return compute(rec, func, args, kwargs)  # a tensor from outside changes now, as its owner expects
        if autocast and torch._C._is_any_autocast_enabled():
            return compute(rec, func, args, kwargs)
        target = args[0]
        if reshapes:
            shapes.before_change(rec, target, (args, kwargs))
        rec.call(op.name, args, _named(op, kwargs) if kwargs else None, (shapes.same, (target,), None))
        if reshapes:
            shapes.after_change(rec, target, lambda meta, on: func(meta, *on(args[1:]), **on(kwargs)))
        return target

    return rule


def _into(rec: Recorder, op: Operator, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call with ``out=``: what is given there is changed, and its sizes become those of the result."""
    out = kwargs["out"]
    outs = list(out) if isinstance(out, tuple | list) else [out]
    if op.draws or not all(type(o) is Proxy for o in outs):
        return compute(rec, func, args, kwargs)
    rest = {k: v for k, v in kwargs.items() if k != "out"}
    if type(out) is Proxy and not rec.elsewhere:
        if "out" not in op.out:
            return compute(rec, func, args, kwargs)
        shapes.before_change(rec, out, (args, kwargs))
        named = {k: v for k, v in _named(op, rest).items() if k in op.out}  # the dtype is that of what is given
        rec.call(op.name, args, named | {"out": out}, (shapes.same, (out,), None))
        shapes.after_change(rec, out, lambda meta, on: func(*on(args), **on(rest), out=meta))
        return out
    made = func(*args, **rest)  # a server writes to nothing that it is given
    for o, m in zip(outs, [made] if type(out) is Proxy else made, strict=True):
        if not torch.can_cast(m.dtype, o.dtype):
            raise RuntimeError(f"Expected out tensor to have dtype {m.dtype}, but got {o.dtype} instead")
        if o.shape != m.shape:
            o.resize_(m.shape)
        o.copy_(m)
    if type(out) is Proxy:
        return out
    if isinstance(made, list) or func.__name__.endswith("_copy"):
        return None
    cls = getattr(torch.return_types, f"{func.__name__}_out", None)
    return tuple(outs) if cls is None else cls(outs)
