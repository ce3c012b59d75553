"""From a call of torch's Python API to nodes of the graph.

``dispatch`` receives every torch call that touches a proxy. A function is looked up once and gets a
rule: most are one ATen operator of the same name, whose overload the engine chooses by the arguments;
functions written in Python run their body, whose inner calls come back here; the irregular ones stand
in tables below. What no rule can record is computed at once on real values.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.overrides import TorchFunctionMode

from . import draws
from .errors import InternalError, NnsightError, users
from .positions import fields, here
from .proxy import Proxy
from .recorder import Recorder, Results, current, proxies
from .shapes import infer
from .wire import Unrecordable

# rule(recorder, function, args, kwargs) -> what the call gives
Rule: TypeAlias = Callable[[Recorder, Any, tuple[Any, ...], dict[str, Any]], Any]


class Mode(TorchFunctionMode):
    """Catches, inside a block, calls that mention a proxy where torch does not look for one.

    Those are factories (``torch.tensor([p, q])``), numbers (``torch.full(size, p)``) and real tensors
    that are given proxies.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (types and Proxy in types) or _mentions(args) or (kwargs and _mentions(kwargs.values())):
            return dispatch(func, types, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)


def _mentions(items: Any) -> bool:
    for x in items:
        kind = type(x)
        if kind is Proxy or ((kind is list or kind is tuple) and _mentions(x)):
            return True
    return False


