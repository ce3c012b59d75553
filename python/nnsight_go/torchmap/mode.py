"""What catches torch calls, and hands each to its rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..errors import InternalError
from ..proxy import Proxy, told
from ..recorder import Recorder, current, proxies
from ..wire import Unrecordable
from . import rules, transforms
from .computing import compute
from .operators import changes_first

_push, _pop = torch._C._push_on_torch_function_stack, torch._C._pop_torch_function_stack
_default_dtype, _transform = torch.get_default_dtype, transforms.active
_SETITEM = torch.Tensor.__setitem__


class Mode(TorchFunctionMode):
    """Catches, inside a block, calls that mention a proxy where torch does not look for one.

    Those are factories (``torch.tensor([p, q])``), numbers (``torch.full(size, p)``) and real tensors
    that are given proxies.
    """

    def __enter__(self) -> Mode:
        transforms.begin()
        _push(self)  # as torch's own class does, without two calls more
        return self

    def __exit__(self, *exception: Any) -> None:
        _pop()
        transforms.end()

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
        return _outside(func, args, kwargs)
    if rec.localized is not None:
        if rec.gathered is not None and _changes_another(rec, func, args, kwargs):
            rec.gathered.flush()
            if next(proxies((args, kwargs)), None) is None:
                return func(*args, **kwargs)
        args, kwargs = rec.localized(args), rec.localized(kwargs)
    try:
        rule = rules.known[func]
    except KeyError:
        rule = rules.known[func] = rules.choose(func)
    except TypeError:  # a function that cannot be hashed
        rule = rules.choose(func)
    try:
        # a graph runs after its lines: what a line means only there and then is computed there and then
        if _transform() is not None or _default_dtype() is not rec.default_dtype:
            return rules.at_once(rule)(rec, func, args, kwargs)
        return rule(rec, func, args, kwargs)
    except Unrecordable:
        return compute(rec, func, args, kwargs)


def _outside(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls a function between the traces of a session, on values of those that wait: they are done first."""
    found = list(proxies((args, kwargs)))
    for p in found:
        if type(p) is Proxy:  # no longer, once another one has been asked for
            p._rec.outside(p)
    if not found:
        raise InternalError(f"{func} was called on a proxy outside of a trace")
    return func(*args, **kwargs)


def _changes_another(rec: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call changes a value of another trace in place: that changes the value itself, there and then."""
    name = getattr(func, "__name__", "")
    in_place = changes_first(name) or name == "__setitem__"
    targets = [*(args[:1] if in_place else ()), kwargs.get("out")]
    return any(p._rec is not rec for p in proxies(targets))


_NUMBERS = (int, float, bool)


def set_item(target: Proxy, index: Any, value: Any) -> None:
    """Records ``target[index] = value``; a number, which most blocks store, takes the straight way."""
    rec = current.recorder
    straight = rec is not None and rec.localized is None and type(value) in _NUMBERS
    if straight and _transform() is None and _default_dtype() is rec.default_dtype:  # type: ignore[union-attr]
        rec.set_index(target, index, value)  # type: ignore[union-attr]
        return
    dispatch(_SETITEM, (Proxy,), (target, index, value), {})


told.dispatch, told.set_item = dispatch, set_item
