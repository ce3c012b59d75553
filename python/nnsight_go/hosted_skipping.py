"""``module.skip(value)`` of hosted models: calls of modules that a forward pass leaves out.

While a pass may leave a call out, another function stands in the module's ``forward``. In such a call it gives what
the block has put there; nothing of the module runs, and what is called inside it is counted as if it had been.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import hosting, positions, skipping, structures, wire
from .errors import InputError
from .hosting import ABSENT, Spot, Visit
from .points import Constant, Leaf, Point, Sequence, Tree
from .points import Mapping as Named
from .positions import here
from .structures import Fields, Items

if TYPE_CHECKING:
    from .hosted import Layout
    from .wrapping import HostedRecorder, ModuleEnvoy

# Of a call that is left out: what is to stand in the places of no tensor that is written, by their names.
Beside = dict[str, Any]


# ---- recording ----


def skip(envoy: ModuleEnvoy, value: Any) -> None:
    """Records that an invoke does not run a module."""
    rec: Any = envoy._recorder("skip()")
    begin, end = envoy._point(wire.INPUT), envoy._point(wire.OUTPUT)
    skipping.check(rec, end)
    if rec.layout(rec.invoke).template(end.path) is hosting.OPAQUE:
        raise no_template(end)
    invoke = rec.touch(begin)  # nothing of it may have run
    rec.touch(end)
    given = _Given(rec, end)
    rec.bound[invoke, end.path, end.port] = given.assign(end.tree, envoy._name("output"), "", value)
    rec.leave_out(end.path, given.beside)


def no_template(point: Point) -> InputError:
    """The error of a module that gives what cannot be made anew."""
    return InputError(
        f"{point.path or 'the model'} gives an object that cannot be made without running it",
        path=point.path,
        hint="Assign to the tensors of its output instead, or skip the modules inside it.",
        **positions.fields(here()),
    )


class _Given:
    """What a module is to give: its tensors are written, and all else is kept beside."""

    def __init__(self, rec: HostedRecorder, point: Point) -> None:
        self._rec, self._point = rec, point
        self.beside: Beside = {}

    def assign(self, tree: Tree, name: str, at: str, new: Any) -> Any:
        """Records a part of it, and gives what a user sees of that from now on.

        Args:
            tree: the structure that the module gives there.
            name: how a user writes the part.
            at: where it stands, as tensors are named.
            new: what is to stand there.
        """
        dot = f"{at}." if at else ""
        match tree:
            case Leaf():
                if new is None and at:
                    self.beside[at] = None
                    return None
                return self._rec.write(self._point, tree, new)
            case Constant():
                if not hosting.is_plain(tree.value) and not isinstance(new, torch.Tensor):
                    self.beside[at] = new
                    return new
                return structures.assign(self._rec, self._point, tree, name, tree.value, new)
            case Sequence():
                if isinstance(new, torch.Tensor) and len(tree.items) == 1:
                    new = (new,)
                if not isinstance(new, tuple | list) or len(new) != len(tree.items):
                    self._refuse(f"{name} is a tuple of {len(tree.items)}", new, "Give a tuple of as many values.")
                parts = enumerate(zip(tree.items, new, strict=True))
                items = [self.assign(part, f"{name}[{i}]", f"{dot}{i}", x) for i, (part, x) in parts]
                return Items._make(self._rec, self._point, tree, name, items)
            case Named():
                given = hosting.named_parts(new)
                needed = {k for k, part in tree.fields.items() if _is_needed(part)}
                if given is None or set(given) - set(tree.fields) or needed - set(given):
                    what = f"{name} has the fields {', '.join(tree.fields)}"
                    hint = f"Give a dictionary of {', '.join(k for k in tree.fields if k in needed)}."
                    self._refuse(what, new, f"{hint} None is a value, where nobody looks at it.")
                fields = {}
                for k, part in tree.fields.items():
                    new = given[k] if k in given else _plain(part)
                    fields[k] = self.assign(part, f"{name}.{k}", f"{dot}{k}", new)
                return Fields._make(self._rec, self._point, tree, name, fields)

    def _refuse(self, what: str, new: Any, hint: str) -> NoReturn:
        kind = f"a {type(new).__name__}" + (f" of {len(new)}" if isinstance(new, tuple | list | dict) else "")
        raise InputError(
            f"{what}, and cannot become {kind}", path=self._point.path, hint=hint, **positions.fields(here())
        )


def _is_needed(part: Tree) -> bool:
    """Whether a part must be given: whether it holds more than plain values."""
    match part:
        case Constant():
            return not hosting.is_plain(part.value)
        case Sequence():
            return bool(part.items)
        case Named():
            return any(map(_is_needed, part.fields.values()))
    return True


def _plain(part: Tree) -> Any:
    """What stands for a part that need not be given."""
    match part:
        case Constant():
            return part.value
        case Named():
            return {}
    return ()


# ---- a pass ----


class Leaving:
    """What one forward pass leaves out.

    Calls are known as they are counted in a pass that runs everything: hooks count those that happen, and calls
    inside of what was left out come on top.

    Args:
        layout: the access points of the pass.
        left: by name: the calls that are left out. It may grow while the pass waits.
    """

    def __init__(self, layout: Layout, left: Mapping[str, Beside]) -> None:
        self._entered: dict[str, int] = {}  # by path: the call whose forward comes next
        self._inner: Visit | None = None
        self.begin(layout, left)

    def begin(self, layout: Layout, left: Mapping[str, Beside]) -> None:
        """Makes it that of another pass."""
        self._layout, self._left = layout, left
        self._missed: dict[tuple[str, int], int] = {}  # by side of a module: calls that did not happen
        self._made: dict[str, Any] = {}  # by name: what was given instead

    @property
    def paths(self) -> set[str]:
        """The modules of which calls are left out."""
        return {hosting.split(name)[0] for name in self._left}

    @contextlib.contextmanager
    def over(self, modules: Mapping[str, torch.nn.Module], paths: Iterable[str], visit: Visit) -> Iterator[Visit]:
        """Lets modules be left out while it is entered, by passes of this thread; gives what hooks are to call."""
        self._inner = visit
        with contextlib.ExitStack() as stack:
            for path in paths:
                stack.enter_context(_standing(modules[path], functools.partial(self._leave, path)))
            yield self.visit

    def visit(self, spot: Spot, value: Any) -> Any:
        """Visits an access point that a hook has come to."""
        missed = self._missed.get(_side(spot)) if self._missed else None
        if missed:
            spot = Spot(spot.path, spot.port, spot.call + missed)
        if spot.port == wire.INPUT:
            self._entered[spot.path] = spot.call
        elif spot.name in self._made:
            return self._made.pop(spot.name)
        assert self._inner is not None
        return self._inner(spot, value)

    def _leave(self, path: str) -> tuple[bool, Any]:
        """Whether the call of a module that begins is left out, and what it gives then."""
        call = self._entered.pop(path, None)  # none: somebody calls forward() itself, which is no access point
        if call is None or not self._left:
            return False, None
        spot = Spot(path, wire.OUTPUT, call)
        beside = self._left.get(spot.name)
        if beside is None:
            return False, None
        point = self._layout.points[spot.name, wire.OUTPUT]
        template = self._layout.template(spot.name)
        if template is hosting.OPAQUE:
            raise no_template(point)
        for inner in self._layout.inside(spot.name):
            side = (inner.path, inner.port)
            self._missed[side] = self._missed.get(side, 0) + 1
        assert self._inner is not None
        made = hosting.replaced(self._inner(spot, template), beside)
        if any(x is ABSENT for x in hosting.tensors(point.tree, made) or ()):
            raise InputError(
                f"{path or 'the model'} gives more in this forward pass than the skip of it says",
                path=path,
                hint="An edit skips it that was recorded for other inputs: trace the model without that edit.",
                **positions.fields(here()),
            )
        self._made[spot.name] = made
        return True, made[0] if isinstance(made, hosting.Bare) else made


def _side(spot: Spot) -> tuple[str, int]:
    """What counts the calls of an access point: a side of a module. Results of operations belong to its input."""
    owner, internal, _ = f".{spot.path}".rpartition(".source.")
    return (owner.removeprefix("."), wire.INPUT) if internal else (spot.path, spot.port)


# ---- forward ----

_MISSING = object()
_lock = threading.Lock()


class _Forward:
    """Stands in the ``forward`` of a module while passes may leave it out: those of the threads that have said so."""

    def __init__(self, module: torch.nn.Module) -> None:
        original = module.forward
        functools.update_wrapper(self, original)  # whoever asks for its parameters sees those of the original
        self._module, self._original = module, original
        self._own = module.__dict__.get("forward", _MISSING)
        self.asked: dict[int, list[Callable[[], tuple[bool, Any]]]] = {}  # by thread: who decides, innermost last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked = self.asked.get(threading.get_ident())
        if asked:
            left, value = asked[-1]()
            if left:
                return value
        return self._original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not _MISSING:
            return copy.deepcopy(self._own, memo)
        copied = memo.get(id(self._module), self._module)
        return type(copied).forward.__get__(copied)  # of the copy, not of the module that is being traced

    def restore(self) -> None:
        """Puts back what stood there."""
        own = self._module.__dict__
        if own.get("forward") is not self:
            return  # somebody has put another one there
        if self._own is _MISSING:
            del own["forward"]
        else:
            own["forward"] = self._own


@contextlib.contextmanager
def _standing(module: torch.nn.Module, decide: Callable[[], tuple[bool, Any]]) -> Iterator[None]:
    """Lets ``decide`` say at each call of a module's forward, by this thread, whether it is left out."""
    thread = threading.get_ident()
    with _lock:
        forward = module.__dict__.get("forward")
        if not isinstance(forward, _Forward):
            forward = module.__dict__["forward"] = _Forward(module)
        forward.asked.setdefault(thread, []).append(decide)
    try:
        yield
    finally:
        with _lock:
            forward.asked[thread].remove(decide)
            if not forward.asked[thread]:
                del forward.asked[thread]
            if not forward.asked:
                forward.restore()
