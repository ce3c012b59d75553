"""Shapes, dtypes and strides of values that have not been computed.

A node's call is repeated on meta tensors, which have sizes but no data; the nodes it depends on
come first. It happens only when somebody asks, and once a node; calls of torch's own functions on
sizes that were seen before are remembered. Where sizes depend on data (``x[x > 0]``) the value itself
is computed.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .proxy import Proxy
    from .recorder import Recorder


def index(target: torch.Tensor, where: Any) -> torch.Tensor:
    """``target[where]``."""
    return target[where]


def same(target: torch.Tensor) -> torch.Tensor:
    """What a change in place gives: its target."""
    return target


def item(results: Any, key: int | str) -> Any:
    """One of several results."""
    return results[key]


def meta_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without its data."""
    if tensor.layout == torch.strided:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
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
        found = _remembered(function, on_meta(rec, args), on_meta(rec, kwargs or {}))
        if found is NotImplemented:  # how special methods say that they cannot
            raise TypeError
        return found
    except (NotImplementedError, RuntimeError, IndexError, TypeError, ValueError) as error:
        # either the sizes depend on data or the call is wrong
        if not run:
            raise
        return _Unknown() if id in rec.several else rec.unknown(id, error)


class _Unknown:
    """Several results whose sizes depend on data: each is computed when it is asked for."""


# ---- calls that were made before ----

# What gives the same sizes for the same sizes. Meta tensors in rec.metas are never changed, so that
# they can be shared.
_PURE = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_MOST = 4096
_seen: dict[Any, Any] = {}


# PyTorch's kernels on meta tensors give other sizes or dtypes here than those on the CPU.
_WRONG_ON_META = frozenset((torch.native_batch_norm, torch._native_batch_norm_legit, torch.native_layer_norm))


def _remembered(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if function in _WRONG_ON_META:
        raise NotImplementedError
    if not (isinstance(function, _PURE) or function is index):
        return function(*args, **kwargs)
    try:
        key = (function, _key(args), _key(kwargs), torch.get_default_dtype())
        known = _seen.get(key)
    except TypeError:  # an argument that cannot be compared
        return function(*args, **kwargs)
    if known is None:
        known = function(*args, **kwargs)
        if len(_seen) >= _MOST:
            _seen.clear()
        _seen[key] = known
    return known


def _key(x: Any) -> Any:
    """What decides about sizes, in a form that can be compared and hashed. Raises TypeError where there is none."""
    kind = type(x)
    if kind is torch.Tensor:
        if not x.is_meta or x.layout != torch.strided:
            raise TypeError("a tensor whose values may matter")
        return (x.dtype, tuple(x.shape), x.stride(), x.is_conj(), x.is_neg())
    if isinstance(x, tuple | list):
        return (kind, *[_key(item) for item in x])
    if kind is dict:
        return tuple([(k, _key(v)) for k, v in x.items()])
    if kind is slice:
        return (slice, _key(x.start), _key(x.stop), _key(x.step))
    if isinstance(x, torch.Tensor):
        raise TypeError("a tensor of some other kind")
    return (kind, x)  # 1, 1.0 and True are equal, and mean different dtypes


# ---- changes of sizes in place ----


def before_change(rec: Recorder, target: Proxy, others: Any) -> None:
    """Infers what depends on the sizes that ``target`` has until now, and what a change of them asks for."""
    rec.meta(target)
    for p in values(others):
        if p not in rec.metas:
            infer(rec, p)
    for id in range(target._id + 1, len(rec.made)):
        made = rec.made[id]
        if made is not None and id not in rec.metas and target._id in values((made[1], made[2])):
            try:
                infer(rec, id, run=False)
            except Exception:  # its sizes depend on data, and asking for them computes it
                continue


def after_change(rec: Recorder, target: Proxy, change: Callable[[torch.Tensor, Callable[[Any], Any]], Any]) -> None:
    """Notes the sizes of ``target`` from here on; ``change(meta, on_meta)`` repeats the change on meta tensors."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        meta = meta_of(rec.metas.pop(target._id))
        try:
            change(meta, lambda x: on_meta(rec, x))
        except Exception:  # the sizes depend on data
            rec.made[target._id] = (_unknown, (), None)
            return
    rec.metas[target._id] = meta


def _unknown() -> Any:
    raise NotImplementedError("these sizes depend on data")


# ---- structures ----


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
        return {k: torch.device("meta") if k == "device" and v is not None else on_meta(rec, v) for k, v in x.items()}
    if kind is slice:
        return slice(on_meta(rec, x.start), on_meta(rec, x.stop), on_meta(rec, x.step))
    if kind.__module__ == "numpy" and getattr(x, "ndim", False):
        return meta_of(torch.as_tensor(x))
    return x
