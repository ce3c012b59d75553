"""Random numbers in a block.

Draws happen at the line that asks for them, in line order, from torch's own generator: a value that
is drawn for a proxy's sizes (``randn_like``, dropout's mask) is a real tensor, which the graph then
uses like any tensor from outside. So ``torch.manual_seed`` works anywhere in the block, the numbers
are those PyTorch gives, and computing a graph twice draws nothing twice. Draws that depend on values
(``multinomial``) compute the values first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .recorder import Recorder

_LIKE = frozenset(("rand_like", "randn_like", "randint_like"))
_FILL = frozenset(
    "normal_ uniform_ random_ exponential_ geometric_ cauchy_ log_normal_ bernoulli_ dropout_ rrelu_".split()
)
_DROPOUT = frozenset("dropout native_dropout feature_dropout alpha_dropout feature_alpha_dropout".split())
_BY_VALUE = frozenset("bernoulli multinomial normal poisson binomial rrelu".split())

NAMES = _LIKE | _FILL | _DROPOUT | _BY_VALUE


def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Draws now; see ``torchmap`` for what a rule is."""
    from .proxy import Proxy
    from .torchmap import compute

    name = func.__name__
    target = args[0] if args else kwargs.get("input")
    if name in _LIKE and type(target) is Proxy:
        return func(_blank(target), *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
    if name == "dropout" and type(target) is Proxy:
        p, train = [*args[1:], *[kwargs[k] for k in ("p", "train") if k in kwargs]]
        if not train or p == 0:
            return target
        return target * func(torch.ones_like(_blank(target)), p, True)
    by_value = name in ("dropout_", "rrelu_") or any(type(x) is Proxy for x in (*args[1:], *kwargs.values()))
    if type(target) is Proxy and name in _FILL and not by_value:
        target.copy_(func(_blank(target), *args[1:], **kwargs))
        return target
    return compute(rec, func, args, kwargs)


def _blank(like: Any) -> torch.Tensor:
    """A real tensor of a proxy's sizes, strides and dtype."""
    meta, device = like._rec.meta(like), like.device
    with torch._C.DisableTorchFunction():
        return torch.empty_strided(meta.size(), meta.stride(), dtype=meta.dtype, device=device)
