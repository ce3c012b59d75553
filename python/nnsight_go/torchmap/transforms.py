"""Functions that do not call torch in a way that a proxy sees.

``torch.func.grad`` and ``vmap`` wrap tensors from C++, so they must be given real ones: a proxy that
enters a transform is computed first, and so is one that a function under a transform mentions.
Scripted functions are C++ as well, and are computed at their line, as custom ``autograd.Function``s are.
Compiled functions run uncompiled while a block is recorded, so that what they call is recorded.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import _ffi
from ..proxy import Proxy
from ..recorder import current, proxies

active: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
"""Gives None where no transform is running on this thread."""

_lock = threading.Lock()


_prepared = False


def prepare() -> None:
    """Lets transforms, scripted functions and custom autograd functions take proxies, once a process."""
    global _prepared
    if _prepared:
        return
    with _lock:
        if not _prepared:
            from torch._functorch import eager_transforms, vmap

            for module, name in ((vmap, "_add_batch_dim"), (eager_transforms, "_wrap_for_grad")):
                setattr(module, name, _on_real(getattr(module, name)))
            for script in (torch._C.ScriptFunction, torch._C.ScriptMethod):
                setattr(script, "__call__", _computed(script.__call__))  # noqa: B010
            torch.autograd.Function.apply = classmethod(_apply)
            _prepared = True


def _on_real(function: Callable[..., Any]) -> Callable[..., Any]:
    def on_real(x: Any, *args: Any) -> Any:
        return function(real(x) if type(x) is Proxy else x, *args)

    return on_real


def _computed(call: Callable[..., Any]) -> Callable[..., Any]:
    def computed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if current.recorder is not None and next(proxies((args, kwargs)), None) is not None:
            from .computing import compute

            return compute(current.recorder, call, (self, *args), kwargs)
        return call(self, *args, **kwargs)

    return computed


def real(proxy: Proxy) -> torch.Tensor:
    """The value of a proxy, computed outside of the transform that asks for it."""
    proxy._rec.alive(proxy)
    with outside():
        return proxy._rec.force([proxy])[0]


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Suspends the transforms that are running, so that values can be computed."""
    if active() is None:
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


def begin() -> None:
    """Readies torch for a block of this thread."""
    if not _prepared:
        prepare()
    if "torch._dynamo.eval_frame" in sys.modules:
        hold_back()
    _ffi.calls()["inside"](1)


def end() -> None:
    """Undoes ``begin``."""
    _ffi.calls()["inside"](-1)


# ---- compiled functions ----


@functools.cache
def hold_back() -> None:
    """Lets compiled functions run as they were written where a block is recorded, from now on."""
    compiler: Any = sys.modules["torch._dynamo.eval_frame"]
    chosen, inside = compiler._callback_from_stance, _ffi.calls()["inside"]

    def callback(given: Any) -> Any:
        return None if inside(0) else chosen(given)  # None: nothing is compiled

    compiler._callback_from_stance = callback


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled functions run as they were written on this thread while this is entered."""
    if "torch._dynamo.eval_frame" in sys.modules:  # else nothing can have been compiled
        hold_back()
    _ffi.calls()["inside"](1)
    try:
        yield
    finally:
        _ffi.calls()["inside"](-1)


# ---- custom autograd functions: computed at their line, so that their own backward is part of the graph ----

_found = next(kind.__dict__["apply"] for kind in torch.autograd.Function.__mro__ if "apply" in kind.__dict__)


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    bound = _found.__get__(None, cls)
    if current.recorder is None or next(proxies((args, kwargs)), None) is None:
        return bound(*args, **kwargs)
    from ..gradients import custom

    return custom(current.recorder, bound, args, kwargs)
