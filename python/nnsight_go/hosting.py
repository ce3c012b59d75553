"""The forward pass of a hosted model: hooks at its access points, and the pauses of a pass in its middle.

A pass runs as it would without us. A hook is called where the block reads or writes; it hands over what
stands there, and puts in its place what the block wants there. A pass that must wait for the rest of the
block runs on a thread of its own, one of the two at a time.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Mapping as Parts
from typing import Any

import torch

from . import wire
from .errors import InputError, NnsightError, users
from .points import Constant, Leaf, Mapping, Sequence, Tree

# Called where a pass comes to an access point, with its value; gives the value to go on with.
Visit = Callable[["Spot", Any], Any]

# Stand where a module that is not run would have given a tensor, or an object.
ABSENT = torch.empty(0, device="meta")
_OBJECT = object()

OPAQUE = object()  # stands for a template of what cannot be made anew


class Bare(tuple[Any, ...]):
    """A bare tensor that is shown as a tuple of one."""


def called(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """What a user's own function gives; an error of it is shown as theirs."""
    try:
        return function(*args, **kwargs)
    except NnsightError:
        raise
    except Exception as error:
        raise users(error)  # noqa: B904


class Unwind(BaseException):
    """Ends a forward pass of which nothing more is wanted."""


@dataclasses.dataclass(frozen=True)
class Spot:
    """An access point: which side of which call of a module, in the order of a forward pass."""

    path: str
    port: int
    call: int

    @functools.cached_property
    def name(self) -> str:
        """How it is told apart: the module's path, and the number of the call where it is not the first."""
        return named(self.path, self.call)

    @functools.cached_property
    def key(self) -> tuple[str, int]:
        """Name and port: how it is found in a layout."""
        return self.name, self.port


_spot = functools.lru_cache(maxsize=1 << 14)(Spot)  # the same ones come in every pass


def named(path: str, call: int) -> str:
    """The name of a call of a module. A path that has a colon itself always has the number behind it."""
    return f"{path}:{call}" if call or ":" in path else path


def split(name: str) -> tuple[str, int]:
    """The path of a module and the number of its call, out of its name."""
    path, colon, call = name.rpartition(":")
    return (path, int(call)) if colon else (name, 0)


# ---- structures ----


def structure(value: Any, name: str = "") -> Tree:
    """The structure of a value, with what is known of its tensors."""
    dot = f"{name}." if name else ""
    if isinstance(value, torch.Tensor):
        return Leaf(name, tuple(value.shape), value.dtype)
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        if hasattr(value, "_fields"):
            named = zip(value._fields, value, strict=True)
            return Mapping({k: structure(item, f"{dot}{k}") for k, item in named}, type(value).__name__)
        items = tuple(structure(item, f"{dot}{i}") for i, item in enumerate(value))
        return Sequence(items, is_list=isinstance(value, list))
    fields = _fields(value)
    if fields is not None and all(isinstance(key, str) for key in fields):
        kind = "" if type(value) is dict else type(value).__name__
        return Mapping({k: structure(v, f"{dot}{k}") for k, v in fields.items()}, kind)
    return Constant(value)


