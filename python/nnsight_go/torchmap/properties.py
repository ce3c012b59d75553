"""Attributes of tensors, and questions that sizes and dtypes answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import gradients
from ..errors import NnsightError
from ..positions import fields, here
from ..proxy import Proxy
from ..recorder import Recorder
from .computing import compute
from .operators import Rule, need

# Attributes that are one operator.
_VIEWS = {"T": "numpy_T", "mT": "mT", "H": "matrix_H", "mH": "mH", "real": "real", "imag": "imag", "data": "detach"}

# Attributes and functions that sizes and dtypes answer.
FACTS = frozenset(
    """shape dtype ndim layout names itemsize nbytes is_sparse is_sparse_csr is_quantized is_mkldnn is_nested
    is_leaf output_nr size dim ndimension numel nelement stride is_contiguous element_size
    is_floating_point is_complex is_signed is_conj is_neg is_inference storage_offset is_same_size result_type
    promote_types can_cast broadcast_shapes has_names is_coalesced is_distributed is_shared _nested_tensor_size
    __len__ is_nonoverlapping_and_dense dim_order""".split()
)

# What only a tensor has that is there already.
_LATER = frozenset("register_post_accumulate_grad_hook grad_fn".split())

# What the block says of gradients: by function or attribute.
GRADIENTS: dict[str, Callable[..., Any]] = {
    "backward": gradients.backward,
    "retain_grad": lambda rec, proxy: gradients.of(rec).retain(proxy),
    "register_hook": lambda rec, proxy, hook: gradients.of(rec).hook(proxy, hook),
    "requires_grad_": gradients.require,
    "grad": gradients.read,
    "requires_grad": lambda rec, proxy: rec.gradients is not None and rec.gradients.follows(proxy),
    "retains_grad": lambda rec, proxy: rec.gradients is not None and rec.gradients.retains(proxy),
}
_SETTERS: dict[str, Callable[..., Any]] = {"grad": gradients.write, "requires_grad": gradients.require}

_DEVICES = frozenset("is_cuda is_cpu is_xpu is_mps is_meta is_ipu is_maia is_mtia is_vulkan is_xla".split())


def facts(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A question about sizes or dtypes: answered by meta tensors."""
    return rec.fact(func, args, kwargs)


def attribute(name: str, access: str) -> Rule:
    """Reading or setting an attribute."""
    if access != "__get__":
        if name == "data" and access == "__set__":
            return lambda rec, func, args, kwargs: args[0].copy_(args[1]) and None
        if access == "__set__" and name in _SETTERS:
            return gradient(_SETTERS[name])
        if access == "__delete__" and name == "grad":
            return lambda rec, func, args, kwargs: gradients.write(rec, args[0], None)
        return no_gradients
    if name in _VIEWS:
        op = need(_VIEWS[name])
        return lambda rec, func, args, kwargs: Proxy._make(rec, rec.call(op.name, args, None, (func, args, None)))
    verb = GRADIENTS.get(name)
    if verb is not None:
        return gradient(verb)
    if name in FACTS:
        return facts
    if name in _DEVICES:
        return lambda rec, func, args, kwargs: args[0].device.type == name.removeprefix("is_")
    if name == "device":
        return lambda rec, func, args, kwargs: args[0].device
    return no_gradients if name in _LATER else compute


def gradient(verb: Callable[..., Any]) -> Rule:
    """What a verb of ``gradients`` does with a proxy. One that is called on a tensor from outside has its own."""

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if type(args[0]) is not Proxy:
            return compute(rec, func, args, kwargs)
        return verb(rec, *args, **kwargs)

    return rule


def no_gradients(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What only a tensor with a gradient has."""
    name = getattr(getattr(func, "__self__", None), "__name__", None) or getattr(func, "__name__", "this")
    raise NnsightError(
        f"{name} is not available inside a trace",
        hint="Save the value, and use it after the block.",
        **fields(here()),
    )


def get_device(name: str) -> Rule:
    """``p.get_device()``: the number of its GPU, or -1."""

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = args[0].device.index
        return -1 if index is None else index

    return rule
