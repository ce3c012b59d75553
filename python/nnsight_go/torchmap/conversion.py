"""Other dtypes, devices and layouts of a tensor; tensors made out of proxies."""

from __future__ import annotations

from typing import Any

import torch

from ..proxy import Proxy
from ..recorder import Recorder
from ..wire import Unrecordable
from .computing import compute
from .operators import Rule

CASTS = {
    "float": "float32", "double": "float64", "half": "float16", "bfloat16": "bfloat16", "long": "int64",
    "int": "int32", "short": "int16", "char": "int8", "byte": "uint8", "bool": "bool", "cfloat": "complex64",
    "cdouble": "complex128", "chalf": "complex32",
}  # fmt: skip


def cast(name: str) -> Rule:
    """``p.float()`` and kin."""
    dtype = getattr(torch, CASTS[name])

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _to(rec, args[0], {"dtype": dtype} | kwargs)

    return rule


def to(name: str) -> Rule:
    """``p.to(...)``."""
    return lambda rec, func, args, kwargs: _to(rec, args[0], _read(args[1:], kwargs))


_POSITIONAL = ("non_blocking", "copy")


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``Tensor.to`` by name, in each of its three forms."""
    out = dict(kwargs)
    first = args[0] if args else None
    if isinstance(first, torch.dtype):
        out |= zip(("dtype", *_POSITIONAL), args, strict=False)
    elif isinstance(first, torch.Tensor):
        out |= zip(("other", *_POSITIONAL), args, strict=False)
    elif first is None or (isinstance(first, torch.device | str | int) and not isinstance(first, bool)):
        out |= zip(("device", "dtype", *_POSITIONAL), args, strict=False)
    else:
        raise Unrecordable("to() of something else than a dtype, device or tensor")
    other = out.pop("other", None)
    if other is not None:
        out |= {"dtype": other.dtype, "device": other.device}
    return out


def _to(rec: Recorder, target: Any, wanted: dict[str, Any]) -> Proxy:
    if type(target) is not Proxy:
        target = rec.constant(target)
    wanted = {k: v for k, v in wanted.items() if v is not None and v is not False}
    device = wanted.get("device")
    if device is not None:
        device = wanted["device"] = torch.device(device)
        if device == target.device:
            del wanted["device"]
            device = None
    facts = {k: v for k, v in wanted.items() if k in ("dtype", "copy", "memory_format")}
    node = rec.call(
        "aten::to", (target,), wanted or {"copy": False, "dtype": target.dtype}, (converted, (target,), facts)
    )
    if device is not None:
        rec.moved[node] = device
    return Proxy._make(rec, node)


def converted(target: torch.Tensor, **facts: Any) -> torch.Tensor:
    """``target.to(...)`` but for the device."""
    return target.to(**{"dtype": target.dtype} | facts)


def onto_device(name: str) -> Rule:
    """``p.cpu()`` and ``p.cuda()``."""

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, rest = args[0], args[1:]
        index = rest[0] if rest else kwargs.get("device")
        device = torch.device(name, index) if isinstance(index, int) else torch.device(index or name)
        extra = {k: v for k, v in kwargs.items() if k in ("non_blocking", "memory_format")}
        return _to(rec, target, extra | {"device": device})

    return rule


def type_of(name: str) -> Rule:
    """``p.type()``, the name of a type, and ``p.type(dtype)``."""

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target = args[0]
        wanted = args[1] if len(args) > 1 else kwargs.get("dtype")
        if wanted is None:
            with torch._C.DisableTorchFunction():
                return torch.empty(0, dtype=target.dtype, device=target.device).type()
        if not isinstance(wanted, torch.dtype):
            raise Unrecordable("the name of a tensor type")
        return _to(rec, target, {"dtype": wanted})

    return rule


# ---- new tensors ----


def tensor(name: str) -> Rule:
    """``torch.tensor``, ``as_tensor`` and ``asarray`` of data that holds proxies."""

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
        wanted = dict(zip(("dtype", "device"), args[1:], strict=False)) | kwargs
        convert = {k: wanted[k] for k in ("dtype", "device") if wanted.get(k) is not None}
        if type(data) is not Proxy:
            return stacked(data, **convert)
        out = data.to(**convert) if convert else data
        if name == "tensor" or wanted.get("copy"):
            return (data.to(**convert, copy=True) if convert else data.clone()).detach()
        return out

    return rule


def stacked(data: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
    """Nested lists of tensors and numbers as one tensor, of the dtype that torch.tensor finds."""
    parts = list(_leaves(data))
    if dtype is None:
        dtype = parts[0].dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
    convert = {"dtype": dtype} if device is None else {"dtype": dtype, "device": device}
    return _stack(data, convert).detach()


def _leaves(data: Any) -> Any:
    if isinstance(data, list | tuple):
        for item in data:
            yield from _leaves(item)
    else:
        yield data if isinstance(data, torch.Tensor) else torch.tensor(data)


def _stack(data: Any, convert: dict[str, Any]) -> torch.Tensor:
    if isinstance(data, list | tuple):
        return torch.stack([_stack(item, convert) for item in data])
    return data.to(**convert) if isinstance(data, torch.Tensor) else torch.tensor(data, **convert)


def new_tensor(name: str) -> Rule:
    """``p.new_tensor(data)``."""

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        like, data = args[0], args[1] if len(args) > 1 else kwargs.get("data")
        if type(data) is not Proxy and type(like) is not Proxy:
            return compute(rec, func, args, kwargs)
        options = {k: v for k, v in kwargs.items() if v is not None and k != "data"}
        return torch.tensor(data, **({"dtype": like.dtype, "device": like.device} | options))

    return rule