def named_parts(value: Any) -> dict[str, Any] | None:
    """The parts of a dictionary, a named tuple or an object with fields, by name; None where it has none."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    return _fields(value)


def _fields(value: Any) -> dict[str, Any] | None:
    """The named parts of a dictionary or an object with fields; None where it has none."""
    if isinstance(value, dict):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if hasattr(value, f.name)}
    return None


def tensors(tree: Tree, value: Any) -> list[torch.Tensor | None] | None:
    """The tensors of a value that has a structure, in order; None where it has another.

    A tensor that may be there or not (a mask that this input does not need) is None in the list where it is not.
    """
    match tree:
        case Leaf():
            return [value] if isinstance(value, torch.Tensor) or value is None else None
        case Constant():
            return [] if tree.value is None or not isinstance(value, torch.Tensor) else None
        case Sequence():
            if not isinstance(value, tuple | list) or len(value) != len(tree.items):
                return None
            parts = zip(tree.items, value, strict=True)
        case Mapping():
            fields = named_parts(value)
            if fields is None or list(fields) != list(tree.fields):
                return None
            parts = zip(tree.fields.values(), fields.values(), strict=True)
    out: list[torch.Tensor | None] = []
    for part, item in parts:
        found = tensors(part, item)
        if found is None:
            return None
        out += found
    return out


def replaced(value: Any, by: Parts[str, Any], name: str = "") -> Any:
    """A value with some of its parts replaced; containers without any stay as they are."""
    if name in by:
        return by[name]
    dot = f"{name}." if name else ""
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        keys = getattr(value, "_fields", range(len(value)))
        items = [replaced(item, by, f"{dot}{key}") for key, item in zip(keys, value, strict=True)]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    fields = _fields(value)
    if fields is None:
        return value
    new = {k: replaced(v, by, f"{dot}{k}") for k, v in fields.items()}
    if all(new[k] is fields[k] for k in fields):
        return value
    if type(value) is dict:
        return new
    if dataclasses.is_dataclass(value):
        if all(f.init for f in dataclasses.fields(value)):
            return dataclasses.replace(value, **new)  # type: ignore[type-var]
        out = copy.copy(value)
        for k, v in new.items():
            object.__setattr__(out, k, v)  # it may be frozen
        return out
    out = value.copy()
    out.update(new)
    return out


def is_plain(value: Any) -> bool:
    """Whether a value that is no tensor says all that it is, and holds on to nothing."""
    return isinstance(value, int | float | str | bool | torch.dtype | torch.device | torch.Size | type(None))


def template(tree: Tree, value: Any) -> Any:
    """What a module gave, without its tensors and objects, in whose places others can be put.

    OPAQUE where it is of a kind that cannot be made anew.
    """
    if isinstance(tree, Leaf):
        return ABSENT
    try:
        made = replaced(value, _stand_ins(tree, ""))
        return OPAQUE if tensors(tree, made) is None else made
    except Exception:  # of a class that is not made from its fields
        return OPAQUE


def _stand_ins(tree: Tree, name: str) -> dict[str, Any]:
    match tree:
        case Leaf():
            return {name: ABSENT}
        case Constant():
            return {} if is_plain(tree.value) else {name: _OBJECT}
        case Sequence():
            parts: Iterable[tuple[Any, Tree]] = enumerate(tree.items)
        case Mapping():
            parts = tree.fields.items()
    dot = f"{name}." if name else ""
    return {k: v for key, part in parts for k, v in _stand_ins(part, f"{dot}{key}").items()}


def leaves(tree: Tree) -> list[Leaf]:
    """The tensors of a structure, in order."""
    if isinstance(tree, Leaf):
        return [tree]
    match tree:
        case Sequence():
            return [leaf for part in tree.items for leaf in leaves(part)]
        case Mapping():
            return [leaf for part in tree.fields.values() for leaf in leaves(part)]
    return []


def mapped(x: Any, f: Callable[[torch.Tensor], Any]) -> Any:
    """An input with ``f`` applied to its tensors; what is no plain container stays as it is."""
    if isinstance(x, torch.Tensor):
        return f(x)
    if isinstance(x, tuple | list) and not isinstance(x, torch.Size):
        items = [mapped(item, f) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if type(x) is dict:
        return {k: mapped(v, f) for k, v in x.items()}
    return x


def all_sizes(x: Any) -> list[list[int]]:
    """The sizes of an input's tensors, in order."""
    found: list[list[int]] = []
    mapped(x, lambda tensor: found.append(list(tensor.shape)))
    return found


def sides(points: Iterable[tuple[str, int]]) -> dict[str, set[int]]:
    """The sides of modules that access points are, by path."""
    out: dict[str, set[int]] = {}
    for name, port in points:
        out.setdefault(split(name)[0], set()).add(port)
    return out


# ---- hooks ----


class Mounted:
    """Entries in tables of hooks, which go when it is undone."""

    def __init__(self) -> None:
        self._touched: list[dict[Any, Any]] = []

    def __call__(self, into: dict[Any, Any], what: Any) -> None:
        """Puts an entry into a table, behind those that it has."""
        into[self] = what
        self._touched.append(into)

    def undo(self, *_: object) -> None:
        """Takes all of them out."""
        for into in self._touched:
            into.pop(self, None)

    def __enter__(self) -> None:
        """They are there."""

    __exit__ = undo


