"""Calling a module of the model on values: ``model.lm_head(model.transformer.ln_f(h))``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from . import positions, wire
from .errors import InputError
from .points import Constant, Leaf, Mapping, Sequence, Tree
from .positions import here
from .proxy import Proxy
from .recorder import Recorder, current

if TYPE_CHECKING:
    from .envoy import Envoy


def call(envoy: Envoy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Records a call inside a trace of the module's model; computes it at once elsewhere."""
    rec = current.recorder
    if rec is None:
        return _compute(envoy, args, kwargs)
    envoy._recorder("forward")
    return _record(rec, envoy, args, kwargs)


def _record(rec: Recorder, envoy: Envoy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given, output = envoy._point(wire.INPUT).tree, envoy._point(wire.OUTPUT).tree
    if not any(isinstance(x, torch.Tensor) for x in (*args, *kwargs.values())):
        raise InputError(
            f"{envoy._name()} is called without a tensor",
            path=envoy.path,
            hint="Give it the values that it is to work on.",
            **positions.fields(here()),
        )

    def infer(*args: Any, **kwargs: Any) -> Any:
        lead = _lead(given, [*args, *kwargs.values()])
        return _structure(output, lambda leaf: _meta(leaf, lead))

    node = rec.module(envoy.path, args, kwargs, infer)
    if isinstance(output, Leaf):
        return Proxy._make(rec, node)
    return _items(rec, node, output)


def _items(rec: Recorder, node: int, tree: Tree) -> Any:
    """Proxies for the tensors of what a call gives, in plain containers."""
    rec.several.add(node)

    def item(key: int | str, part: Tree) -> Any:
        if isinstance(part, Constant):
            return part.value
        proxy = rec.item(node, key)
        return proxy if isinstance(part, Leaf) else _items(rec, proxy._id, part)

    if isinstance(tree, Sequence):
        return tuple(item(i, part) for i, part in enumerate(tree.items))
    assert isinstance(tree, Mapping)
    return {key: item(key, part) for key, part in tree.fields.items()}


def _leaves(tree: Tree) -> Iterator[Leaf]:
    match tree:
        case Leaf():
            yield tree
        case Sequence():
            for part in tree.items:
                yield from _leaves(part)
        case Mapping():
            for part in tree.fields.values():
                yield from _leaves(part)


def _fixed(leaf: Leaf) -> tuple[int, ...]:
    """The sizes of a leaf that do not depend on the input: those behind batch and sequence."""
    return tuple(d for d in leaf.shape if isinstance(d, int))


def _lead(given: Tree, values: list[Any]) -> tuple[int, ...]:
    """The axes of the first tensor that the module leaves alone, whatever their number."""
    first = next(x for x in values if isinstance(x, torch.Tensor))
    behind = len(_fixed(next(_leaves(given))))
    return tuple(first.shape[: first.dim() - behind])


def _meta(leaf: Leaf, lead: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(lead + _fixed(leaf), dtype=leaf.dtype, device="meta")


def _structure(tree: Tree, value: Any) -> Any:
    match tree:
        case Leaf():
            return value(tree)
        case Constant():
            return tree.value
        case Sequence():
            return tuple(_structure(part, value) for part in tree.items)
        case Mapping():
            return {key: _structure(part, value) for key, part in tree.fields.items()}


def _compute(envoy: Envoy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a module on real tensors: a trace that holds nothing else.

    Its forward pass never runs; it tells modules that look at positions and masks how long the rows are.
    """
    from . import torchmap

    first = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
    batch, tokens = tuple(first.shape[:2]) if first is not None and first.dim() >= 2 else (1, 1)
    if not 0 < tokens <= envoy._native.description["context"] or batch < 1:
        batch, tokens = 1, 1
    rec = Recorder(envoy._native)
    current.recorder = rec
    try:
        rec.open_invoke([[0] * tokens] * batch, None)
        with torchmap.Mode():
            out = _record(rec, envoy, args, kwargs)
        rec.save(out)
        rec.finish()
        return out
    finally:
        rec.close("its call has failed")
        current.recorder = None
