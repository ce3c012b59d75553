"""Random numbers in a block.

Draws happen at the line that asks for them, in line order, from torch's own generator: a value that
is drawn for a proxy's sizes (``randn_like``, dropout's mask) is a real tensor, which the graph then
uses like any tensor from outside. So ``torch.manual_seed`` works anywhere in the block, the numbers
are those PyTorch gives, and computing a graph twice draws nothing twice. Draws that depend on values
(``multinomial``) compute the values first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..proxy import Proxy
from ..recorder import Recorder
from .computing import compute
from .operators import Operator, Rule, direct

_LIKE = frozenset(("rand_like", "randn_like", "randint_like"))
_FILL = frozenset("normal_ uniform_ random_ exponential_ geometric_ cauchy_ log_normal_ bernoulli_".split())
_MASKS = frozenset("dropout dropout_ feature_dropout feature_dropout_".split())
_ATTENTION = frozenset(("scaled_dot_product_attention", "_scaled_dot_product_attention_math"))
_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))

# An answer where the call draws nothing, which is then recorded as it is.
_Draws = Callable[[tuple[Any, ...], dict[str, Any]], bool]


def rule_of(op: Operator, func: Any) -> Rule:
    """The rule of an operator that draws."""
    name = op.name.removeprefix("aten::")
    if name in _LIKE:
        return _like
    if name in _FILL:
        return _fill
    if name in _MASKS:
        return _mask
    if name in _ATTENTION:
        return _unless(lambda args, kwargs: bool(_argument(args, kwargs, 4, "dropout_p", 0)), direct(op, func))
    if name in _RECURRENT:
        return _unless(_between_layers, direct(op, func))
    return compute


def _like(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target, rest = (args[0], args[1:]) if args else (kwargs["input"], ())
    others = {k: v for k, v in kwargs.items() if k != "input"}
    if type(target) is not Proxy or _any_proxy((*rest, *others.values())):
        return compute(rec, func, args, kwargs)
    return func(_blank(target), *rest, **others)


def _fill(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not args or type(args[0]) is not Proxy or _any_proxy((*args[1:], *kwargs.values())):
        return compute(rec, func, args, kwargs)
    target = args[0]
    return target.copy_(func(_blank(target), *args[1:], **kwargs))


def _mask(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    target = args[0] if args else kwargs.get("input")
    p, train = _argument(args, kwargs, 1, "p", 0.5), _argument(args, kwargs, 2, "train", True)
    if type(target) is not Proxy or _any_proxy((p, train)):
        return compute(rec, func, args, kwargs)
    in_place = func.__name__.endswith("_")
    if not train or p == 0:
        return target
    drawn = func(torch.ones_like(_blank(target)), p, True)
    return target.mul_(drawn) if in_place else target * drawn


def _unless(draws: _Draws, recorded: Rule) -> Rule:
    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (compute if draws(args, kwargs) else recorded)(rec, func, args, kwargs)

    return rule


def _between_layers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a recurrent network drops out: (input, hx, weights, biases, layers, dropout, train, ...) or packed."""
    at = 5 if isinstance(args[3], bool) else 6
    return bool(args[at]) and bool(args[at + 1])


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], at: int, name: str, default: Any) -> Any:
    return args[at] if len(args) > at else kwargs.get(name, default)


def _any_proxy(items: Any) -> bool:
    return any(type(x) is Proxy for x in items)


def _blank(like: Any) -> torch.Tensor:
    """A real tensor of a proxy's sizes, strides and dtype."""
    meta, device = like._rec.meta(like), like.device
    with torch._C.DisableTorchFunction():
        return torch.empty_strided(meta.size(), meta.stride(), dtype=meta.dtype, device=device)