def hooks(
    modules: dict[str, torch.nn.Module],
    ports: dict[str, set[int]],
    visit: Visit,
    wrapped: set[str],
) -> Mounted:
    """Calls ``visit`` at sides of modules until it is left, in forward passes of this thread alone.

    Args:
        modules: by path.
        ports: by path: which sides.
        visit: what to call.
        wrapped: modules whose bare output is shown as a tuple of one.
    """
    mount, owner = Mounted(), threading.get_ident()
    try:
        for path, sides in ports.items():
            module = modules[path]
            if wire.INPUT in sides:
                mount(module._forward_pre_hooks, _before(path, visit, owner))
                mount(module._forward_pre_hooks_with_kwargs, True)
            if wire.OUTPUT in sides:
                mount(module._forward_hooks, _after(path, visit, owner, path in wrapped))
    except BaseException:
        mount.undo()
        raise
    return mount


def _before(path: str, visit: Visit, owner: int) -> Callable[..., Any]:
    calls = itertools.count()

    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != owner:
            return None
        whole = {"args": args, "kwargs": kwargs}
        new = visit(_spot(path, wire.INPUT, next(calls)), whole)
        return None if new is whole else (new["args"], new["kwargs"])

    return hook


def _after(path: str, visit: Visit, owner: int, wrap: bool) -> Callable[..., Any]:
    calls = itertools.count()

    def hook(module: Any, args: Any, output: Any) -> Any:
        if threading.get_ident() != owner:
            return None
        shown = Bare((output,)) if wrap and isinstance(output, torch.Tensor) else output
        new = visit(_spot(path, wire.OUTPUT, next(calls)), shown)
        if new is shown:
            return None
        return new[0] if isinstance(new, Bare) else new

    return hook


# ---- a pass that pauses ----


class Paused:
    """A forward pass on a thread of its own, which waits wherever it is told to.

    The thread has the caller's torch state: grad and inference mode, and autocast.
    """

    def __init__(self, forward: Callable[[Visit], Any]) -> None:
        self._target: Spot | None = None
        self._value: Any = None
        self._error: BaseException | None = None
        self._ended = self._unwinding = False
        self._here, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self._state = _torch_state()
        self._thread = threading.Thread(target=self._run, args=(forward,), name="nnsight_go forward", daemon=True)
        self._started = False

    def go(self, spot: Spot | None) -> bool:
        """Goes on to an access point, or to the end, and tells whether it is there. Raises what the pass raises."""
        self._target = spot
        if not self._ended:
            if self._started:
                self._there.release()
            else:
                self._started = True
                self._thread.start()
            self._here.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return not self._ended

    @property
    def value(self) -> Any:
        """What stands where the pass waits; it goes on with what is put here."""
        return self._value

    @value.setter
    def value(self, new: Any) -> None:
        self._value = new

    def unwind(self) -> None:
        """Ends the pass where it stands."""
        self._unwinding = True
        if self._started and not self._ended:
            with contextlib.suppress(BaseException):
                self.go(None)
        if self._started:
            self._thread.join()

    def _visit(self, spot: Spot, value: Any) -> Any:
        if spot != self._target:
            return value
        self._value = value
        self._here.release()
        self._there.acquire()
        if self._unwinding:
            raise Unwind
        out, self._value = self._value, None
        return out

    def _run(self, forward: Callable[[Visit], Any]) -> None:
        try:
            with self._state():
                forward(self._visit)
        except Unwind:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._ended = True
            self._here.release()


def _torch_state() -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """This thread's torch state, to be entered by another one."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    casts = {
        kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))
    }

    @contextlib.contextmanager
    def state() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, (on, dtype) in casts.items():
                if on:
                    stack.enter_context(torch.autocast(kind, dtype))
            yield

    return state


def mismatch(spot: Spot, value: Any) -> InputError:
    """The error of a module that gives another structure than it was known for."""
    side = ("input", "output")[spot.port]
    return InputError(
        f"the {side} of {spot.path or 'the model'} has another structure than before: {_kind(value)}",
        path=spot.path,
        hint="Its forward depends on more than the sizes of the input: use values of it in the block, or a trace each.",
    )


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
