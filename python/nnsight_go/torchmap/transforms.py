"""Functions that do not call torch in a way that a proxy sees.

``torch.func.grad`` and ``vmap`` wrap tensors from C++, so they must be given real ones: a proxy that
enters a transform is computed first, and so is one that a function under a transform mentions.
Scripted functions are C++ as well, and are computed at their line, as custom ``autograd.Function``s are.
Compiled functions run uncompiled while a block is recorded, so that what they call is recorded.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..proxy import Proxy
from ..recorder import current, proxies

active: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack
"""Gives None where no transform is running on this thread."""

_lock = threading.Lock()


class _Shared:
    """Something of the whole process that stands while any block does, on whatever thread."""

    def __init__(self) -> None:
        self._blocks = 0
        self._stands: contextlib.AbstractContextManager[Any] | None = None

    @contextlib.contextmanager
    def held(self, make: Callable[[], contextlib.AbstractContextManager[Any]]) -> Iterator[None]:
        """Enters what ``make`` gives with the first block, and leaves it with the last one."""
        with _lock:
            self._blocks += 1
            if self._blocks == 1:
                self._stands = make()
                self._stands.__enter__()
        try:
            yield
        finally:
            with _lock:
                self._blocks -= 1
                if self._blocks == 0 and self._stands is not None:
                    self._stands.__exit__(None, None, None)


_eager, _looked_at = _Shared(), _Shared()  # compiled functions held back; custom autograd functions
_prepared = False


def prepare() -> None:
    """Lets transforms and scripted functions take proxies, once a process."""
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


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled functions run as they were written while this is entered, by any thread."""
    compiler = sys.modules.get("torch._dynamo.decorators")
    if compiler is None:  # nothing can have been compiled
        yield
        return
    with _eager.held(lambda: compiler.set_stance("force_eager")):
        yield


def functions() -> contextlib.AbstractContextManager[None]:
    """Custom autograd functions take proxies while this is entered.

    They are computed at their line, so that their own backward is part of the graph.
    """
    return _looked_at.held(_mounted)


@contextlib.contextmanager
def _mounted() -> Iterator[None]:
    function: Any = torch.autograd.Function
    found = next(kind.__dict__["apply"] for kind in function.__mro__ if "apply" in kind.__dict__)

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        bound = found.__get__(None, cls)
        if current.recorder is None or next(proxies((args, kwargs)), None) is None:
            return bound(*args, **kwargs)
        from ..gradients import custom

        return custom(current.recorder, bound, args, kwargs)

    before = function.__dict__.get("apply")
    function.apply = classmethod(apply)
    try:
        yield
    finally:
        if before is None:
            del function.apply
        else:
            function.apply = before
