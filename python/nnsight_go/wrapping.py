"""``NNsight(module)``: the language of a trace on any PyTorch module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from . import (
    envoy,
    hooked,
    hosted_skipping,
    hosting,
    known,
    positions,
    renaming,
    sessions,
    skipping,
    straight,
    tracebacks,
    wire,
)
from . import remote as remotely
from .edits import Edit, Editable, Editing
from .envoy import Envoy
from .errors import InputError, ModulePathError, NnsightError, OpError
from .generation import StepRecorder
from .graphs import Graph
from .hosted import Given, Hosted, HostedRun, Layout, compiled
from .hosted_source import HostedSource
from .native import NoTensor, Run, become
from .points import Leaf, Point
from .positions import Place, here
from .proxy import Proxy
from .recorder import NOWHERE, Recorder, current
from .rowwise import Together, apart
from .scanning import ScanRecorder
from .stored import Facts
from .tracing import Invoker, Tracer
from .wire import Kind, Node

if TYPE_CHECKING:
    from .hosted_skipping import Beside

ROW: list[list[int]] = [[0]]  # an invoke of a hosted model is one row to the engine, whatever its input is


class HostedRecorder(Recorder):
    """Records a trace of a module."""

    native: Any
    uncalled = "Use the module around it, whose code does its work."
    foreign = ("an edit", "Trace the model without this edit, or with an input of the kind that it was recorded for.")
    site: tuple[int, Any, int, NNsight] | None = None  # where its block stands, if that may be remembered (known)
    sourced = False  # layouts have operations, which a line or an edit has asked for
    whole: Place = None  # the line that begins an invoke without an input, which is the last then
    _told = 0
    _unkept: Sequence[int] = ()  # values that were kept without the engine

    def __init__(self, hosted: Hosted) -> None:
        super().__init__(hosted)  # type: ignore[arg-type]
        self.hosted = hosted
        self.given: list[Given] = []
        self._passes: dict[int, int] = {}  # by invoke: the number of its forward pass; edits have none
        self.layouts: dict[int, Layout] = {}  # by invoke, of those that lines have named something of
        self._calls: dict[tuple[int, str], int] = {}
        self._carried: set[int] = set()  # reads that no line of the block has made
        self._ports: dict[str, set[int]] = {}  # by path: the sides of modules that nodes before _told name
        self._absent: set[tuple[int, str, int, str]] = set()  # what the passes did not have (HostedRun)
        self.left: dict[int, dict[str, Beside]] = {}  # by number of the pass: the calls of modules that it leaves out

    def open(self, given: Given) -> None:
        """Begins an invoke."""
        if self.whole is not None:
            raise apart(here(), "this one comes behind it", hint="Put the one without an input last.")
        self._passes[self.open_invoke(ROW, None)] = len(self.given)
        self.given.append(given)
        if self.edits:
            self.sourced = self.sourced or any(self.names_operations(edit.recording.nodes) for edit in self.edits)

    def open_whole(self) -> None:
        """Begins an invoke that sees the rows of all before it, which then share a pass."""
        for why, so in (
            ("there is one already: its lines belong into that block", self.whole is not None),
            ("a line before this one needed a value, for which a pass of its own began", self._run is not None),
            ("each of them brings the edits of the model along", self.edits),
            ("one of them leaves a module out", any(self.left.values())),
        ):
            if so:
                raise apart(here(), why)
        self.open_invoke(None, None)
        self.whole = here()

    def force(self, wanted: Iterable[Proxy]) -> list[torch.Tensor]:
        """The real values of proxies at this point of the program, for which the pass waits."""
        if self.whole is not None:
            raise apart(here(), "this line needs a value in the middle of it")
        return super().force(wanted)

    def names_operations(self, nodes: Iterable[Node]) -> bool:
        """Whether nodes name results of operations."""
        named = {node[4] for node in nodes if node[0] in (Kind.READ, Kind.WRITE)}
        paths = {hosting.split(name)[0] for name in named if "source." in name}
        return not paths <= self.hosted.modules.keys()

    def _bring(self, edit: Edit) -> None:
        """Puts an edit before the invoke that comes next."""
        for name, beside in edit.skips.items():
            self.skipped[len(self.invokes), name] = None
            self.left.setdefault(len(self.given), {})[name] = beside
        super()._bring(edit)

    def leave_out(self, name: str, beside: Beside) -> None:
        """Notes that a call of a module does not run; its tensors are written, ``beside`` is the rest of its output."""
        if self.whole is not None:
            raise apart(here(), "this line leaves a module out")
        self.skipped[self.invoke, name] = here()
        self.left.setdefault(self._passes.get(self.invoke, 0), {})[name] = beside

    def skipped_around(self, invoke: int, point: Point) -> str | None:
        """The call of a module, around an access point, that does not run, if there is one."""
        points = self.layout(invoke).points
        for name in self.left.get(self._passes.get(invoke, 0), ()):
            begin, end = points.get((name, wire.INPUT)), points.get((name, wire.OUTPUT))
            if begin is not None and end is not None and begin.order < point.order < end.order:
                return name
        return None

    def layout(self, invoke: int) -> Layout:
        """The access points of an invoke's forward pass."""
        known = self.layouts.get(invoke)
        if known is None:
            given = self._sees(invoke)
            known = self.hosted.layout(given)
            if self.sourced:
                known = self.hosted.inside(known, given)
            self.layouts[invoke] = known
            if invoke == self.invoke and not self._calls:
                self.near = invoke, known.first
            if len(self.layouts) > 1:
                _are_alike(known, next(iter(self.layouts.values())))
        return known

    def _sees(self, invoke: int) -> Given:
        """The input of an invoke, or of all of them for the one that has none."""
        number = self._passes.get(invoke)
        return Together(self.hosted).whole(self.given) if number is None else self.given[number]

    def look_near(self) -> None:
        """Finds out which access points the open invoke's pass has."""
        if self.invoke in self._passes and self.invoke not in self.layouts:
            self.layout(self.invoke)

    def look_inside(self) -> None:
        """Makes the results of operations access points, too."""
        layouts = {i: self.hosted.inside(of, self._sees(i)) for i, of in self.layouts.items()}
        for layout in layouts.values():
            _are_alike(layout, next(iter(layouts.values())))
        self.layouts, self.sourced, self.near = layouts, True, NOWHERE

    def operations(self, path: str, name: str) -> dict[str, Point]:
        """The results of a module's operations by name, at the call that the invoke has got to."""
        invoke = self._inside(lambda: name)
        if not self.sourced:
            if self._run is not None:
                raise InputError(
                    f"{name} is used for the first time after a value was needed, when the forward pass is under way",
                    path=path,
                    hint="Name it before the line that needs a value: such a pass shows its operations from the start.",
                    **positions.fields(here()),
                )
            self.look_inside()
        path = self.hosted.paths[path]
        return self.layout(invoke).operations.get((path, self._calls.get((invoke, path), 0)), {})

    def point(self, path: str, port: int, name: Callable[[], str]) -> Point:
        """The access point of a module, at the call that the invoke has got to; ``name()`` is how it is written."""
        invoke = self._inside(name)
        layout, path = self.layout(invoke), self.hosted.paths[path]
        call = self._calls.get((invoke, path), 0) if self._calls else 0
        point = layout.points.get((hosting.named(path, call), port))
        if point is None:
            self.hosted.forget()  # another pass may go another way
            times = layout.calls.get((path, port), 0)
            raise ModulePathError(
                f"{name()} is called {times} times in this forward pass, so it has no call {call}"
                if times
                else f"{name()} is not called in this forward pass",
                path=path,
                hint="Calls are counted from 0." if times else self.uncalled,
                **positions.fields(here()),
            )
        return point

    def go_on(self, path: str, calls: int) -> None:
        """Makes a later call of a module the one that its lines mean."""
        key = (self._inside(lambda: path), self.hosted.paths[path])
        self._calls[key] = self._calls.get(key, 0) + calls
        self.near = NOWHERE

    def batch(self, invoke: int) -> tuple[int, int]:
        """Sizes of access points are known as they are; which of them depend on the input is not."""
        self.pinned = self.pinned or here()
        return 1, 1

    def stands_before(self, one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
        """Whether the access point that a read names comes before another's, in the same invoke."""
        if one[1] != other[1]:
            return False
        points = self.layout(one[1]).points
        return points[one[4], one[5]].order <= points[other[4], other[5]].order

    def _begin(self, data: bytes, constants: list[torch.Tensor], end: bool) -> Run:
        if not end and self.hosted.sourced and not self.sourced:
            with contextlib.suppress(InputError):  # a later line may ask for them, or not
                self.look_inside()
        layout = next(iter(self.layouts.values()), None)
        run = HostedRun(self.hosted, layout or Layout([], {}, {}), self.given, data, constants, end)
        run.ports, run.stops, run.inside = self._ports, self.stopped, self.sourced
        run.left, run.absent = self.left, self._absent
        return run

    def _go_on(self, ids: list[int], end: bool, adopt: Any) -> list[torch.Tensor]:
        if end and self._run is None and not (self.edits and any(v.edit for v in self.invokes)):
            schedule = straight.plan(self, ids)
            if schedule is not None:
                program = schedule.program
                if program is None or self.stopped or self.left or any(map(compiled, program.around)):
                    block = straight.Straight(self, schedule)
                    self._do(block, ids)
                    become(adopt, [block.values[id] for id in ids])
                else:
                    hooked.run(self, program, ids, adopt)
                    if self.site is not None:
                        known.learn(self, program, ids)
                self._unkept = ids
                return []
        if self.whole is not None:
            raise apart(self.whole, "this block asks for gradients, or its lines do not follow the order of a pass")
        for node in self.nodes[self._told :]:
            if node[0] in (Kind.READ, Kind.WRITE):
                if self.invokes[node[1]].edit:
                    self.found(node)
                self._ports.setdefault(hosting.split(node[4])[0], set()).add(node[5])
        self._told = len(self.nodes)
        if isinstance(self._run, HostedRun):
            self._run.stops = self.stopped
        try:
            return super()._go_on(ids, end, adopt)
        except NoTensor as error:
            raise self.absent(ids[error.number]) from None
        except OpError as error:
            absent = self._absent_in(error)
            raise absent or error from None

    def _absent_in(self, error: OpError) -> NnsightError | None:
        """The error of an operation on a tensor that is not there this time."""
        for ref in self.uses(error.node) if error.node is not None and error.node < len(self.nodes) else ():
            node = self.nodes[ref]
            if node[0] == Kind.READ and (self._pass(node[1]), node[4], node[5], node[7]) in self._absent:
                return self.absent(ref)
        return None

    def _user(self, invoke: int) -> int:
        """The invoke that an edit is made in, or the invoke itself."""
        while self.invokes[invoke].edit:
            invoke += 1
        return invoke

    def _pass(self, invoke: int) -> int:
        """The number of the forward pass that an invoke, or an edit of it, sees."""
        return self._passes.get(self._user(invoke), 0)

    def found(self, node: tuple[Any, ...]) -> tuple[int, Point, Leaf]:
        """What a node names that was recorded for another pass: invoke, access point and tensor.

        Raises:
            ModulePathError: the pass does not come there.
        """
        _, invoke, place, _, name, port, _, leaf = node[:8]
        invoke = self._user(invoke)
        point = self.layout(invoke).points.get((name, port))
        outer = self.skipped_around(invoke, point) if self.skipped and point is not None else None
        if outer is not None and point is not None:
            raise skipping.not_computed(self, invoke, point, outer, place)
        for tensor in hosting.leaves(point.tree) if point is not None else ():
            if tensor.name == leaf and point is not None:
                return invoke, point, tensor
        self.hosted.forget()
        path, call = hosting.split(name)
        side = f"the {('input', 'output')[port]} of {path or 'the model'}"
        if path not in self.hosted.modules:
            what = f"{path}, which this {'forward pass' if 'source.' in path else 'model'} does not have"
        elif point is not None:
            what = f"{side}, which has no {leaf or 'single tensor'} in this forward pass"
        else:
            what = f"{side}, which is not called {f'{call + 1} times ' if call else ''}in this forward pass"
        raise ModulePathError(
            f"{self.foreign[0]} names {what}",
            path=path,
            hint=self.foreign[1],
            **positions.fields(place),
        )

    def close_invoke(self) -> None:
        """Does what is to be done at the end of the open invoke, where edits came with it."""
        if self.invoke >= 0 and not self.stopped:
            last = self._carry_on()
            if last is not None:
                self.save(last)
                self._carried.add(last._id)

    def _carry_on(self) -> Proxy | None:
        """A value that has the pass come to all its edits, where no line goes so far: what it does may show them."""
        last: tuple[Point, Leaf] | None = None
        at = -1.0  # where the pass waits
        for id, node in enumerate(self.nodes):
            if node[0] not in (Kind.READ, Kind.WRITE):
                continue
            if self.invokes[node[1]].edit:
                invoke, point, leaf = self.found(node)
                if invoke == self.invoke and (last is None or last[0].order < point.order):
                    last = (point, leaf)
            elif node[1] == self.invoke and self.taken_back(id):
                at = max(at, self.layout(node[1]).points[node[4], node[5]].order)
        if last is not None and at < last[0].order:
            return self.read(*last)
        return None

    failure = hooked.failure

    def _do(self, block: straight.Straight, ids: list[int]) -> None:
        """Does a block that goes straight ahead, without the engine, in the passes of all its invokes."""
        if self.whole is not None:
            return Together(self.hosted).run_whole(self.given, self.layout(len(self.given)), block, self.whole)
        if self.stopped:
            last = max((self.nodes[id][1] for id in ids), default=-1)
            for invoke in range(last + 1):
                self._do_one(block, invoke, stops=invoke == last)
            return
        if len(self.given) == 1:
            self._do_one(block, 0)
            return
        together = Together(self.hosted)
        for group in together.passes(self.given, self.layout, block, self.left):
            first = group.invokes[0]
            if group.cuts is None or not together.run(self.given, self.layout(first), block, group):
                for invoke in group.invokes:
                    self._do_one(block, invoke)

    def _do_one(self, block: straight.Straight, invoke: int, stops: bool = False) -> None:
        given = self.given[invoke]
        left = self.left.get(invoke, {})
        if block.schedule.steps[invoke] or block.schedule.first[invoke] or left:
            self.hosted.straight(given, self.layout(invoke), block, invoke, stops, left)
        else:
            self.hosted.run(given)

    def order(self, invoke: int, point: straight.Key) -> float:
        """The place of an access point in the pass of an invoke."""
        return self.layout(invoke).points[point].order

    def absent(self, id: int) -> NnsightError:
        """The error of a read of a tensor that is not there this time."""
        invoke, place, path, port, leaf = (self.nodes[id][i] for i in (1, 2, 4, 5, 7))
        if port == wire.OUTPUT and path in self.left.get(self._pass(invoke), ()):
            invoke = self._user(invoke)
            return skipping.not_computed(self, invoke, self.layout(invoke).points[path, port], path, place)
        self.hosted.forget()
        what = f"{leaf} of the {('input', 'output')[port]} of {path or 'the model'}"
        return InputError(
            f"{what.removeprefix(' of ')} is None in this forward pass",
            path=path,
            hint="Whether it is there depends on more than the sizes of the input: the next trace tries anew.",
            **positions.fields(place),
        )

    def settle(self) -> None:
        """Records what the block has kept, which a pass in Python does not ask for."""
        self._keep(self._unkept)
        self._unkept = ()

    def facts(self) -> Facts:
        """What its graph is tied to, and what it leaves out."""
        facts = super().facts()
        facts.kept = [save for save in facts.kept if self.nodes[save][4][1] not in self._carried]
        facts.sizes = [hosting.all_sizes(given) for given in self.given]
        if any(self.left.values()):
            facts.left = [dict(self.left.get(i, {})) for i in range(len(self.given))]
        return facts

    def must_run(self) -> bool:
        """A forward pass runs to its end, for what it does beside its results."""
        return bool(self.given)


def _are_alike(layout: Layout, first: Layout) -> None:
    """Raises where the pass of an invoke has other access points than the first one's."""
    if layout is not first and layout.names != first.names:
        raise InputError(
            "the modules that run for this input, or their operations, are others than for the invokes before it",
            hint="Give it a trace of its own.",
            **positions.fields(here()),
        )


class HostedScanRecorder(ScanRecorder, HostedRecorder):
    """Records a trace of a module that is never run."""

    def _carry_on(self) -> None:
        """Nothing: there is no pass."""


class HostedTracer(Tracer):
    """One trace of a module."""

    model: NNsight  # type: ignore[assignment]
    _recorder: HostedRecorder

    def __init__(
        self,
        model: NNsight,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: type[HostedRecorder] = HostedRecorder,
    ) -> None:
        self.model = model
        self._given: Given | None = (args, kwargs) if args or kwargs else None
        self._input = None
        self._recorder = kind(model._hosted)
        self._recorder.edits = model._edits
        self._used = False

    @property
    def _has_input(self) -> bool:
        return self._given is not None

    @property
    def graph(self) -> Graph:
        """What has been recorded so far; after the block, the whole trace. It holds on to the inputs."""
        graph = super().graph
        graph.inputs = tuple(self._recorder.given)
        return graph

    def __enter__(self) -> HostedTracer:
        super().__enter__()
        if self._given is not None:
            self._recorder.open(self._given)
        return self

    def _output(self) -> Any:
        """Runs the trace without lines of its own, and gives what the model gives."""
        with self:
            out = self.model.output.save()
        return out

    def invoke(self, *args: Any, **kwargs: Any) -> HostedInvoker:
        """Begins one input of the trace: ``with tracer.invoke(x):``. Each is as if it ran alone.

        The last may have no input: it sees the rows of all others, in one forward pass.
        """
        return HostedInvoker(self, (args, kwargs))


class HostedInvoker(Invoker):
    """One input of a trace, as a context manager."""

    _tracer: HostedTracer

    def __init__(self, tracer: HostedTracer, given: Given) -> None:
        self._tracer, self._given, self._used = tracer, given, False

    def _open(self) -> None:
        if any(self._given):
            self._tracer._recorder.open(self._given)
        else:
            self._tracer._recorder.open_whole()


class ModuleEnvoy(Envoy):
    """One module of a wrapped model. What is no module or value of a trace is the module's own."""

    _module: torch.nn.Module
    _hosted: Hosted

    def __init__(self, hosted: Hosted, path: str, module: torch.nn.Module) -> None:
        info = {"class": type(module).__name__, "extra": module.extra_repr(), "params": []}
        Envoy.__init__(self, hosted, path, info)  # type: ignore[arg-type]
        own = self.__dict__
        own["_module"], own["_hosted"], own["_first"] = module, hosted, hosted.paths[path]
        own["_listed"] = [] if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) else None
        own["_named"] = isinstance(module, torch.nn.ModuleDict)

    @property
    def _own_path(self) -> str:
        """The first of its paths, where it has several."""
        return hosting.named(self._first, 0)

    def _point(self, port: int) -> Point:
        rec = current.recorder
        assert isinstance(rec, HostedRecorder)
        return self._reach(rec, port)

    def _reach(self, rec: HostedRecorder, port: int) -> Point:  # type: ignore[override]
        invoke, points = rec.near
        known = points.get((self._first, port)) if invoke == rec.invoke else None
        return known or rec.point(self._path, port, self._name)

    def skip(self, replacement: Any) -> None:
        """Leaves the module's work out: ``replacement`` is what it gives, and its forward is not called.

        Args:
            replacement: as for assigning ``.output``, all of it: a tensor, or a structure of the same parts.

        Raises:
            InputError: it has other parts.
            OutOfOrderError: the module, or one inside it, has already run.
        """
        hosted_skipping.skip(self, replacement)

    @property
    def source(self) -> HostedSource:
        """The torch calls that the module's forward makes itself: ``module.source.add_0.output``.

        ``print(module.source)`` lists them.
        """
        return HostedSource(self)

    def next(self, calls: int = 1) -> ModuleEnvoy:
        """Makes a later call of the module the one that its lines mean: a module may be called several times.

        In a generation it goes on to a later step, of all modules.
        """
        rec = self._recorder("next()")
        if isinstance(rec, StepRecorder):
            return super().next(calls)
        assert isinstance(rec, HostedRecorder)
        rec.go_on(self._path, calls)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module: inside a trace on its values, outside of it as ever."""
        return self._module(*args, **kwargs)

    @property
    def training(self) -> bool:
        """The module's own."""
        return self._module.training

    def train(self, mode: bool = True) -> ModuleEnvoy:
        """The module's own, which any part of a model has."""
        self._module.train(mode)
        return self

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The module's own."""
        return self._module.named_parameters(remove_duplicate=remove_duplicate)

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The module's own."""
        return self._module.named_buffers()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The module's own."""
        return self._module.state_dict()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_module" not in self.__dict__:
            raise AttributeError(name)
        found = getattr(type(self), name, None)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)  # whose error is an AttributeError: here it is itself
        if name in self._children:
            return self._children[name]
        try:
            return getattr(self._module, name)
        except AttributeError:
            self._unknown(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property) or name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._module, name, value)

    def to(self, *args: Any, **kwargs: Any) -> ModuleEnvoy:
        """The module's own: it moves."""
        self._module.to(*args, **kwargs)
        return self