def dispatch(func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Records a torch call that mentions proxies, and gives proxies for its results."""
    rec = current.recorder
    if rec is None:
        for p in proxies((args, kwargs)):
            p._rec.refuse(p)
        raise InternalError(f"{func} was called on a proxy outside of a trace")
    try:
        rule = _rules[func]
    except KeyError:
        rule = _rules[func] = _rule(func)
    except TypeError:  # a function that cannot be hashed
        rule = _rule(func)
    try:
        return rule(rec, func, args, kwargs)
    except Unrecordable:
        return compute(rec, func, args, kwargs)


# ---- operators ----


@dataclasses.dataclass(frozen=True, slots=True)
class _Op:
    """What the schemas of an operator say: its argument names, and what it gives.

    ``results`` is the number of tensors (one tensor: 1), -1 for a list of tensors, 0 where overloads
    differ, and None where something else than tensors comes out.
    """

    name: str
    arguments: frozenset[str]
    results: int | None


def _operator(name: str) -> _Op | None:
    schemas = [
        s
        for s in torch._C._jit_get_schemas_for_operator(f"aten::{name}")
        if torch._C._dispatch_has_kernel(f"aten::{name}.{s.overload_name}" if s.overload_name else f"aten::{name}")
    ]
    if not schemas:
        return None
    functional = [s for s in schemas if not any(a.is_out for a in s.arguments)] or schemas
    counts = {_count(s) for s in functional}
    return _Op(
        f"aten::{name}",
        frozenset(a.name for s in functional for a in s.arguments),
        counts.pop() if len(counts) == 1 else (None if None in counts else 0),
    )


def _count(schema: Any) -> int | None:
    kinds = [str(r.type) for r in schema.returns]
    if kinds and all(k == "Tensor" for k in kinds):
        return len(kinds)
    return -1 if kinds == ["List[Tensor]"] else None


# Names that torch's Python functions take for arguments of ATen's.
_ALIASES = {"input": "self", "axis": "dim", "keepdims": "keepdim", "x": "self", "x1": "self", "x2": "other"}

# Methods that take sizes one by one: x.view(2, 3).
_VARARGS = frozenset(
    "view reshape expand permute repeat flip tile new_zeros new_ones new_empty broadcast_to resize_ roll".split()
)


def _direct(op: _Op, name: str) -> Rule:
    in_place = name.endswith("_") and not name.endswith("__")
    varargs = name in _VARARGS

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if in_place and type(args[0]) is not Proxy:
            return compute(rec, func, args, kwargs)  # a tensor from outside changes now, as its owner expects
        if varargs and len(args) > 2 and type(args[1]) is int and name != "roll":
            args = (args[0], list(args[1:]))
        if kwargs:
            out = kwargs.get("out")
            if out is not None:
                return _into(rec, func, args, kwargs)
            kwargs = _named(op, kwargs)
        for x in args:
            if type(x) is list:  # the caller may change it later
                args = tuple(list(x) if type(x) is list else x for x in args)
                break
        if in_place:
            target = args[0]
            reshaped = name in _RESHAPING and rec.meta(target)
            rec.call(op.name, args, kwargs, (func, args, kwargs))
            if reshaped is not False:
                with torch._C.DisableTorchFunction():
                    func(reshaped, *args[1:], **kwargs)
            return target
        node = rec.call(op.name, args, kwargs, (func, args, kwargs))
        if op.results == 1:
            return Proxy._make(rec, node)
        return _several(rec, node, op, name)

    return rule


# In-place operations that change the sizes of what they work on.
_RESHAPING = frozenset(
    "t_ transpose_ swapaxes_ swapdims_ squeeze_ unsqueeze_ resize_ resize_as_ as_strided_ swap_dims_".split()
)


def _named(op: _Op, kwargs: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for k, v in kwargs.items():
        if k not in op.arguments:
            k = _ALIASES.get(k, k)
            if (k not in op.arguments and v is None) or k in ("out", "names"):
                continue
            if k == "requires_grad" and k not in op.arguments:
                continue
        out[k] = v
    return out


def _several(rec: Recorder, node: int, op: _Op, name: str) -> Any:
    """Proxies for the several results of a node, in the kind of tuple that torch gives."""
    rec.several.add(node)
    if op.results is not None and op.results > 1:
        items = [rec.item(node, i) for i in range(op.results)]
        cls = getattr(torch.return_types, name, None)
        return cls(items) if cls is not None else tuple(items)
    known = infer(rec, node)
    if isinstance(known, torch.Tensor):
        rec.several.discard(node)
        return Proxy._make(rec, node)
    if not isinstance(known, tuple | list):
        raise Unrecordable(name)
    items = [rec.item(node, i) for i in range(len(known))]
    cls = type(known)
    return tuple(items) if cls is tuple else cls(items)


def _into(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call with ``out=``: computed, then copied there."""
    rest = {k: v for k, v in kwargs.items() if k != "out"}
    out = kwargs["out"]
    outs = out if isinstance(out, tuple | list) else (out,)
    if not all(type(o) is Proxy for o in outs):
        return compute(rec, func, args, kwargs)
    made = dispatch(func, (), args, rest)
    for o, m in zip(outs, made if isinstance(made, tuple | list) else (made,), strict=True):
        o.copy_(m)
    return out


# ---- values at once ----


def compute(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a function now, with the real values of its proxies; what it gives is real."""
    wanted = {p._id: p for p in proxies((args, kwargs))}
    values = dict(zip(wanted, rec.force(wanted.values()), strict=True))
    name = getattr(func, "__name__", "")
    target = args[0] if args and type(args[0]) is Proxy and name.endswith("_") and not name.endswith("__") else None
    if target is not None:
        values[target._id] = values[target._id].clone()
    try:
        out = func(*_replaced(args, values), **_replaced(kwargs, values))
    except Exception as e:
        raise users(e) from None
    if target is None:
        return out
    target.copy_(out)  # the change belongs to the proxy
    return target


def _replaced(x: Any, values: dict[int, torch.Tensor]) -> Any:
    kind = type(x)
    if kind is Proxy:
        return values[x._id]
    if kind is list or kind is tuple:
        return kind(_replaced(item, values) for item in x)
    if kind is dict:
        return {k: _replaced(v, values) for k, v in x.items()}
    if kind is slice:
        return slice(_replaced(x.start, values), _replaced(x.stop, values), _replaced(x.step, values))
    return x


def _body(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function written in Python: its body runs on the proxies, and the calls in it are recorded."""
    return torch._C._skip_one_hop_torch_function(func, (Proxy,), args, kwargs)


def _facts(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A question about sizes or dtypes: answered by meta tensors."""
    from .shapes import on_meta

    for p in proxies((args, kwargs)):
        rec.meta(p)
    with torch._C.DisableTorchFunction():
        return func(*on_meta(rec, args), **on_meta(rec, kwargs))


# ---- tables ----

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
    "__eq__": "eq", "__ne__": "ne", "__lt__": "lt", "__le__": "le", "__gt__": "gt", "__ge__": "ge",
}  # fmt: skip

# Special methods whose operator takes the arguments the other way round.
_REFLECTED = {
    f"__r{k}__": _BINARY[k] for k in ("pow", "matmul", "floordiv", "mod", "lshift", "rshift", "and", "or", "xor")
}

# Attributes that are one operator.
_VIEWS = {"T": "numpy_T", "mT": "mT", "H": "matrix_H", "mH": "mH", "real": "real", "imag": "imag", "data": "detach"}

# Attributes and functions that sizes and dtypes answer.
_FACTS = frozenset(
    """shape dtype ndim layout names itemsize nbytes is_sparse is_sparse_csr is_quantized is_mkldnn is_nested
    is_leaf retains_grad output_nr size dim ndimension numel nelement stride is_contiguous element_size
    is_floating_point is_complex is_signed is_conj is_neg is_inference storage_offset is_same_size result_type
    promote_types can_cast broadcast_shapes has_names is_coalesced is_distributed is_shared _nested_tensor_size
    __len__ is_nonoverlapping_and_dense dim_order""".split()
)

# Functions of which only a concrete value gives the answer.
_VALUES = frozenset(
    """item tolist numpy __bool__ __int__ __float__ __index__ __complex__ __array__ __contains__ __dlpack__
    __dlpack_device__ allclose equal is_nonzero data_ptr untyped_storage storage _storage is_set_to
    apply_ map_ map2_ histogramdd nonzero_static from_numpy argwhere""".split()
)

_CASTS = {
    "float": "float32", "double": "float64", "half": "float16", "bfloat16": "bfloat16", "long": "int64",
    "int": "int32", "short": "int16", "char": "int8", "byte": "uint8", "bool": "bool", "cfloat": "complex64",
    "cdouble": "complex128", "chalf": "complex32",
}  # fmt: skip

_GRADIENTS = frozenset("backward retain_grad register_hook register_post_accumulate_grad_hook grad grad_fn".split())

_ONE_OR_TWO = frozenset(("max", "min", "median", "nanmedian"))  # a reduction, or values and indices along an axis


def _operator_or_fail(name: str) -> _Op:
    op = _operator(name)
    if op is None:
        raise InternalError(f"torch {torch.__version__} has no operator aten::{name}")
    return op


def _rule(func: Any) -> Rule:
    """Chooses the rule of a function."""
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        return _property(func.__self__.__name__, name)
    for table, choose in _TABLES:
        if name in table:
            return choose(name)
    if name in draws.NAMES:
        return draws.rule
    if isinstance(func, types.FunctionType) and name != "unflatten":  # its body calls super()
        return _body
    op = _operator(name.removeprefix("_") if name in ("_softmax_backward",) else name)
    if op is None or op.results is None:
        return compute
    if isinstance(func, types.BuiltinFunctionType | types.MethodDescriptorType) or op is not None:
        return _direct(op, name)
    return compute


def _property(name: str, access: str) -> Rule:
    if access == "__get__":
        if name in _VIEWS:
            op = _operator_or_fail(_VIEWS[name])
            return lambda rec, func, args, kwargs: Proxy._make(rec, rec.call(op.name, args, None, (func, args, None)))
        if name in _FACTS:
            return _facts
        if name in ("is_cuda", "is_cpu", "is_xpu", "is_mps", "is_meta"):
            return lambda rec, func, args, kwargs: args[0].device.type == name.removeprefix("is_")
        if name == "device":
            return lambda rec, func, args, kwargs: args[0].device
        if name == "requires_grad":
            return _facts
        if name in _GRADIENTS:
            return _no_gradients
        return compute
    if name == "data" and access == "__set__":
        return lambda rec, func, args, kwargs: args[0].copy_(args[1]) and None
    return _no_gradients


def _no_gradients(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(getattr(func, "__self__", None), "__name__", None) or getattr(func, "__name__", "this")
    raise NnsightError(
        f"{name} is not available inside a trace",
        hint="Save the values, and work with their gradients after the block.",
        **fields(here()),
    )


def _comparison(name: str) -> Rule:
    direct = _direct(_operator_or_fail(_METHODS[name]), _METHODS[name])

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for x in args:
            if not isinstance(x, torch.Tensor | int | float | complex) and type(x).__module__ != "numpy":
                return name == "__ne__" if name in ("__eq__", "__ne__") else NotImplemented
        return direct(rec, func, args, kwargs)

    return rule


def _method(name: str) -> Rule:
    if name in ("__eq__", "__ne__"):
        return _comparison(name)
    return _direct(_operator_or_fail(_METHODS[name]), _METHODS[name])


def _reflected(name: str) -> Rule:
    op = _operator_or_fail(_REFLECTED[name])

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return Proxy._make(rec, rec.call(op.name, (args[1], args[0]), None, (func, args, None)))

    return rule


def _divided(name: str) -> Rule:
    # as torch computes other / self, to the last bit
    return lambda rec, func, args, kwargs: args[0].reciprocal() * args[1]


def _getitem(name: str) -> Rule:
    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, index = args
        if type(target) is not Proxy:
            target = rec.constant(target)
        return rec.index(target, index)

    return rule


def _setitem(name: str) -> Rule:
    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, index, value = args
        if type(target) is not Proxy:
            return compute(rec, func, args, kwargs)
        if isinstance(value, list | tuple):
            value = torch.tensor(value)
        rec.set_index(target, index, value)
        return None

    return rule


def _cast(name: str) -> Rule:
    dtype = getattr(torch, _CASTS[name])

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _to(rec, func, args[0], (func, args, kwargs), dtype=dtype, **kwargs)

    return rule


def _to(rec: Recorder, func: Any, target: Any, made: Any, **kwargs: Any) -> Proxy:
    kwargs = {k: v for k, v in kwargs.items() if v is not None and v is not False}
    node = rec.call("aten::to", (target,), kwargs, made)
    if "device" in kwargs:
        rec.moved[node] = kwargs["device"]
    return Proxy._make(rec, node)


def _convert(name: str) -> Rule:
    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target, rest = args[0], args[1:]
        if type(target) is not Proxy:
            target = rec.constant(target)
        made = (func, args, kwargs)
        if name in ("cpu", "cuda"):
            index = rest[0] if rest else kwargs.get("device")
            device = torch.device(name, index) if isinstance(index, int) else torch.device(index or name)
            return _to(rec, func, target, (_same, (target,), None), device=device)
        if name == "type":
            wanted = rest[0] if rest else kwargs.get("dtype")
            if wanted is None:
                with torch._C.DisableTorchFunction():
                    return torch.empty(0, dtype=target.dtype, device=target.device).type()
            if not isinstance(wanted, torch.dtype):
                raise Unrecordable("the name of a tensor type")
            return _to(rec, func, target, made, dtype=wanted)
        other = rest[0] if rest else kwargs.get("other")
        if isinstance(other, torch.Tensor):
            elsewhere = other.device if other.device != target.device else None
            extra = {k: v for k, v in kwargs.items() if k in ("non_blocking", "copy", "memory_format")}
            return _to(
                rec, func, target, (_as, (target, other.dtype), None), dtype=other.dtype, device=elsewhere, **extra
            )
        copy = kwargs.pop("copy", False)
        rest = tuple(x for x in rest if x is not None)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*rest, **kwargs)
        return _to(
            rec, func, target, (_as, (target, dtype), None), dtype=dtype, device=device, non_blocking=non_blocking,
            memory_format=memory_format, copy=copy,
        )  # fmt: skip

    return rule


def _same(target: torch.Tensor) -> torch.Tensor:
    return target


def _as(target: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return target if dtype is None else target.to(dtype)


def _reduction(name: str) -> Rule:
    one = _direct(_Op(f"aten::{name}", frozenset(("self", "other", "dim", "keepdim")), 1), name)
    two = _direct(_Op(f"aten::{name}", frozenset(("self", "dim", "keepdim")), 2), name)

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = len(args) + sum(k in ("dim", "axis", "other") for k in kwargs) - ("input" not in kwargs)
        pair = given > 0 and not any(isinstance(x, torch.Tensor) for x in (*args[1:], kwargs.get("other")))
        return (two if pair else one)(rec, func, args, kwargs)

    return rule


def _where(name: str) -> Rule:
    three = _direct(dataclasses.replace(_operator_or_fail("where"), results=1), "where")

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) + len(kwargs) == 1:
            return compute(rec, func, args, kwargs)  # where(condition) gives as many rows as there are
        if func is torch.Tensor.where:  # self.where(condition, other)
            args, func = (args[1], args[0], *args[2:]), torch.where
            kwargs = {{"condition": "condition", "other": "other"}.get(k, k): v for k, v in kwargs.items()}
        return three(rec, func, args, kwargs)

    return rule


def _nonzero(name: str) -> Rule:
    direct = _direct(_operator_or_fail("nonzero"), "nonzero")

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("as_tuple"):
            columns = args[0].nonzero()
            return tuple(columns[:, i] for i in range(args[0].ndim)) if args[0].ndim else columns.unbind(1)
        return direct(rec, func, args, {k: v for k, v in kwargs.items() if k != "as_tuple"})

    return rule


def _tensor(name: str) -> Rule:
    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        data = args[0] if args else kwargs["data"]
        out = data.clone().detach() if type(data) is Proxy and name == "tensor" else _stacked(data)
        convert = {k: kwargs[k] for k in ("dtype", "device") if kwargs.get(k) is not None}
        if "dtype" not in convert and type(data) is not Proxy and not out.dtype.is_floating_point:
            pass
        return out.to(**convert) if convert else out

    return rule


def _stacked(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return torch.stack([_stacked(item) for item in data])
    return data if isinstance(data, torch.Tensor) else torch.tensor(data)


def _new_tensor(name: str) -> Rule:
    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        like, data = args[0], args[1] if len(args) > 1 else kwargs.pop("data")
        kwargs = {"dtype": like.dtype, "device": like.device} | {k: v for k, v in kwargs.items() if v is not None}
        return torch.tensor(data, **kwargs)

    return rule


def _requires_grad(name: str) -> Rule:
    op = _operator_or_fail("requires_grad_")

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rec.call(op.name, args, kwargs, (func, args, kwargs))
        return args[0]

    return rule


def _get_device(name: str) -> Rule:
    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = args[0].device.index
        return -1 if index is None else index

    return rule


_TABLES: list[tuple[Any, Callable[[str], Rule]]] = [
    (_METHODS, _method),
    (_REFLECTED, _reflected),
    (("__rdiv__", "__rtruediv__"), _divided),
    (_FACTS, lambda name: _facts),
    (_VALUES, lambda name: compute),
    (_GRADIENTS, lambda name: _no_gradients),
    (_CASTS, _cast),
    (("to", "type", "cpu", "cuda"), _convert),
    (_ONE_OR_TWO, _reduction),
    (("__getitem__",), _getitem),
    (("__setitem__",), _setitem),
    (("where",), _where),
    (("nonzero",), _nonzero),
    (("tensor", "as_tensor", "asarray"), _tensor),
    (("new_tensor",), _new_tensor),
    (("requires_grad_",), _requires_grad),
    (("get_device",), _get_device),
]

_rules: dict[Any, Rule] = {}

__all__ = ["Mode", "Results", "Rule", "compute", "dispatch"]
