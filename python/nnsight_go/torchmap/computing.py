"""Calls on real values, at the line they stand in.

What such a call gives is real, but for what belongs to the graph: an argument that it changed is
changed in the graph as well, one that it gives back is given back as the proxy it was, and a view of
one becomes a view of the proxy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .. import shapes
from ..errors import users
from ..proxy import Proxy
from ..recorder import Recorder, proxies
from . import transforms


def compute(
    rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], changes: Iterable[int] = ()
) -> Any:
    """Calls a function now, with the real values of its proxies.

    ``changes`` are the places of arguments that it changes without saying so by its name or to autograd.
    """
    wanted = {p._id: p for p in proxies((args, kwargs))}
    with _as_recorded(rec):
        values = dict(zip(wanted, rec.force(wanted.values()), strict=True))
    silently = {args[i]._id for i in changes if i < len(args) and type(args[i]) is Proxy}
    if silently or _changes(func, kwargs):
        values = {id: v.clone() if _owns_memory(v) else v for id, v in values.items()}
    before = {id: (_version(v), v.shape) for id, v in values.items()}
    try:
        out = func(*substituted(args, values), **substituted(kwargs, values))
    except Exception as e:
        raise users(e) from None
    for id, v in values.items():
        version, shape = before[id]
        if id in silently or _version(v) != version or (version < 0 and _changes(func, kwargs)):
            _write(rec, wanted[id], v.clone(), v.shape != shape)
    if isinstance(out, torch.Tensor | tuple | list | dict) and transforms.active() is None:
        return _given_back(rec, out, wanted, values)
    return out


# These record by themselves, not by calling torch: what they record would be computed at once again
# where everything is.


def _write(rec: Recorder, target: Proxy, value: torch.Tensor, resize: bool) -> None:
    same = (shapes.same, (target,), None)
    if resize:
        sizes = list(value.shape)
        shapes.before_change(rec, target, ())
        rec.call("aten::resize_", (target, sizes), None, same)
        shapes.after_change(rec, target, lambda meta, on: meta.resize_(sizes))
    rec.call("aten::copy_", (target, value), None, same)


def _view(rec: Recorder, target: Proxy, view: torch.Tensor) -> Proxy:
    args = (target, list(view.size()), list(view.stride()), view.storage_offset())
    return Proxy._make(rec, rec.call("aten::as_strided", args, None, (torch.Tensor.as_strided, args, None)))


@contextlib.contextmanager
def _as_recorded(rec: Recorder) -> Iterator[None]:
    """Lets what was recorded run as it was meant, whatever holds at the line that asks for its value."""
    now = torch.get_default_dtype()
    with transforms.outside(), contextlib.nullcontext() if rec.autocast else torch._C._DisableAutocast():
        if now is rec.default_dtype:
            yield
            return
        torch.set_default_dtype(rec.default_dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(now)


def _changes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a function says by its name, or by ``out=``, that it changes arguments."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or "out" in kwargs


def _owns_memory(v: torch.Tensor) -> bool:
    return v.layout == torch.strided and not v.is_inference()


def _version(v: torch.Tensor) -> int:
    return -1 if v.is_inference() else v._version


def _given_back(rec: Recorder, out: Any, wanted: dict[int, Proxy], values: dict[int, torch.Tensor]) -> Any:
    """A result with proxies for what are arguments, or views of them."""
    by_memory = {m: id for id, v in values.items() if (m := _memory(v))}
    by_object = {id(v): n for n, v in values.items()}

    def back(t: torch.Tensor) -> torch.Tensor:
        if type(t) is Proxy:
            return t
        node = by_object.get(id(t))
        if node is not None:
            return wanted[node]
        node = by_memory.get(_memory(t))
        if node is None or t.dtype != values[node].dtype or t.is_conj() or t.is_neg():
            return t
        return _view(rec, wanted[node], t)

    return mapped(back, out)


def _memory(t: torch.Tensor) -> int:
    """The address of a tensor's storage, 0 where it has none."""
    if type(t) is Proxy or not torch._C._has_storage(t):
        return 0
    return t.untyped_storage().data_ptr()


def mapped(f: Callable[[torch.Tensor], Any], x: Any) -> Any:
    """A structure of results with ``f`` applied to its tensors; containers keep their types."""
    if isinstance(x, torch.Tensor):
        return f(x)
    kind = type(x)
    if kind is list or kind is tuple:
        return kind(mapped(f, item) for item in x)
    if kind is dict:
        return {k: mapped(f, v) for k, v in x.items()}
    if isinstance(x, tuple) and kind is not torch.Size:
        items = [mapped(f, item) for item in x]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    return x


def substituted(x: Any, values: dict[int, torch.Tensor]) -> Any:
    """A structure of arguments with real values for its proxies."""
    kind = type(x)
    if kind is Proxy:
        return values[x._id]
    if kind is dict:
        return {k: substituted(v, values) for k, v in x.items()}
    if kind is slice:
        return slice(*(substituted(v, values) for v in (x.start, x.stop, x.step)))
    if isinstance(x, list | tuple) and kind is not torch.Size:
        items = [substituted(item, values) for item in x]
        if kind is list or kind is tuple:
            return kind(items)
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    return x