class NNsight(ModuleEnvoy, Editable):
    """Any PyTorch module, whose insides can be read and changed while it runs.

    ::

        model = NNsight(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
        with model.trace(torch.rand(1, 4)):
            hidden = model[1].output.save()
            model[1].output[:, 0] = 0
            out = model.output.save()

    The module runs in Python as it is; hooks stand where the block reads and writes, for the time of the trace.
    What modules give is exactly what they return. Modules are attributes and items, as in the module itself.

    Args:
        module: which. It is not changed, and can be used beside.
        rename: more names for its parts: ``{"encoder.layers": "blocks"}`` makes ``model.blocks``, and
            ``{"fc": "linear"}`` gives every ``fc`` a second name.
        batch_dim: the axis of rows, in all that its modules take and give: invokes then share a pass along it.
            Without it they do where the module is found to treat each row by itself.

    Raises:
        InputError: it is no module, or ``rename`` fits none of its parts.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> NNsight:
        """Readies what every model needs, once a process."""
        tracebacks.install()
        return super().__new__(cls)

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        rename: Mapping[str, str | list[str]] | None = None,
        batch_dim: int | None = None,
    ) -> None:
        if not isinstance(module, torch.nn.Module):
            raise InputError(
                f"NNsight wraps a torch.nn.Module, not a {type(module).__name__}",
                hint="Models of the hub are opened by LanguageModel(name).",
                **positions.fields(here()),
            )
        self._grow(Hosted(module, batch_dim), rename or {})

    def _grow(self, hosted: Hosted, rename: Mapping[str, str | list[str]]) -> None:
        """Hangs the parts of a module below the model."""
        module = hosted.module
        ModuleEnvoy.__init__(self, hosted, "", module)
        self._rename = dict(rename)
        by_path: dict[str, ModuleEnvoy] = {"": self}
        for path, child in module.named_modules(remove_duplicate=False):
            if path:
                parent, _, name = path.rpartition(".")
                by_path[path] = ModuleEnvoy(hosted, path, child)
                envoy.hang(by_path[parent], name, by_path[path])
        renaming.apply(self, self._rename)

    def _view(self) -> Any:
        view = type(self).__new__(type(self))
        view.__dict__.update((k, v) for k, v in self.__dict__.items() if not isinstance(v, Envoy))
        view.__dict__.pop("_aliases", None)
        view._grow(self._hosted, self._rename)
        return view

    def trace(self, *args: Any, remote: bool | str | None = None, trace: bool = True, **kwargs: Any) -> Any:
        """Begins a trace: ``with model.trace(x):``, or ``with model.trace() as tracer:`` for invokes.

        Args:
            args: what the module is called with.
            remote: a wrapped module runs here only.
            trace: False runs the module at once, and returns what it gives.
            kwargs: the same by name.
        """
        if remote or sessions.opened.session is not None:
            remotely.refuse(remote)
        tracer = HostedTracer(self, args, kwargs)
        if trace:
            return tracer
        return tracer._output() if self._edits else self._module(*args, **kwargs)

    def input_of(self, prompt: Any) -> Given:
        """What the module is called with, where one value says it: a dictionary by name, a tuple in order."""
        if isinstance(prompt, dict):
            return (), prompt
        return (prompt if type(prompt) is tuple else (prompt,)), {}

    def session(self, remote: bool | str | None = None, blocking: bool = True, **kwargs: Any) -> sessions.Session:
        """Several traces in which values flow from one to the next without being saved."""
        remotely.refuse(remote)
        return sessions.Session()

    def scan(self, *args: Any, **kwargs: Any) -> HostedTracer:
        """A trace that runs nothing: shapes and dtypes are known, saved values are tensors on the meta device.

        Takes what ``trace`` takes. The module may be on the meta device. One whose forward needs values
        (``if x.sum() > 0``) runs once on copies of the input, to know what its parts give.

        Raises:
            OpError: at the end of the block, where an operation's shapes do not fit.
        """
        return HostedTracer(self, args, kwargs, HostedScanRecorder)

    def edit(self, *args: Any, inplace: bool = False, **kwargs: Any) -> Editing[Self]:
        """Records interventions that every later trace brings along: ``with model.edit(x) as edited:``.

        Args:
            args: an example of an input, as ``trace`` takes it, of which nothing but the structure and sizes
                matters. Without one it is the kind of input that was traced last.
            inplace: edit this model, rather than give an edited view of it that shares its weights.
            kwargs: the example by name.

        Raises:
            InputError: where the block begins, there is no example and nothing has been traced.
        """
        from .hosted_edits import HostedEditRecorder

        if len(args) == 1 and isinstance(args[0], bool):  # as other models take it
            inplace, args = args[0], ()
        return Editing(self, inplace, lambda: HostedEditRecorder(self._hosted, self._example(args, kwargs)))

    def _example(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
        """The access points that an edit may name."""
        if args or kwargs:
            return self._hosted.layout((args, kwargs))
        if self._hosted.latest is None:
            raise InputError(
                "which modules run, and what they give, is known for inputs that were traced, and there was none",
                hint="Give an example of an input, `with model.edit(x):`, or trace one before.",
                **positions.fields(here()),
            )
        return self._hosted.latest
