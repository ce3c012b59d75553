"""Parts of tensors: indexing, and functions whose results depend on how they are called."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..errors import users
from ..proxy import Proxy
from ..recorder import Recorder
from .computing import compute
from .operators import Rule, direct, need


def getitem(name: str) -> Rule:
    """``target[index]``."""

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, index = args
        if type(target) is not Proxy:
            target = rec.constant(target)
        return rec.index(target, index)

    return rule


def setitem(name: str) -> Rule:
    """``target[index] = value``."""

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, index, value = args
        if type(target) is not Proxy:
            return compute(rec, func, args, kwargs)  # a tensor from outside changes now, as its owner expects
        if not isinstance(value, torch.Tensor | bool | int | float | complex):
            raise users(TypeError(f"can't assign a {type(value).__name__} to a tensor"))
        rec.set_index(target, index, value)
        return None

    return rule


def reduction(name: str) -> Rule:
    """``max`` and kin: a reduction, two tensors' larger elements, or values and indices along an axis."""
    one, two = (direct(dataclasses.replace(need(name), results=n)) for n in (1, 2))

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = len(args) + sum(k in ("dim", "axis", "other") for k in kwargs) - ("input" not in kwargs)
        pair = given > 0 and not any(isinstance(x, torch.Tensor) for x in (*args[1:], kwargs.get("other")))
        return (two if pair else one)(rec, func, args, kwargs)

    return rule


def where(name: str) -> Rule:
    """``where(condition, a, b)`` and ``a.where(condition, b)``."""
    three = direct(dataclasses.replace(need("where"), results=1))

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) + len(kwargs) == 1:
            return nonzero("nonzero")(rec, torch.nonzero, args or tuple(kwargs.values()), {"as_tuple": True})
        if func is torch.Tensor.where:
            by_name = {"input": "self"}
            condition = args[1] if len(args) > 1 else kwargs["condition"]
            rest = {by_name.get(k, k): v for k, v in kwargs.items() if k != "condition"}
            return three(rec, torch.where, (condition, args[0], *args[2:]), rest)
        return three(rec, func, args, kwargs)

    return rule


def nonzero(name: str) -> Rule:
    """``nonzero()``: a table of indices, or a column of it for each axis."""
    table = direct(need("nonzero"))

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rest = {k: v for k, v in kwargs.items() if k != "as_tuple"}
        if not kwargs.get("as_tuple"):
            return table(rec, torch.nonzero, args, rest)
        target = args[0] if args else kwargs["input"]
        if not target.ndim:
            target = target.unsqueeze(0)
        indices = torch.nonzero(target)
        return tuple(indices[:, i] for i in range(target.ndim))

    return rule


def is_operand(x: Any) -> bool:
    """Whether tensors can be added to, or compared with, a value."""
    return isinstance(x, torch.Tensor | int | float | complex) or type(x).__module__ == "numpy"


def reflected(name: str, operator: str) -> Rule:
    """``number - p`` and kin: the operator with its arguments the other way round."""
    rule_of = direct(need(operator))
    function = getattr(torch, operator)

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return rule_of(rec, function, (args[1], args[0]), {}) if is_operand(args[1]) else NotImplemented

    return rule


def comparison(name: str, operator: str) -> Rule:
    """``==`` and ``!=``, which also answer for what no tensor can be compared with."""
    rule_of = direct(need(operator))

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return rule_of(rec, func, args, kwargs) if is_operand(args[1]) else operator == "ne"

    return rule
