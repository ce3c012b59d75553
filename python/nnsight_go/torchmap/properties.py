"""Attributes of tensors, and questions that sizes and dtypes answer."""

from __future__ import annotations

from typing import Any

from .. import shapes
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
    is_leaf retains_grad output_nr size dim ndimension numel nelement stride is_contiguous element_size
    is_floating_point is_complex is_signed is_conj is_neg is_inference storage_offset is_same_size result_type
    promote_types can_cast broadcast_shapes has_names is_coalesced is_distributed is_shared _nested_tensor_size
    __len__ is_nonoverlapping_and_dense dim_order requires_grad""".split()
)

GRADIENTS = frozenset("backward retain_grad register_hook register_post_accumulate_grad_hook grad grad_fn".split())

_DEVICES = frozenset("is_cuda is_cpu is_xpu is_mps is_meta is_ipu is_maia is_mtia is_vulkan is_xla".split())


def facts(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A question about sizes or dtypes: answered by meta tensors."""
    return rec.fact(func, args, kwargs)


def attribute(name: str, access: str) -> Rule:
    """Reading or setting an attribute."""
    if access != "__get__":
        if name == "data" and access == "__set__":
            return lambda rec, func, args, kwargs: args[0].copy_(args[1]) and None
        return no_gradients
    if name in _VIEWS:
        op = need(_VIEWS[name])
        return lambda rec, func, args, kwargs: Proxy._make(rec, rec.call(op.name, args, None, (func, args, None)))
    if name in FACTS:
        return facts
    if name in _DEVICES:
        return lambda rec, func, args, kwargs: args[0].device.type == name.removeprefix("is_")
    if name == "device":
        return lambda rec, func, args, kwargs: args[0].device
    return no_gradients if name in GRADIENTS else compute


def no_gradients(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What only a tensor with a gradient has."""
    name = getattr(getattr(func, "__self__", None), "__name__", None) or getattr(func, "__name__", "this")
    raise NnsightError(
        f"{name} is not available inside a trace",
        hint="Save the values, and work with their gradients after the block.",
        **fields(here()),
    )


def get_device(name: str) -> Rule:
    """``p.get_device()``: the number of its GPU, or -1."""

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = args[0].device.index
        return -1 if index is None else index

    return rule


def requires_grad(name: str) -> Rule:
    """``p.requires_grad_()``."""
    op = need("requires_grad_")

    def rule(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rec.call(op.name, args, kwargs, (shapes.same, args[:1], None))
        return args[0]

    return rule
