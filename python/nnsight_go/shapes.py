"""Shapes, dtypes and strides of values that have not been computed.

A node's call is repeated on meta tensors, which have sizes but no data; the nodes it depends on
come first. It happens only when somebody asks, and once a node. Where sizes depend on data
(``x[x > 0]``) the value itself is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .recorder import Recorder


def index(target: torch.Tensor, where: Any) -> torch.Tensor:
    """``target[where]``."""
    return target[where]


def item(results: Any, key: int | str) -> Any:
    """One of several results."""
    return results[key]


def meta_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its data."""
    return tensor.detach().to("meta")


def infer(rec: Recorder, id: int, run: bool = True) -> Any:
    """The result of node ``id`` on meta tensors: a tensor, or the structure of several.

    With ``run=False`` nothing is computed, and what only a run could tell raises.
    """
    metas = rec.metas
    stack = [id]
    with torch._C.DisableTorchFunction(), torch.no_grad():
        while stack:
            now = stack[-1]
            if now in metas:
                stack.pop()
                continue
            made = rec.made[now]
            assert made is not None, "only nodes with a result are asked for their shape"
            needed = [p for p in values((made[1], made[2])) if p not in metas]
            if needed:
                stack.extend(needed)
                continue
            metas[now] = _compute(rec, now, made, run)
            stack.pop()
    return metas[id]


def _compute(rec: Recorder, id: int, made: tuple[Any, Any, Any], run: bool) -> Any:
    function, args, kwargs = made
    try:
        return function(*on_meta(rec, args), **on_meta(rec, kwargs or {}))
    except (NotImplementedError, RuntimeError, IndexError, TypeError, ValueError):
        # Either the sizes depend on data or the call is wrong: the engine knows, and says where.
        from .proxy import Proxy

        if not run:
            raise
        if id in rec.several:
            return _Unknown()
        return meta_of(rec.force([Proxy._make(rec, id)])[0])


class _Unknown:
    """Several results whose sizes depend on data: each is computed when it is asked for."""


def values(tree: Any) -> list[int]:
    """The nodes that the proxies (and multiple results) in a structure name."""
    from .proxy import Proxy
    from .recorder import Results

    out: list[int] = []
    stack = [tree]
    while stack:
        x = stack.pop()
        kind = type(x)
        if kind is Proxy or kind is Results:
            out.append(x._id)
        elif isinstance(x, list | tuple):
            stack.extend(x)
        elif isinstance(x, dict):
            stack.extend(x.values())
        elif kind is slice:
            stack += [x.start, x.stop, x.step]
    return out


def on_meta(rec: Recorder, x: Any) -> Any:
    """A structure with every tensor replaced by its meta tensor."""
    from .proxy import Proxy
    from .recorder import Results

    kind = type(x)
    if kind is Proxy or kind is Results:
        return rec.metas[x._id]
    if isinstance(x, torch.Tensor):
        return meta_of(x)
    if isinstance(x, torch.device):
        return torch.device("meta")
    if isinstance(x, list | tuple) and kind is not torch.Size:
        items = [on_meta(rec, item) for item in x]
        return items if isinstance(x, list) else tuple(items)
    if isinstance(x, dict):
        return {k: on_meta(rec, v) for k, v in x.items()}
    if kind is slice:
        return slice(on_meta(rec, x.start), on_meta(rec, x.stop), on_meta(rec, x.step))
    return x
