"""The proxy: a tensor that is not there yet.

It is an instance of a ``torch.Tensor`` subclass over an empty placeholder, so that all Python that
works on tensors works on it. Operations on it arrive in ``__torch_function__`` and are recorded
(``torchmap``). When the trace ends, a saved proxy becomes its tensor in place: same object, another
class. The placeholder lies on the meta device, so that code that goes around ``__torch_function__``
fails instead of computing on nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch

from . import _ffi
from .wire import Kind

if TYPE_CHECKING:
    from .recorder import Recorder

# An integer without axes, because torch takes that, and no other tensor, for a number where it wants one.
PLACEHOLDER = torch.empty((), dtype=torch.int64, device="meta")

_BACKWARD, _GETITEM = torch.Tensor.backward, torch.Tensor.__getitem__


class _Told:
    """Who records what is done with proxies: ``torchmap`` says so, which knows of them."""

    dispatch: Callable[..., Any]
    set_item: Callable[[Any, Any, Any], None]


told = _Told()


class _Asked:
    """What a proxy lacks as long as the lines of its block are known (``known``): being asked for it ends that."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, proxy: Any, kind: Any) -> Any:
        if proxy is None:
            raise AttributeError(self._name)
        _ffi.calls()["recorder"](None)  # which is made if need be
        try:
            return vars(proxy)[self._name]
        except KeyError:
            pass
        from .recorder import elsewhere

        raise elsewhere("this value")


class Proxy(torch.Tensor):
    """The value of a node of the trace that is being recorded.

    ``shape``, ``dtype``, ``device`` and ``len()`` are known without computing anything; a concrete
    value (``item()``, ``bool()``, ``numpy()``, ...) runs the model as far as it must.
    """

    _rec: Recorder = cast("Recorder", _Asked("_rec"))
    _id: int = cast("int", _Asked("_id"))

    @staticmethod
    def _make(rec: Recorder, id: int) -> Proxy:
        proxy: Proxy = _ffi.calls()["proxy"](Proxy, PLACEHOLDER, rec, id)
        if rec.living is not None:
            rec.living.add(proxy)
        return proxy

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return told.dispatch(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> NoReturn:
        # calls from C++ that come here have not gone through __torch_function__, so nothing is known of them
        from .errors import InputError
        from .positions import fields, here

        raise InputError(
            f"{func} was called from C++ on a value of the trace, which has no numbers there",
            hint="Give such a function a tensor, torch.as_tensor(x.numpy()), or call it after the block.",
            **fields(here()),
        )

    # ---- saving ----

    def save(self) -> Proxy:
        """Keeps the value: after the block this object is the tensor."""
        self._rec.alive(self)
        self._rec.save(self)
        return self

    @property
    def value(self) -> Proxy:
        """The value itself: a proxy inside the block, the tensor after it."""
        self._rec.alive(self)
        return self

    # ---- gradients ----

    def backward(self, *args: Any, **kwargs: Any) -> Any:
        """A backward pass from here: a line, or a block in which gradients are read and changed.

        A method of its own, since other libraries put theirs into the place of torch's.
        """
        return told.dispatch(_BACKWARD, (Proxy,), (self, *args), kwargs)

    # ---- parts: torch would come here as well, on a longer way ----

    def __getitem__(self, index: Any) -> Any:
        return told.dispatch(_GETITEM, (Proxy,), (self, index), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        told.set_item(self, index, value)

    # ---- facts ----

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """The sizes, known before the value is."""
        return self._rec.shape(self)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype, known before the value is."""
        return self._rec.rough(self).dtype

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """The number of axes."""
        return self._rec.rough(self).dim()

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the value will be."""
        self._rec.alive(self)
        return self._rec.device_of(self._id)

    def __len__(self) -> int:
        shape = self.shape
        if not shape:
            raise TypeError("len() of a 0-d tensor")
        return shape[0]

    def __iter__(self) -> Iterator[Any]:
        if not self.shape:
            raise TypeError("iteration over a 0-d tensor")
        return iter(self.unbind(0))

    # ---- showing ----

    def _label(self) -> str:
        rec, node = self._rec, self._rec.nodes[self._id]
        match node[0]:
            case Kind.READ:
                path, port, leaf = node[4], node[5], node[7]
                text = (path or "model") + (".input", ".output")[port]
                return text + "".join(f"[{p}]" if p.isdigit() else f".{p}" for p in leaf.split(".") if p)
            case Kind.CALL:
                return f"{node[4].removeprefix('aten::')}(...)"
            case Kind.MODULE:
                return f"{node[4]}(...)"
            case Kind.GRAD:
                return f"{Proxy._make(rec, node[4][1])._label()}.grad"
            case Kind.CONST:
                return "a constant"
            case Kind.INDEX:
                return f"{Proxy._make(rec, node[4][1])._label()}[...]"
            case Kind.ITEM:
                return f"{Proxy._make(rec, node[4][1])._label()}[{node[5]!r}]"
        return "a value"

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        from .recorder import current

        name = self._label()
        if self._rec.closed is not None:
            return f"<Proxy of {name}: {self._rec.closed}>"
        known = ""
        if current.recorder is self._rec:
            try:
                known = self._rec.shown(self)
            except Exception:  # showing a value must neither fail nor run anything; using it tells what is wrong
                known = ""
        return f"<Proxy {known}from {name}>"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else repr(self)

    # ---- what cannot be ----

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = out = self.clone()
        return out

    def __copy__(self) -> Any:
        return self.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        rec = self._rec
        if rec.waiting is not None:
            rec.outside(self)
            return self.__reduce_ex__(protocol)  # of the tensor that it is now
        rec.alive(self)
        raise TypeError(
            f"{self._label()} has no value yet and cannot be pickled: save it, and pickle it after the block"
        )
