"""A hosted model: a Python module whose forward pass stays Python's, and whose access points the engine visits."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import logging
import operator
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import _ffi, hosting, operations, positions, wire
from .errors import InputError
from .hosted_skipping import Leaving
from .hosting import Paused, Spot, Unwind, Visit
from .native import Run, _close, _pointers
from .points import Leaf, Point, Tree
from .positions import here
from .recorder import current
from .torchmap import transforms

if TYPE_CHECKING:
    from .hosted_skipping import Beside
    from .proxy import Proxy
    from .rowwise import Cuts
    from .straight import Key, Straight

Given = tuple[tuple[Any, ...], dict[str, Any]]

_KEPT = 32  # layouts of a model that are remembered
_training = operator.itemgetter("training")
compiled: Callable[[torch.nn.Module], Any] = operator.attrgetter("_compiled_call_impl")
"""What a module.compile() has left."""

_WANTS = 2  # what a step says of a run that needs an access point


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The access points of one kind of input, in the order of a forward pass."""

    spots: list[Spot]
    points: dict[tuple[str, int], Point]
    calls: dict[tuple[str, int], int]  # how often a module is called, by path and port
    given: Given | None = None  # that input, its tensors without data; None where it is not known so
    templates: dict[str, Any] = dataclasses.field(default_factory=dict)  # by name: what is more than a tensor

    @classmethod
    def of(
        cls,
        spots: list[Spot],
        trees: dict[tuple[str, int], Tree],
        given: Given | None = None,
        templates: dict[str, Any] | None = None,
    ) -> Layout:
        """The layout of a pass that came to these access points, where things of these structures stood."""
        points = {
            (s.name, s.port): Point(s.name, s.port, order, trees[s.name, s.port]) for order, s in enumerate(spots)
        }
        calls: dict[tuple[str, int], int] = {}
        for s in spots:
            calls[s.path, s.port] = max(calls.get((s.path, s.port), 0), s.call + 1)
        return cls(spots, points, calls, given, templates or {})

    def template(self, name: str) -> Any:
        """What a call of a module gives, without its tensors; OPAQUE where that cannot be made anew."""
        bare = isinstance(self.points[name, wire.OUTPUT].tree, Leaf)
        return hosting.ABSENT if bare else self.templates.get(name, hosting.OPAQUE)

    def inside(self, name: str) -> list[Spot]:
        """The access points of modules inside a call of a module."""
        sides = [(s.name, s.port) for s in self.spots]
        first, last = sides.index((name, wire.INPUT)), sides.index((name, wire.OUTPUT))
        return [s for s in self.spots[first + 1 : last] if not self.points[s.name, s.port].internal]

    @functools.cached_property
    def names(self) -> tuple[tuple[str, int, tuple[str, ...]], ...]:
        """What the engine is told of it."""
        return tuple(
            (s.name, s.port, tuple(leaf.name for leaf in hosting.leaves(self.points[s.name, s.port].tree)))
            for s in self.spots
        )

    @functools.cached_property
    def first(self) -> dict[tuple[str, int], Point]:
        """The access points of the first call of every module, by path and port."""
        return {(s.path, s.port): self.points[s.key] for s in self.spots if s.call == 0}

    @functools.cached_property
    def operations(self) -> dict[tuple[str, int], dict[str, Point]]:
        """The results of operations by name, of each call of a module: its path, and the number of the call."""
        out: dict[tuple[str, int], dict[str, Point]] = {}
        for spot in self.spots:
            point = self.points[spot.name, spot.port]
            if point.internal:
                path, _, name = f".{spot.path}".rpartition(".source.")
                out.setdefault((path.removeprefix("."), spot.call), {})[name] = point
        return out


