"""Which function has which rule."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

from .. import gradients
from ..proxy import Proxy
from . import conversion, draws, operators, properties, selection
from .computing import compute
from .operators import Rule, direct, need

_BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "div": "div", "mod": "remainder", "matmul": "matmul",
    "floordiv": "floor_divide", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
    "lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift", "pow": "pow",
}  # fmt: skip

# Special methods that are one operator on the same arguments.
_METHODS = {
    **{f"__{k}__": v for k, v in _BINARY.items()},
    **{f"__i{k}__": f"{v}_" for k, v in _BINARY.items() if k != "matmul"},
    "__radd__": "add", "__rmul__": "mul", "__rsub__": "rsub", "__neg__": "neg", "__pos__": "positive",
    "__abs__": "abs", "__invert__": "bitwise_not", "absolute": "abs",
    "__lt__": "lt", "__le__": "le", "__gt__": "gt", "__ge__": "ge",
}  # fmt: skip

# Special methods whose operator takes the arguments the other way round.
_REFLECTED = {
    f"__r{k}__": _BINARY[k] for k in ("pow", "matmul", "floordiv", "mod", "lshift", "rshift", "and", "or", "xor")
}

# Functions of which only a concrete value gives the answer.
_VALUES = frozenset(
    """item tolist numpy __bool__ __int__ __float__ __index__ __complex__ __array__ __contains__ __dlpack__
    __dlpack_device__ allclose equal is_nonzero data_ptr untyped_storage storage _storage is_set_to
    apply_ map_ map2_ histogramdd from_numpy set_ _make_dual _unpack_dual""".split()
)

# Normalisations with running statistics, which they change in training: mean, variance, and the flag.
_NORMALISATIONS = frozenset(("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "instance_norm"))
_STATISTICS, _TRAINING = (3, 4), 5


def _special_method(operator: str) -> Rule:
    """``p + other`` and kin, which leave other types than tensors and numbers to those."""
    rule_of = direct(need(operator))

    def rule(rec: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) == 2:
            if not selection.is_operand(args[1]):
                return NotImplemented
            if type(args[1]).__module__ == "numpy" and args[1].ndim:  # whose own method may be the one to answer
                return compute(rec, func, args, kwargs)
        return rule_of(rec, func, args, kwargs)

    return rule


def _divided(name: str) -> Rule:
    # as torch computes other / self, to the last bit
    return lambda rec, func, args, kwargs: args[0].reciprocal() * args[1]


def _equality(name: str) -> Rule:
    return selection.comparison(name, name.strip("_"))


_Table = tuple[Any, Callable[[str], Rule]]

_TABLES: list[_Table] = [
    (("__eq__", "__ne__"), _equality),
    (_METHODS, lambda name: _special_method(_METHODS[name])),
    (_REFLECTED, lambda name: selection.reflected(name, _REFLECTED[name])),
    (("__rdiv__", "__rtruediv__"), _divided),
    (properties.FACTS, lambda name: properties.facts),
    (_VALUES, lambda name: compute),
    (properties.GRADIENTS, lambda name: properties.gradient(properties.GRADIENTS[name])),
    (("register_post_accumulate_grad_hook",), lambda name: properties.no_gradients),
    (conversion.CASTS, conversion.cast),
    (("to",), conversion.to),
    (("type",), conversion.type_of),
    (("cpu", "cuda"), conversion.onto_device),
    (("tensor", "as_tensor", "asarray"), conversion.tensor),
    (("new_tensor",), conversion.new_tensor),
    (("max", "min", "median", "nanmedian"), selection.reduction),
    (("__getitem__",), selection.getitem),
    (("__setitem__",), selection.setitem),
    (("where",), selection.where),
    (("nonzero",), selection.nonzero),
    (("get_device",), properties.get_device),
]

known: dict[Any, Rule] = {torch.autograd.grad: lambda rec, func, args, kwargs: gradients.grad(rec, *args, **kwargs)}
"""The rules of the functions that were called so far."""


def choose(func: Any) -> Rule:
    """Finds the rule of a function."""
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return _of_dispatcher(func)
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        return properties.attribute(func.__self__.__name__, name)
    for table, rule_of in _TABLES:
        if name in table:
            return rule_of(name)
    if isinstance(func, types.FunctionType) and name != "unflatten":  # its body calls super()
        return _body
    op = operators.find(name)
    if op is not None and name in _NORMALISATIONS:
        return _normalisation(direct(op, func))
    if op is not None and op.changes:
        return functools.partial(compute, changes=op.changes)
    if op is None or op.results is None:
        return compute
    return draws.rule_of(op, func) if op.draws else direct(op, func)


def _of_dispatcher(func: Any) -> Rule:
    """``torch.ops.aten.add`` and ``torch.ops.aten.add.Tensor``."""
    exact = isinstance(func, torch._ops.OpOverload)
    namespace, _, name = (func._schema.name if exact else func._qualified_op_name).partition("::")
    op = operators.find(name) if namespace == "aten" else None  # operators of others may need Python
    if op is not None and (op.changes or name in _NORMALISATIONS):
        return functools.partial(compute, changes=op.changes or _STATISTICS)
    if op is None or op.results is None or op.draws:
        return compute
    overload = f".{func._overloadname}" if exact else ""
    return operators.plain(op, overload)


def _body(rec: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function written in Python: its body runs on the proxies, and the calls in it are recorded."""
    return torch._C._skip_one_hop_torch_function(func, (Proxy,), args, kwargs)


def _normalisation(recorded: Rule) -> Rule:
    """One that updates its running statistics does so now, once."""

    def rule(rec: Any, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > _TRAINING and args[_TRAINING] and args[_STATISTICS[0]] is not None:
            return compute(rec, func, args, kwargs, changes=_STATISTICS)
        return recorded(rec, func, args, kwargs)

    return rule


_HARMLESS = frozenset((properties.facts, properties.no_gradients, _body))


def at_once(rule: Rule) -> Rule:
    """A rule that records nothing which the end of the block would compute otherwise than this line."""
    return rule if rule in _HARMLESS else compute
