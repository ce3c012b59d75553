"""Calls to check, out of PyTorch's own database of operators and samples."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from conformance import Call, eager


def database() -> list[Any]:
    """PyTorch's database of operators. Importing it changes torch for the process, which is put back."""
    from torch._C import ScriptFunction, ScriptMethod

    calls = ScriptFunction.__call__, ScriptMethod.__call__
    from torch.testing._internal.common_methods_invocations import op_db

    ScriptFunction.__call__, ScriptMethod.__call__ = calls
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return list(op_db)


def name_of(op: Any) -> str:
    """``nn.functional.dropout``, and the variant where an operator has several entries."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


# Results whose numbers are whatever memory held.
_UNINITIALISED = ("empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided", "empty_permuted")


def dtype_of(op: Any) -> torch.dtype | None:
    """float32, or what an operator that knows no float32 works on."""
    supported = op.supported_dtypes("cpu")
    order = (torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64, torch.bfloat16)
    return next((d for d in (*order, *sorted(supported, key=str)) if d in supported), None)


def cases(op: Any, most: int) -> dict[str, list[Call]]:
    """The calls of an entry by variant, of its first ``most`` samples; none where nothing runs on the CPU."""
    dtype = dtype_of(op)
    if dtype is None:
        return {}
    torch.manual_seed(0)
    samples = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=False), most))
    values = op.name not in _UNINITIALISED
    out: dict[str, list[Call]] = {}
    for variant, function in variants(op).items():
        out[variant] = [
            Call(function, (s.input, *s.args), dict(s.kwargs), values, changes="inplace" in variant)
            for s in samples
            if not (variant == "inplace" and s.broadcasts_input)
        ]
    if op.supports_out:
        out["out"] = [call for s in samples if (call := _with_out(op, s, values)) is not None]
    return out


def variants(op: Any) -> dict[str, Any]:
    """An entry's function, method, in-place method and operator functions, one name each."""
    found = {"function": op.op, "method": op.method_variant, "inplace": op.inplace_variant}
    found |= {"operator": op.operator_variant, "inplace operator": op.inplace_operator_variant}
    return {k: f for k, f in found.items() if f is not None}


def _with_out(op: Any, sample: Any, values: bool) -> Call | None:
    try:
        made = eager(Call(op.op, (sample.input, *sample.args), dict(sample.kwargs))).result
    except Exception:
        return None
    if isinstance(made, torch.Tensor):
        blank: Any = torch.zeros_like(made)
    elif isinstance(made, tuple | list) and all(isinstance(t, torch.Tensor) for t in made):
        blank = tuple(torch.zeros_like(t) for t in made)
    else:
        return None
    return Call(op.op, (sample.input, *sample.args), dict(sample.kwargs) | {"out": blank}, values, changes=True)