class Hosted:
    """A module, what is known of its forward passes, and the engine's models of them."""

    job = None  # values are there when a run has ended
    by_input = True  # which access points there are depends on the input

    def __init__(self, module: torch.nn.Module, batch_dim: int | None = None) -> None:
        self.module = module
        self.batch_dim = batch_dim  # the axis of rows, if the user has said which
        self.cuts: dict[Any, Cuts] = {}  # by kind of input: how its rows lie at access points (rowwise)
        self.modules = dict(module.named_modules(remove_duplicate=True))
        self._all = list(self.modules.values())
        self._optimized = {path for path, m in self.modules.items() if _is_optimized(m)}
        # Whether a module trains stands among its attributes, where it is found soonest; of scripted ones it is in C++.
        kinds = {kind for kind in set(map(type, self._all)) if _asks_for_training(kind)}
        asking = [m for m in self._all if type(m) in kinds or "forward" in vars(m)]
        self._attributes = [vars(m) for m in asking if "training" in vars(m)]
        self._scripted = [m for m in asking if "training" not in vars(m)]
        first = {id(m): path for path, m in self.modules.items()}
        self.paths = {path: first[id(m)] for path, m in module.named_modules(remove_duplicate=False)}
        self.wrapped: set[str] = set()  # modules whose bare output is shown as a tuple of one
        self._layouts: OrderedDict[Any, Layout] = OrderedDict()
        self.schedules: dict[Any, Any] = {}  # of blocks (straight)
        self.known: dict[int, Any] = {}  # blocks that may say the same again, by where they stand (known)
        self._insides: weakref.WeakKeyDictionary[Layout, Layout] = weakref.WeakKeyDictionary()
        self.sourced = False  # a trace has asked for operations
        self.ops: dict[tuple[str, int], Point] = {}  # those of every pass, which native models know
        self.steps: OrderedDict[Any, list[Layout]] = OrderedDict()  # of generations (hosted_generation)
        self.latest: Layout | None = None  # of the kind of input that was traced last
        # that kind, and its layout, unless all has been forgotten
        self._latest: tuple[Any, Layout | None] = (None, None)
        self._handles: dict[Any, int] = {}
        self._handle_of: weakref.WeakKeyDictionary[Layout, int] = weakref.WeakKeyDictionary()
        # a parameter goes where its module goes
        self._anchor = next(itertools.chain(module.parameters(), module.buffers()), None)

    @property
    def device(self) -> torch.device:
        """Where the module's first parameter or buffer is; the CPU where it has none."""
        return torch.device("cpu") if self._anchor is None else self._anchor.device

    @property
    def points(self) -> dict[tuple[str, int], Point]:
        """The access points of the invoke that is being recorded."""
        rec: Any = current.recorder
        layout: Layout = rec.layout(rec.invoke)
        return layout.points

    def explain(self, *_: Any) -> NoReturn:
        """Refuses: the engine plans no forward pass of Python's."""
        raise InputError(
            "tracer.explain() says what the engine computes, and a wrapped module's forward pass is Python's",
            hint="print(tracer.graph) shows what was recorded.",
            **positions.fields(here()),
        )

    # ---- what a forward pass looks like ----

    def layout(self, given: Given) -> Layout:
        """The access points of a forward pass of that input, which is tried out on fake tensors once a kind."""
        key = self.kind(given)
        at, known = self._latest
        if at == key and known is not None:
            return known
        known = self._layouts.get(key)
        if known is None:
            known = self._found_out(key, given, really=True)
        with contextlib.suppress(KeyError):  # another thread has had all forgotten
            self._layouts.move_to_end(key)
        self._latest, self.latest = (key, known), known
        return known

    def imagined(self, given: Given) -> Layout:
        """The same of an input that is made up: nothing runs on real tensors. Raises what the module raises."""
        key = self.kind(given)
        return self._layouts.get(key) or self._found_out(key, given, really=False)

    def alike(self, layout: Layout) -> list[Layout]:
        """Other layouts that are known, of inputs for which the same runs."""
        return [other for other in list(self._layouts.values()) if other is not layout and other.names == layout.names]

    def _found_out(self, key: Any, given: Given, really: bool) -> Layout:
        found = self._layouts[key] = self._try_out(given, really)
        while len(self._layouts) > _KEPT:
            self._layouts.popitem(last=False)
        return found

    def kind(self, given: Given) -> Any:
        """What decides about the structure of a forward pass, as far as it can be seen before."""
        trains = (*map(_training, self._attributes), *[m.training for m in self._scripted])
        return _ffi.calls()["frozen"](given), trains

    def inside(self, layout: Layout, given: Given, really: bool = True) -> Layout:
        """A layout with the results of operations as well, for which that input is tried out once more.

        With ``really=False`` nothing runs on real tensors; it raises what the module raises.
        """
        known = self._insides.get(layout)
        if known is None:
            self.sourced = True
            try:
                known = self._insides[layout] = self._try_out(given, really, layout)
            except InputError:
                self.forget()  # the next trace tries anew
                raise
        return known

    def looked_into(self) -> Layout | None:
        """The last kind of input whose operations are known, with them."""
        return next(
            (self._insides[layout] for layout in reversed(self._layouts.values()) if layout in self._insides), None
        )

    def forget(self) -> None:
        """Forgets what forward passes look like, after one that was different."""
        self._layouts.clear()
        self._latest = (None, None)
        self.schedules.clear()
        self.known.clear()

    def _try_out(self, given: Given, really: bool, alone: Layout | None = None) -> Layout:
        """What a forward pass comes to: modules alone or, where their layout is given, operations as well."""
        inside = alone is not None
        spots: list[Spot] = []
        trees: dict[tuple[str, int], Tree] = {}
        templates: dict[str, Any] = {}

        def visit(spot: Spot, value: Any) -> Any:
            spots.append(spot)
            trees[spot.name, spot.port] = tree = hosting.structure(value)
            if spot.port == wire.OUTPUT and not isinstance(tree, Leaf):
                templates[spot.name] = hosting.template(tree, value)
            return value

        with self.aside():
            try:
                with contextlib.nullcontext() if really else _quietly():
                    self._fake(given, visit, inside)
            except Exception:
                if not really:
                    raise
                spots.clear()
                trees.clear()
                templates.clear()
                self._really(given, visit, inside)
        if alone is not None:
            return operations.between(alone, self.modules, spots, trees)
        return Layout.of(spots, trees, _outline(given), templates)

    @contextlib.contextmanager
    def aside(self) -> Iterator[Callable[[], bool]]:
        """For passes that nobody asked for: random numbers and buffers are afterwards as they were.

        Gives a function that tells whether these passes have left them alone so far.
        """
        remembered = self.module.buffers() if any(m.training for m in self._all) else ()
        before = [(b, b.clone()) for b in remembered]  # batch norm changes them behind the back of their version
        with torch.random.fork_rng(), torch.no_grad():
            state = torch.random.get_rng_state()
            on_gpu = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None

            def untouched() -> bool:
                return (
                    torch.equal(state, torch.random.get_rng_state())
                    and (on_gpu is None or torch.equal(on_gpu, torch.cuda.get_rng_state(self.device)))
                    and all(torch.equal(b, value) for b, value in before)
                )

            try:
                yield untouched
            finally:
                for buffer, value in before:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)

    def seen(self, given: Given, points: Iterable[Key]) -> dict[tuple[str, int, str], torch.Tensor]:
        """What stands at access points in a pass of copies of an input: by name, port and leaf."""
        found: dict[tuple[str, int, str], torch.Tensor] = {}
        wanted = set(points)

        def visit(spot: Spot, value: Any) -> Any:
            if (spot.name, spot.port) in wanted:
                tree = hosting.structure(value)
                for leaf, tensor in zip(hosting.leaves(tree), hosting.tensors(tree, value) or (), strict=False):
                    if tensor is not None:
                        found[spot.name, spot.port, leaf.name] = tensor.clone()
            return value

        args, kwargs = hosting.mapped(given, torch.clone)
        with self._hooks(hosting.sides(wanted), visit, inside=False):
            self.module(*args, **kwargs)
        return found

    def hooked(self, visit: Visit) -> contextlib.AbstractContextManager[None]:
        """Calls ``visit`` at both sides of every module while it is entered."""
        return self._hooks(self.everywhere(), visit, inside=False)

    def everywhere(self) -> dict[str, set[int]]:
        """Both sides of every module."""
        return {path: {wire.INPUT, wire.OUTPUT} for path in self.modules}

    def _fake(self, given: Given, visit: Visit, inside: bool) -> None:
        mode = _fake_mode()(allow_non_fake_inputs=True)
        meta = self.device.type == "meta"  # where no input has its data
        args, kwargs = hosting.mapped(given, lambda x: mode.from_tensor(x.to("meta") if meta else x))
        with mode, self._hooks(self.everywhere(), visit, inside):
            self.module(*args, **kwargs)

    def _really(self, given: Given, visit: Visit, inside: bool) -> None:
        """On real tensors, where fake ones do not do."""
        args, kwargs = hosting.mapped(given, torch.clone)
        with self._hooks(self.everywhere(), visit, inside):
            self.module(*args, **kwargs)

    def _hooks(self, ports: dict[str, set[int]], visit: Visit, inside: bool) -> contextlib.AbstractContextManager[None]:
        if not inside and ports.keys() <= self.modules.keys():
            plain = hosting.hooks(self.modules, ports, visit, self.wrapped)
            return self._uncompiled(plain) if self.compiles(ports) else plain
        named = {path for path in ports if path not in self.modules}
        sides = {path: sides for path, sides in ports.items() if path not in named}
        return self._seeing(sides, visit, None if inside else named)

    def compiles(self, paths: Iterable[str]) -> bool:
        """Whether hooks of modules would be called from compiled code, which has them traced or left out."""
        if not self._optimized and not any(map(compiled, self._all)):
            return False
        for path, module in self.modules.items():
            whole = compiled(module) is not None  # its own hooks are in there, too
            if whole or path in self._optimized:
                below = f"{path}." if path else ""
                if any(p.startswith(below) if p != path else whole for p in paths):
                    return True
        return False

    @contextlib.contextmanager
    def _uncompiled(self, hooks: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        with transforms.uncompiled(), hooks:
            yield

    @contextlib.contextmanager
    def _seeing(self, sides: dict[str, set[int]], visit: Visit, wanted: set[str] | None) -> Iterator[None]:
        """Hooks, and the mode that sees operations: of these names, or all."""
        with (
            operations.seen(self.modules, visit, wanted) as at_side,
            hosting.hooks(self.modules, sides, at_side, self.wrapped),
        ):
            yield

    # ---- runs ----

    def handle(self, layout: Layout) -> int:
        """The engine's model of a layout."""
        known = self._handle_of.get(layout)
        if known is not None:
            return known
        key = layout.names
        handle = self._handles.get(key)
        if handle is None:
            points = [{"path": n, "port": ("input", "output")[p], "leaves": list(leaves)} for n, p, leaves in key]
            out = ctypes.c_uint64()
            lib = _ffi.lib()
            _ffi.check(lib.nng_hosted_new, json.dumps(points).encode(), ctypes.byref(out))
            handle = self._handles[key] = out.value
            weakref.finalize(self, _close, lib, handle)
        self._handle_of[layout] = handle
        return handle

    def run(self, given: Given) -> None:
        """A forward pass that nobody looks into."""
        hosting.called(self.module, *given[0], **given[1])

    def forward(
        self,
        given: Given,
        ports: dict[str, set[int]],
        visit: Visit,
        inside: bool = False,
        leaving: Leaving | None = None,
    ) -> None:
        """A forward pass that is visited at sides of modules, and at operations.

        Args:
            given: its input.
            ports: by path: which sides; the output of operations by theirs.
            visit: what to call.
            inside: the results of all operations are visited.
            leaving: the calls of modules that it leaves out, some of those that are visited.
        """
        if leaving is not None:
            with leaving.over(self.modules, ports.keys() & self.modules.keys(), visit) as outer:
                self.forward(given, ports, outer, inside)
            return
        with self._hooks(ports, visit, inside):
            self.run(given)

    def straight(
        self, given: Given, layout: Layout, block: Straight, invoke: int, stops: bool, left: Mapping[str, Beside]
    ) -> None:
        """A forward pass in whose hooks a block that goes straight ahead is done.

        Args:
            given: its input.
            layout: its access points.
            block: what is to be done.
            invoke: for which invoke.
            stops: nothing runs behind the last of it.
            left: the calls of modules that it leaves out.
        """
        schedule = block.schedule
        missing = schedule.steps[invoke].copy()

        def visit(spot: Spot, value: Any) -> Any:
            ids = missing.pop(spot.key, None)
            if ids is None:
                return value
            leaves = self.tensors(spot, layout.points[spot.key].tree, value)
            if block.do(ids, leaves):
                value = hosting.replaced(value, leaves)
            if stops and not missing:
                raise Unwind
            return value

        if schedule.first[invoke]:
            block.do(schedule.first[invoke], {})
        if stops and not missing:
            return
        leaving = Leaving(layout, left) if left else None
        try:
            self.forward(given, _with(schedule.sides[invoke], leaving), visit, leaving=leaving)
        except Unwind:  # all of it is done
            return
        if missing:
            raise self.missed(next(s for s in layout.spots if (s.name, s.port) in missing))

    def wrong(self, spot: Spot, value: Any) -> InputError:
        """The error of an access point where no tensor stands; ``...`` is there where the pass has not come."""
        if value is ...:
            return self.missed(spot)
        self.forget()
        return hosting.mismatch(spot, value)

    def tensors(self, spot: Spot, tree: Tree, value: Any) -> dict[str, Any]:
        """The tensors of what stands at an access point by their names, in order; None for one that is not there.

        Raises:
            InputError: it has not the structure that it is known to have.
        """
        if type(tree) is Leaf and isinstance(value, torch.Tensor) and value is not hosting.ABSENT:  # most are
            return {tree.name: value}
        found = hosting.tensors(tree, value)
        if found is None:
            self.forget()
            raise hosting.mismatch(spot, value)
        names = [leaf.name for leaf in hosting.leaves(tree)]
        return {n: None if x is hosting.ABSENT else x for n, x in zip(names, found, strict=True)}

    def missed(self, spot: Spot) -> InputError:
        """The error of an access point that a pass did not come to."""
        self.forget()
        return InputError(
            f"{spot.path or 'the model'} was not called in this forward pass, or earlier than it was known to be",
            path=spot.path,
            hint="The order of its modules depends on more than the sizes of the input: use a trace each.",
            **positions.fields(here()),
        )


class HostedRun(Run):
    """A trace on its way through the engine and the forward passes of a module.

    Args:
        hosted: the module.
        layout: of its passes.
        given: the inputs, a pass each.
        ports: by path: the sides of modules that the trace may name yet, or None for all.
        left: by pass: the calls of modules that it leaves out. It may grow.
    """

    def __init__(self, hosted: Hosted, layout: Layout, given: Sequence[Given], graph: bytes, constants: Any, end: bool):
        super().__init__(_ffi.lib().nng_run_new, hosted.handle(layout), graph, constants, end)
        self._hosted, self._layout, self._given = hosted, layout, given
        self._paused: Paused | None = None
        self._pass = 0  # the forward pass that is under way, or to come
        self._at: Spot | None = None  # where it waits
        self.ports: dict[str, set[int]] = {}
        self.left: dict[int, dict[str, Beside]] = {}
        self.absent: set[tuple[int, str, int, str]] = set()  # by pass, name, port and leaf: what was not there
        self.last = end
        self.inside = False  # operations may be named later
        self.stops = False  # nothing runs behind what is wanted last

    def more(self, graph: bytes, constants: Sequence[torch.Tensor], end: bool) -> None:
        """Adds what the program says next."""
        self.last = end
        super().more(graph, constants, end)

    def results(self, adopt: Sequence[Proxy] | None) -> list[torch.Tensor]:
        """Runs the forward passes as far as what was asked for needs, at the end to theirs."""
        wanted = self._step()
        if not self.last:
            while wanted is not None:
                wanted = self._reach(*wanted)
            return self._found(adopt)
        while wanted is not None and self._paused is not None and wanted[0] == self._pass:
            wanted = self._reach(*wanted)
        self._finish_paused(wanted)
        for number in range(self._pass, len(self._given)):
            if self.stops and wanted is None:
                break
            self._pass = number
            wanted = self._run_through(number, wanted)
        return self._found(adopt)

    def free(self) -> None:
        """Ends the run and the pass that waits."""
        paused, self._paused = self._paused, None
        if paused is not None:
            paused.unwind()
        super().free()

    # ---- the engine's side ----

    def _step(self) -> tuple[int, int] | None:
        """Works until an access point is wanted, and gives it: number of the pass, and of the point."""
        if self._work() != _WANTS:
            return None
        forward, point = ctypes.c_int32(), ctypes.c_int32()
        _ffi.check(_ffi.lib().nng_run_wanted, self._handle, ctypes.byref(forward), ctypes.byref(point))
        return forward.value, point.value

    def _feed(self, spot: Spot, value: Any) -> tuple[tuple[int, int] | None, Any]:
        """Hands over what stands at an access point; gives what is wanted next, and what is to stand there."""
        tree = self._layout.points[spot.name, spot.port].tree
        by_name = self._hosted.tensors(spot, tree, value)
        found = list(by_name.values())
        self.absent.update((self._pass, spot.name, spot.port, name) for name, x in by_name.items() if x is None)
        with _pointers(found) as pointers:
            _ffi.check(_ffi.lib().nng_run_feed, self._handle, pointers, len(found))
        wanted = self._step()
        return wanted, self._put_back(spot, tree, value)

    def _put_back(self, spot: Spot, tree: Tree, value: Any) -> Any:
        lib, py = _ffi.lib(), _ffi.py()
        array, count = ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_int64()
        out = _ffi.Buf()
        _ffi.check(lib.nng_run_given, self._handle, ctypes.byref(out), ctypes.byref(array), ctypes.byref(count))
        try:
            numbers = json.loads(out.take())
            if not numbers:
                return value
            names = [leaf.name for leaf in hosting.leaves(tree)]
            new = {names[n]: py.nngpy_wrap(array[i]) for i, n in enumerate(numbers)}
        finally:
            lib.nng_tensors_free(array, count)
        return hosting.replaced(value, new)

    # ---- forward passes ----

    def _run_through(self, number: int, wanted: tuple[int, int] | None) -> tuple[int, int] | None:
        """A whole pass on this thread, with hooks on what the trace names alone."""

        def visit(spot: Spot, value: Any) -> Any:
            nonlocal wanted
            if wanted is None or wanted[0] != number or spot != self._layout.spots[wanted[1]]:
                return value
            wanted, new = self._feed(spot, value)
            if wanted is None and self.stops:
                raise Unwind
            return new

        leaving = self._leaving(number) if self.left.get(number) else None
        with contextlib.suppress(Unwind):
            self._hosted.forward(self._given[number], _with(self.ports, leaving), visit, leaving=leaving)
        if wanted is not None and wanted[0] == number:
            raise self._hosted.missed(self._layout.spots[wanted[1]])
        return wanted

    def _leaving(self, number: int) -> Leaving:
        """What a pass leaves out."""
        return Leaving(self._hosted.layout(self._given[number]), self.left.setdefault(number, {}))

    def _reach(self, number: int, point: int) -> tuple[int, int] | None:
        """Lets a pass go on to an access point, where it waits, and gives what is wanted next."""
        spot = self._layout.spots[point]
        if number != self._pass:
            self._finish_paused((number, point))
            for before in range(self._pass, number):  # of which nothing is wanted but what else it does
                self._run_through(before, (number, point))
            self._pass = number
        if self._paused is None:
            everywhere = self._hosted.everywhere()
            leaving = self._leaving(number)  # lines that follow may say what
            self._paused = Paused(
                lambda visit: self._hosted.forward(self._given[number], everywhere, visit, self.inside, leaving)
            )
        self.waiting()
        if not self._paused.go(spot):
            raise self._hosted.missed(spot)
        self._at = spot
        wanted, self._paused.value = self._feed(spot, self._paused.value)
        return wanted

    def waiting(self) -> None:
        """Puts back what the block has changed where the pass waits."""
        if self._paused is not None and self._at is not None:
            tree = self._layout.points[self._at.name, self._at.port].tree
            self._paused.value = self._put_back(self._at, tree, self._paused.value)

    def _finish_paused(self, wanted: tuple[int, int] | None) -> None:
        """Lets the pass that waits run to its end."""
        if self._paused is None:
            return
        self.waiting()
        paused, self._paused, self._at = self._paused, None, None
        if self.stops and wanted is None:
            paused.unwind()
        else:
            paused.go(None)
        self._pass += 1


def _is_optimized(module: torch.nn.Module) -> bool:
    """Whether a module is what torch.compile() gives for one."""
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")  # else nothing can have been compiled
    return compiler is not None and isinstance(module, compiler.OptimizedModule)


def _with(ports: dict[str, set[int]], leaving: Leaving | None) -> dict[str, set[int]]:
    """Sides of modules, and both of those that are left out."""
    both = {wire.INPUT, wire.OUTPUT}
    return ports if leaving is None else ports | dict.fromkeys(leaving.paths, both)


def _asks_for_training(kind: type[torch.nn.Module]) -> bool:
    """Whether what modules of a class do may depend on whether they train. Torch's own tell in their code."""
    if not kind.__module__.startswith("torch.nn.modules."):
        return True
    classes = kind.__mro__[: kind.__mro__.index(torch.nn.Module)]
    functions = [f for cls in classes for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    return any("training" in f.__code__.co_names for f in functions)


@functools.cache
def _fake_mode() -> Callable[..., Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Fake(FakeTensorMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with torch._C.DisableTorchFunction():  # what it calls itself, the module does not call
                return super().__torch_dispatch__(func, types, args, kwargs)

    return Fake


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What fails on tensors without data is no mistake, and torch does not tell of it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _outline(given: Given) -> Given | None:
    """An input without its data, which may be kept; None where it holds what is not known to hold no data."""
    outline: Given = hosting.mapped(given, lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"))
    stack: list[Any] = [outline]
    while stack:
        x = stack.pop()
        if type(x) is dict:
            stack += x.values()
        elif isinstance(x, tuple | list):
            stack += x
        elif not isinstance(x, torch.Tensor | int | float | str | torch.dtype | None):
            return None
    return outline
