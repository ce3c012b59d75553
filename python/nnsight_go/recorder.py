"""The recording of one trace: a list of nodes in program order, and what it takes to run them.

A recorder lives from the start of the block to its end and belongs to one thread. It holds no
values: a proxy is a number, and remembers (in ``made``) by what call it came about, from which shapes
are inferred when they are asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import _ffi, positions, shapes, skipping, wire
from .errors import InputError, NnsightError, NotSavedError, OutOfOrderError, RemoteError
from .points import Leaf, Point
from .positions import Place, here
from .proxy import Proxy
from .stored import Facts
from .wire import Kind

if TYPE_CHECKING:
    from .edits import Edit
    from .gradients import Gradients
    from .native import Native
    from .remote.gathering import Gathered
    from .remote.jobs import Job
    from .runners import Runner, Running
    from .sessions import Living

# A tensor from outside up to this many bytes is copied when the block uses it; a larger one is used
# as it is, and must not change until the block has run.
COPY_BYTES = 64 * 1024

_CALL, _INDEX, _ITEM = int(Kind.CALL), int(Kind.INDEX), int(Kind.ITEM)
_WRITE, _MODULE, _CONST = int(Kind.WRITE), int(Kind.MODULE), int(Kind.CONST)
_SAVE = int(Kind.SAVE)

_grad_enabled, _inference = torch.is_grad_enabled, torch.is_inference_mode_enabled


class Current(threading.local):
    """The trace that this thread is inside of."""

    recorder: Recorder | None = None


current = Current()


@dataclasses.dataclass(slots=True)
class Invoke:
    """One input of a trace: rows of token ids and masks beside them; no rows: the whole batch."""

    rows: list[list[int]] | None
    masks: list[list[int]] | None = None
    edit: bool = False  # the next invoke brings it along: it works on that one's rows

    def wire(self, mode: int = 1) -> tuple[Any, ...]:
        """Its wire form; ``mode`` is the autograd state that the model runs under."""
        if mode != 1:
            return (self.rows, self.masks, self.edit, mode)
        return (None, None, True) if self.edit else (self.rows, self.masks)


@dataclasses.dataclass(slots=True)
class _Capture:
    """A tensor from outside: what the caller had (kept alive, so that its id stays its own) and what is sent."""

    original: torch.Tensor
    version: int
    sent: torch.Tensor
    index: int
    place: Place


@dataclasses.dataclass(slots=True)
class _Write:
    """A value that was put in the place of another; ``kept``: with its sizes, None where nobody has asked."""

    invoke: int
    order: float
    leaf: Leaf
    value: Proxy
    kept: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Sent:
    """How much of a recording the engine has: counts of nodes, invokes, captures and lines."""

    nodes: int = 0
    invokes: int = 0
    captures: int = 0
    positions: int = 0


_NOTHING = _Sent()
_ZERO = torch.zeros(())

OF_SESSION = -2
"""In place of the version of a captured value that an earlier trace of the session will have given."""


class Results:
    """Stands for the several results of one node, in ``made`` of the items taken from it."""

    __slots__ = ("_id",)

    def __init__(self, id: int) -> None:
        self._id = id


NOWHERE: tuple[int, Mapping[tuple[str, int], Point]] = (-2, {})  # -1: no invoke is open


class Recorder:
    """Records one trace of a model.

    ``invoke`` is the number of the invoke whose block is open, or -1; ``nodes`` are in wire form but
    for their positions; ``made[i]`` is the call ``(function, args, kwargs)`` that infers node i's
    shape on meta tensors, or None.
    """

    # Replaces values of other recordings among arguments, where they can be used.
    localized: Callable[[Any], Any] | None = None

    plain = True  # save() is as it is here (pybind/recording.h)
    log: list[Any] | None = None  # what its lines have done, if its block may be remembered (known)

    # What most traces leave as it is.
    invoke = -1
    near = NOWHERE  # an invoke, and what its lines mean by path and port
    edits: Sequence[Edit] = ()  # what each invoke with an input brings along
    pinned: Place = None  # a line that used sizes of the input
    forced: Place = None  # a line that used values
    closed: str | None = None
    stopped = False  # a line has ended the block by `tracer.stop()`
    living: Living | None = None  # where values outlive the trace: those in use when it ends
    _batch_asked: Place = None
    gradients: Gradients | None = None  # what the block says of them, if it does
    gathered: Gathered | None = None  # traces of the session that this one goes with, and that wait for its end
    waiting: Gathered | None = None  # the same, once it has ended
    job: Job | None = None  # that saved values wait for
    _run: Running | None = None  # what the engine does of this trace, once a value was needed
    _sent = _NOTHING

    # What it has many of: with more attributes beside them than these, a dictionary of them is slow to make.
    __slots__ = (
        "__dict__",
        "_captured",
        "_const_nodes",
        "_failed",
        "_fresh",
        "_looked",
        "_named",
        "_resized",
        "_saved",
        "_writes",
        "at_end",
        "bound",
        "captures",
        "invokes",
        "kept",
        "made",
        "metas",
        "moved",
        "nodes",
        "several",
        "skipped",
        "when_done",
    )

    def __init__(self, native: Native) -> None:
        self.native = native
        self.runner: Runner = native  # where the graph runs: here, or elsewhere
        self.default_dtype, self.autocast = torch.get_default_dtype(), torch._C._is_any_autocast_enabled()
        self.mode = (1 if _grad_enabled() else 0) | (2 if _inference() else 0)  # that the model runs under
        self.nodes: list[tuple[Any, ...]] = []
        self.made: list[tuple[Callable[..., Any], Any, Any] | None] = []
        self.metas: dict[int, Any] = {}
        self.several: set[int] = set()  # nodes with several results
        self.moved: dict[int, torch.device] = {}  # nodes whose result is on another device
        self.invokes: list[Invoke] = []
        self.captures: list[_Capture] = []
        self.kept: list[int] = []  # the save nodes of what the block saved
        self.bound: dict[tuple[int, str, int], Any] = {}
        self.at_end: list[Callable[[], None]] = []  # checks and last reads, before the graph runs
        self.when_done: list[Callable[[], None]] = []  # what is to be done once the saved values are there
        self.skipped: dict[tuple[int, str], Place] = {}  # modules whose work an invoke has replaced
        self._captured: dict[int, _Capture] = {}
        self._const_nodes: dict[tuple[int, int], int] = {}
        # By invoke: the access points that it has named, by the node that read there (writes: below zero).
        self._named: dict[int, dict[int, tuple[Point, Place]]] = {}
        self._fresh: set[int] = set()  # reads of which nothing has been asked yet
        self._looked: dict[int, tuple[int, Point, Place]] = {}  # reads of which only facts were asked
        self._writes: dict[int, list[_Write]] = {}  # by invoke
        self._resized: set[int] = set()  # invokes with an edit that may give values other sizes
        self._saved: dict[int, Any] = {}
        self._forced: tuple[int, dict[int, torch.Tensor]] = (-1, {})
        self._failed: dict[int, NnsightError] = {}

    # ---- invokes ----

    def open_invoke(self, rows: list[list[int]] | None, masks: list[list[int]] | None) -> int:
        """Begins an invoke and gives its number."""
        if rows is not None and self._batch_asked is not None:
            raise InputError(
                "this invoke adds rows to a batch whose sizes an invoke without input has already used",
                hint="Put invokes with input before those without.",
                **positions.fields(here()),
                **positions.other_fields(self._batch_asked),
            )
        if rows is None and not any(v.rows for v in self.invokes):
            raise InputError(
                "an invoke without input sees the whole batch, and there is none yet",
                hint="Give this invoke a prompt, or put one with a prompt before it.",
            )
        if rows is not None:
            for edit in self.edits:
                self._bring(edit)
        self.invokes.append(Invoke(rows, masks))
        self.invoke = len(self.invokes) - 1
        if not self.native.by_input:
            self.near = self.invoke, self.native.points
        if self.edits and any(edit.resizes for edit in self.edits):
            self._resized.add(self.invoke)
        return self.invoke

    def _bring(self, edit: Edit) -> None:
        """Puts an edit before the invoke that comes next."""
        number, nodes, constants = len(self.invokes), len(self.nodes), len(self.captures)
        self.invokes.append(Invoke(None, edit=True))
        for tensor in edit.recording.constants_on(self.native.device):
            self.brought(tensor)
        for node in edit.recording.nodes:
            self.nodes.append(wire.renumbered(node, number, nodes, constants))
            self.made.append(None)

    def brought(self, tensor: torch.Tensor) -> None:
        """Adds a tensor that an earlier recording uses from outside."""
        self.captures.append(_Capture(tensor, version(tensor), tensor, len(self.captures), None))

    def close_invoke(self) -> None:
        """Does what is to be done at the end of the open invoke, where edits came with it: here it is nothing."""

    def batch(self, invoke: int) -> tuple[int, int]:
        """Rows of an invoke and tokens of the longest of them."""
        v = self.invokes[invoke]
        self.pinned = self.pinned or here()
        if v.rows is None:
            self._batch_asked = here()
            rows = [row for w in self.invokes for row in w.rows or ()]
        else:
            rows = v.rows
        return len(rows), max(map(len, rows))

    def _owner(self) -> int:
        # Work between invokes belongs to the latest one: it may use values of all before it.
        if self.invoke >= 0:
            return self.invoke
        if not self.invokes:
            raise InputError("nothing can be computed in a trace before its first invoke")
        return len(self.invokes) - 1

    # ---- nodes ----

    def _add(self, kind: int, made: tuple[Callable[..., Any], Any, Any] | None, *rest: Any) -> int:
        id = len(self.nodes)
        mode = (1 if _grad_enabled() else 0) | (2 if _inference() else 0)
        self.nodes.append((kind, self.invoke if self.invoke >= 0 else self._owner(), here(), mode, *rest))
        self.made.append(made)
        return id

    def number(self, tensor: torch.Tensor) -> int:
        """The node of a tensor that an operation uses: a proxy's own, or a constant's."""
        if type(tensor) is Proxy and tensor._rec is not self:
            tensor = self._of_session(tensor)
        if type(tensor) is Proxy:
            if self._failed and tensor._id in self._failed:
                raise self._failed[tensor._id]
            if tensor._id in self._fresh or tensor._id in self._looked:
                self._used(tensor._id)
            return tensor._id
        return self._constant(tensor)

    def call(
        self,
        op: str,
        args: Iterable[Any],
        kwargs: dict[str, Any] | None,
        made: tuple[Callable[..., Any], Any, Any],
    ) -> int:
        """Records a call of an ATen operator; ``made`` is the Python call it stands for."""
        argument = _ffi.calls()["argument"]
        wired = [argument(x, self) for x in args]
        named = {k: argument(x, self) for k, x in kwargs.items()} if kwargs else None
        return self._add(_CALL, made, op, wired, named)

    def index(self, target: Proxy, index: Any) -> Proxy:
        """Records ``target[index]``."""
        argument = _ffi.calls()["argument"]
        of, where = argument(target, self), argument(index, self)
        return Proxy._make(self, self._add(_INDEX, (shapes.index, (target, index), None), of, where))

    def set_index(self, target: Proxy, index: Any, value: Any) -> None:
        """Records ``target[index] = value``."""
        _ffi.calls()["store"](self, target, index, value)

    def item(self, of: int, key: int | str) -> Proxy:
        """Records taking one of several results."""
        return Proxy._make(self, self._add(_ITEM, (shapes.item, (Results(of), key), None), [0, of], key))

    def module(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], infer: Callable[..., Any]) -> int:
        """Records calling a module of the model; ``infer(*args, **kwargs)`` gives its results' shapes."""
        if self.localized is not None:
            args, kwargs = self.localized(args), self.localized(kwargs)
        argument = _ffi.calls()["argument"]
        wired = [argument(x, self) for x in args]
        named = {k: argument(x, self) for k, x in kwargs.items()} if kwargs else None
        return self._add(_MODULE, (infer, args, kwargs), path, wired, named)

    # ---- gradients ----

    def uses(self, id: int) -> Iterator[int]:
        """The nodes that a node uses."""
        return wire.references(self.nodes[id])

    def is_floating(self, id: int) -> bool:
        """Whether a value is of a dtype that has gradients."""
        dtype = self.rough(Proxy._make(self, id)).dtype
        return dtype.is_floating_point or dtype.is_complex

    def stands_before(self, one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
        """Whether the access point that a read names comes before another's, in the same invoke."""
        points = [self.native.points.get((n[4], n[5])) for n in (one, other)]
        if one[1] != other[1] or None in points:
            return False
        first, second = (p.order for p in points if p is not None)
        return first <= second

    def taken_back(self, id: int) -> bool:
        """Whether the engine has a node already, so that it cannot be changed."""
        return id < self._sent.nodes

    def take_back(self) -> None:
        """Drops the last node, which nothing uses."""
        self.nodes.pop()
        self.made.pop()

    # ---- tensors from outside ----

    def _constant(self, tensor: torch.Tensor) -> int:
        owner = self._owner()
        known = self._captured.get(id(tensor))
        now = version(tensor)
        if known is None or (known.sent is not tensor and known.version != now):
            known = self._captured[id(tensor)] = self._capture(tensor, now)
        node = self._const_nodes.get((owner, known.index))
        if node is None:
            node = self._add(_CONST, (shapes.meta_of, (known.sent,), None), known.index)
            self._const_nodes[owner, known.index] = node
            if tensor.device != self.native.device and tensor.dim() > 0 and not tensor.is_meta:
                self.moved[node] = tensor.device
        return node

    def _capture(self, tensor: torch.Tensor, version: int) -> _Capture:
        if tensor.is_meta and not (self.elsewhere and self.native.name_of(tensor)):
            raise InputError("a tensor on the meta device has no values that a trace could use")
        small = tensor.numel() * tensor.element_size() <= COPY_BYTES or tensor.is_inference()
        with torch._C.DisableTorchFunction():
            sent = tensor.detach().clone() if small and not tensor.requires_grad and not tensor.is_meta else tensor
        capture = _Capture(tensor, version, sent, len(self.captures), here())
        self.captures.append(capture)
        return capture

    # ---- sessions of which a server makes one job ----

    def gather(self, gathered: Gathered) -> None:
        """Notes that this trace waits with others, and may use their values."""
        self.gathered, self.localized = gathered, self._from_session

    def _leave(self) -> None:
        """Goes on by itself: the traces that wait are done before it."""
        assert self.gathered is not None
        self.gathered.flush()
        self.gathered = None
        for capture in self.captures:
            if capture.version == OF_SESSION:
                later: Any = capture.sent
                capture.original = capture.sent = later.where()
                capture.version = version(capture.sent)

    def _from_session(self, x: Any) -> Any:
        """Arguments with values of traces that wait replaced by what stands for them here, so that shapes are known."""
        if type(x) is Proxy and x._rec is not self and x._rec.waiting is not None:
            return self._of_session(x)
        if type(x) is list or type(x) is tuple:
            return type(x)(map(self._from_session, x))
        return {k: self._from_session(v) for k, v in x.items()} if type(x) is dict else x

    def _of_session(self, proxy: Proxy) -> torch.Tensor:
        """What stands here for a value of a trace that waits; the value itself, where it has to come first."""
        other = proxy._rec
        if other.waiting is None:
            other.refuse(proxy)
        meta = other.metas.get(proxy._id)
        if other.waiting is not self.gathered or meta is None:
            other.waiting.flush()
            return proxy
        known = self._captured.get(id(proxy))
        if known is None:
            later: Any = other.waiting.later(proxy)
            known = _Capture(later, OF_SESSION, later, len(self.captures), here())
            self._captured[id(proxy)] = known
            self.captures.append(known)
        owner = self._owner()
        node = self._const_nodes.get((owner, known.index))
        if node is None:
            node = self._add(_CONST, (meta.clone, (), None), known.index)
            self._const_nodes[owner, known.index] = node
        return Proxy._make(self, node)

    def outside(self, proxy: Proxy) -> None:
        """Sees to it that a value is there that a line outside of every trace uses."""
        if self.waiting is None:
            self.refuse(proxy)
        self.waiting.flush()

    def saved_proxies(self) -> list[Proxy]:
        """The proxies of this trace that the block has saved."""
        return [p for p in {id(p): p for p in proxies(self.saved())}.values() if p._rec is self]

    def _wait(self, metas: dict[int, Any]) -> None:
        """Ends the trace as far as it can be without its values."""
        self.waiting, self.metas = self.gathered, metas
        self.invoke = -1

    def arrived(self) -> None:
        """Ends it: its saved values are tensors now."""
        self.waiting = None
        self.close("it was not saved")
        self._done()

    def waits_for(self, job: Job, which: Sequence[int], number: int) -> None:
        """Ends it, of which a job will give the values: ``which`` of the job's were saved. It is trace ``number``."""

        def failed(error: NnsightError) -> None:
            if error.step == number:
                self.count(error)
                error.step = None  # it is no step of a generation
            self._failed_later(error)

        self.waiting, self.job = None, job
        job._then(which, self._done, failed)
        self.close("the job of its session has not been waited for")

    def _known(self) -> dict[int, Any]:
        """Meta tensors of values that later traces may ask for, as far as they can be told without running anything."""
        found = {}
        for proxy in proxies([self.saved(), self.living.now() if self.living is not None else []]):
            if proxy._rec is self and proxy._id not in found:
                with contextlib.suppress(Exception):  # it is known once it is there
                    found[proxy._id] = shapes.infer(self, proxy._id, run=False)
        return found

    def constant(self, tensor: torch.Tensor) -> Proxy:
        """A proxy for a tensor from outside."""
        return Proxy._make(self, self._constant(tensor))

    @property
    def elsewhere(self) -> bool:
        """Whether the graph runs on a server, which has weights of its own."""
        return self.runner is not self.native

    def parameter(self, name: str) -> Proxy:
        """A parameter or buffer of the model that runs elsewhere."""
        return self.constant(self.native.stand_in(name))

    # ---- access points ----

    def _inside(self, what: Callable[[], str]) -> int:
        """The invoke that is open. Where none is, the error speaks of ``what()``."""
        if self.closed is not None:
            raise NotSavedError(f"{what()} cannot be used any more: {self.closed}")
        if self.invoke < 0:
            raise InputError(
                f"{what()} is used outside of every invoke",
                hint="In a trace without input of its own, use modules inside `with tracer.invoke(...):`.",
                **positions.fields(here()),
            )
        return self.invoke

    def look_near(self) -> None:
        """Finds out what the lines of the open invoke mean, where that is not known before one names something."""

    def touch(self, point: Point) -> int:
        """Gives the invoke that the program writes to an access point in, and moves its position there.

        Reads move it as well (``read``). Raises ``OutOfOrderError`` where a later point was named before.
        """
        invoke = self._inside(lambda: point.text)
        named = self._named.setdefault(invoke, {})
        reach = max(named.values(), key=lambda name: name[0].order, default=None)
        named[-1 - len(self.nodes)] = (point, here())
        if reach is not None and point.order < reach[0].order:
            raise OutOfOrderError(
                f"{point.text} has already run when this line writes to it: an earlier line went on to {reach[0].text}",
                path=point.path,
                hint="Move the write up, before the line that uses the later module, or use a second trace.",
                **positions.fields(here()),
                **positions.other_fields(reach[1]),
            )
        return invoke

    def skipped_around(self, invoke: int, point: Point) -> str | None:
        """The module around an access point whose work an invoke leaves out, if there is one."""
        return skipping.around(self, invoke, point.path)

    def read(self, point: Point, leaf: Leaf) -> Proxy:
        """Records reading one tensor of an access point."""
        proxy: Proxy = _ffi.calls()["read"](self, point, leaf)
        return proxy

    def _used(self, node: int) -> None:
        """Notes the first use of what was read at an access point."""
        self._fresh.discard(node)
        looked = self._looked.pop(node, None) if self._looked else None
        if looked is not None:
            self._named[looked[0]][node] = looked[1:]

    def _look(self, proxy: Proxy) -> None:
        """Notes that a line asks for sizes or dtype. That names nothing, if the value is not used beside it."""
        if proxy._id in self._fresh and proxy._rec is self:
            self._fresh.discard(proxy._id)
            for invoke, named in self._named.items():
                if proxy._id in named:
                    self._looked[proxy._id] = (invoke, *named.pop(proxy._id))

    def _leaf_meta(self, invoke: int, order: int, leaf: Leaf, writes: int) -> torch.Tensor:
        behind = [w for w in self._writes.get(invoke, ())[:writes] if w.order <= order]
        if invoke in self._resized or not all(map(self._keeps_sizes, behind)):
            raise NotImplementedError("an earlier line has perhaps replaced a value by one of other sizes")
        return torch.empty(leaf.sizes(*self.batch(invoke)), dtype=leaf.dtype, device="meta")

    def _keeps_sizes(self, write: _Write) -> bool:
        """Whether what was written has the sizes of what stood there, so that the rest of the model keeps its own."""
        if write.kept is None:
            write.kept = self.fits(write)
        return write.kept

    def fits(self, write: _Write) -> bool:
        """The same, worked out."""
        try:
            meta = shapes.infer(self, write.value._id, run=False)
        except Exception:  # its sizes depend on data
            return False
        want = write.leaf.sizes(*self.batch(write.invoke))
        return tuple(meta.shape) == want and meta.dtype == write.leaf.dtype

    def write(self, point: Point, leaf: Leaf, value: Any) -> Proxy:
        """Records rebinding one tensor of an access point, and gives what is bound there now."""
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"{point.text} holds a tensor and cannot become a {type(value).__name__}",
                path=point.path,
                hint="Assign a tensor (torch.full_like(old, value)), or change it in place (output[:] = value).",
                **positions.fields(here()),
            )
        if type(value) is Proxy and value._rec.waiting is not None:
            value = self._of_session(value)
        proxy = value if type(value) is Proxy else self.constant(value)
        self._writes.setdefault(self.invoke, []).append(_Write(self.invoke, point.order, leaf, proxy))
        self._add(_WRITE, None, point.path, point.port, 0, leaf.name, [0, self.number(proxy)])
        return proxy

    # ---- values ----

    def meta(self, proxy: Proxy) -> torch.Tensor:
        """A meta tensor of the proxy's sizes, strides and dtype; runs the graph only where it must."""
        meta = self.metas.get(proxy._id)
        if meta is None and self.waiting is not None:
            self.waiting.flush()
            return shapes.meta_of(proxy)
        if meta is None:
            self.alive(proxy)
            meta = shapes.infer(self, proxy._id)
        return meta  # type: ignore[no-any-return]

    def shape(self, proxy: Proxy) -> torch.Size:
        """The proxy's sizes."""
        self._look(proxy)
        return self.meta(proxy).shape

    def fact(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function says that asks for sizes or dtypes alone."""
        for p in proxies((args, kwargs)):
            self._look(p)
            self.meta(p)
        with torch._C.DisableTorchFunction():
            return func(*shapes.on_meta(self, args), **shapes.on_meta(self, kwargs))

    def shown(self, proxy: Proxy) -> str:
        """What is known of a value without running anything, for people."""
        pinned = self.pinned
        try:
            meta = shapes.infer(self, proxy._id, run=False)
        finally:
            self.pinned = pinned
        return f"shape={list(meta.shape)}, {str(meta.dtype).removeprefix('torch.')}, "

    def rough(self, proxy: Proxy) -> torch.Tensor:
        """As ``meta``, for facts that do not depend on the sizes of the input: dtype, number of axes."""
        pinned = self.pinned
        self._look(proxy)
        out = self.meta(proxy)
        self.pinned = pinned
        return out

    def structure(self, id: int) -> Any:
        """What a node with several results gives, on meta tensors."""
        return shapes.infer(self, id)

    def unknown(self, id: int, error: Exception) -> torch.Tensor:
        """The meta tensor of a node that meta tensors could not tell: sizes depend on data, or the call is wrong.

        The engine knows, and says where.
        """
        return shapes.meta_of(self.force([Proxy._make(self, id)])[0])

    def device_of(self, id: int) -> torch.device:
        """The device of a node's result."""
        if not self.moved:
            return self.native.device
        while id not in self.moved:
            made = self.made[id]
            first = next((p for p in proxies((made[1], made[2])) if p._rec is self), None) if made else None
            if first is None:
                return self.native.device
            id = first._id
        return self.moved[id]

    def force(self, wanted: Iterable[Proxy]) -> list[torch.Tensor]:
        """The real values of proxies at this point of the program, as copies that change nothing here.

        The engine does what has been recorded so far of the invokes that these values depend on, and
        stands there until it hears more.
        """
        wanted = list(wanted)
        if self.waiting is not None:
            self.waiting.flush()
            return [p.detach().clone() for p in wanted]
        for p in wanted:
            self.alive(p)
            if p._rec is self:
                self._used(p._id)
        at, values = self._forced
        if at != len(self.nodes):
            values = {}
        missing = {p._id: p for p in wanted if p._id not in values}
        self.forced = self.forced or here()
        if missing:
            for invoke in {self.nodes[id][1] for id in missing}:
                if self.invokes[invoke].rows is None:
                    self._batch_asked = here()  # rows that came later would not have been seen
            try:
                found = self._go_on(list(missing), end=False, adopt=None)
            except NnsightError as error:
                self._give_up(error)
                raise
            with torch._C.DisableTorchFunction():
                values.update((id, tensor.clone()) for id, tensor in zip(missing, found, strict=True))
            self._forced = (len(self.nodes), values)
        return [values[p._id] for p in wanted]

    def check_captures(self) -> None:
        """Raises where a tensor from outside is not what it was when a line used it."""
        for c in self.captures:
            if c.sent is c.original and c.version != OF_SESSION and version(c.original) != c.version:
                raise InputError(
                    f"a tensor of sizes {list(c.original.shape)} that the block uses was changed in place after that",
                    hint="Tensors of more than 64 KiB are used as they are: pass a copy (.clone()) if you change it.",
                    **positions.fields(c.place),
                )

    def settle(self) -> None:
        """Completes the recording, for whom looks at it."""

    def facts(self) -> Facts:
        """What its graph is tied to."""
        pinned, forced = (place and positions.row(place) for place in (self.pinned, self.forced))
        return Facts(list(self.kept), pinned, forced)

    def _keep(self, ids: Iterable[int]) -> None:
        """Records that the values of nodes are wanted."""
        for id in ids:
            _, invoke, place, mode = self.nodes[id][:4]
            self.nodes.append((_SAVE, invoke, place, mode, [0, id]))
            self.made.append(None)

    def _go_on(self, ids: list[int], end: bool, adopt: list[Proxy] | None) -> list[torch.Tensor]:
        """Sends the engine what has been recorded since the last time, and gives the values of nodes."""
        self.check_captures()
        self._keep(ids)
        sent = self._sent
        nodes = self.nodes[sent.nodes :]
        rows, indices = positions.table(node[2] for node in nodes)
        data = wire.graph(
            [v.wire(self.mode) for v in self.invokes[sent.invokes :]],
            [
                (*node[:2], index if index < 0 else index + sent.positions, *node[3:])
                for node, index in zip(nodes, indices, strict=True)
            ],
            rows,
        )
        constants = [c.sent for c in self.captures[sent.captures :]]
        try:
            if self._run is None:
                self._run = self._begin(data, constants, end)
            else:
                self._run.more(data, constants, end)
            self._sent = _Sent(len(self.nodes), len(self.invokes), len(self.captures), sent.positions + len(rows))
            if end and self.gathered is not None:
                run: Any = self._run
                self.gathered.add(self, run.part, adopt or ())
                return []
            return self._run.results(adopt)
        except BaseException as error:
            end = True
            if isinstance(error, NnsightError):
                self.count(error)
            raise
        finally:
            if end:
                self._free()

    def count(self, error: NnsightError) -> None:
        """Numbers the invoke of an error as the user counts them."""
        if error.invoke:
            error.invoke -= sum(v.edit for v in self.invokes[: error.invoke])

    def _begin(self, data: bytes, constants: list[torch.Tensor], end: bool) -> Running:
        return self.runner.begin(data, constants, end)

    def _free(self) -> None:
        """Ends the run, if there is one; what is asked for next starts from the beginning."""
        run, self._run, self._sent = self._run, None, _NOTHING
        if run is not None:
            run.free()

    def _give_up(self, error: NnsightError) -> None:
        """Takes a node that failed, and all that depend on it, out of the program.

        The user may have caught the error. Whoever uses such a value meets it again.
        """
        if error.node is None or error.node >= len(self.nodes):
            return
        lost = {error.node}
        zero = len(self.captures)
        self.captures.append(_Capture(_ZERO, version(_ZERO), _ZERO, zero, None))
        for id, node in enumerate(self.nodes):
            if id in lost or not lost.isdisjoint(wire.references(node)):
                lost.add(id)
                self.nodes[id] = (_CONST, *node[1:4], zero)
                self._failed[id] = error

    # ---- the end ----

    def save(self, value: Any) -> None:
        """Notes that a value, or every proxy in a container, is wanted after the block."""
        self._saved[id(value)] = value
        if type(value) is Proxy:
            if value._rec is self:
                self._used(value._id)
            return
        for proxy in proxies(value):
            if proxy._rec is self:
                self._used(proxy._id)

    def advance(self, steps: int) -> None:
        """Goes on to a later step. A trace has none."""
        raise InputError(
            "a trace runs the model once, so there is no next step",
            hint="Steps come from `with model.generate(prompt, max_new_tokens=...) as tracer:`.",
            **positions.fields(here()),
        )

    def conclude(self) -> None:
        """Does what is to be done at the end of the block, before the graph runs."""
        for act in self.at_end:
            act()

    def saved(self) -> list[Any]:
        """What the block has saved, proxies and containers."""
        return list(self._saved.values())

    def finish(self) -> None:
        """Runs the graph and turns every saved proxy into its tensor."""
        if self.at_end:
            self.conclude()
        saved = list(self._saved.values())
        if self.gathered is not None and (self.when_done or self.gradients is not None):
            self._leave()  # what it does beside giving values is to be seen when it has ended
        brought: list[Proxy] = []
        if self.gradients is not None and self.elsewhere:
            held = [] if self.living is None else self.living.now()
            brought, put = self.gradients.brought(list({id(p): p for p in proxies([saved, held])}.values()))
            self.when_done.append(put)
        metas = self._known() if self.gathered is not None else {}
        if self.living is not None:
            # these hold proxies too
            self.made, self.metas, self.bound, self._forced, self._writes = [], {}, {}, (-1, {}), {}
            saved += self.living.now()
        if self.living is not None or not {Proxy}.issuperset(map(type, saved)):  # some twice, or in containers
            saved = list({id(p): p for p in proxies(saved)}.values())
        if self.gathered is not None:
            saved = [p for p in saved if p._rec is self]  # others come with their own trace
        if self._failed or self.closed is not None:
            for p in saved:
                self.alive(p)
        if saved or self.must_run():
            count = len(self.nodes)
            wanted = saved + brought
            self._go_on([p._id for p in wanted], end=True, adopt=wanted)
            self.kept = list(range(count, count + len(saved)))
            if self.gathered is not None:
                self._wait(metas)
                return
        self.job = self.runner.job
        if self.job is not None:
            self.job._then(range(len(saved)), self._done, self._failed_later)
            self.close("the job of its trace has not been waited for")
        else:
            self.close("it was not saved")
            for act in self.when_done:
                act()

    def _done(self) -> None:
        """Does what is to be done once the saved values are there."""
        self.job, self.closed = None, "it was not saved"
        for act in self.when_done:
            act()

    def _failed_later(self, error: NnsightError) -> None:
        self.job, self.closed = None, f"the job of its trace failed with {type(error).__name__}"

    def must_run(self) -> bool:
        """Whether the graph runs though nothing is saved: backward passes fill what leaves keep."""
        return self.gradients is not None and self.gradients.passes > 0

    def close(self, why: str) -> None:
        """Ends the recording: proxies that were not saved raise ``NotSavedError`` from now on."""
        if self._run is not None:
            self._free()
        self.closed, self.log = why, None
        self.made = []  # nodes stay: errors name values by them, and so do constants, for the graph
        self.waiting = None
        nothing: dict[Any, Any] = {}  # one for all: none of them is filled any more
        self.metas = self.bound = self._captured = self._saved = self._const_nodes = self.moved = nothing
        self._named = self._looked = self._writes = nothing
        self._forced, self._fresh, self.at_end = (-1, nothing), set(), []

    def alive(self, proxy: Proxy) -> None:
        """Raises where a proxy can no longer be used, or not here."""
        if self.waiting is not None:
            return
        if self.closed is not None or current.recorder is not self:
            self.refuse(proxy)
        if self._failed and proxy._id in self._failed:
            raise self._failed[proxy._id]

    def refuse(self, proxy: Proxy) -> NoReturn:
        """Raises the error of a proxy that is not of the trace that goes on now."""
        name = proxy._label()
        if self.closed is None:
            raise elsewhere(name)
        if self.job is not None:
            of = "tracer" if self.gathered is None else "session"
            raise RemoteError(
                f"{name} is not there yet: {self.closed}",
                hint=f"Wait for it: `{of}.job.result()`, or `await {of}.job`.",
            )
        raise NotSavedError(
            f"{name} cannot be used after its trace: {self.closed}",
            hint="Inside the block, keep it with `.save()`: `x = model.lm_head.output.save()`.",
        )


def elsewhere(name: str) -> NnsightError:
    """The error of a value that belongs to a trace that is open, and not to the one that uses it."""
    return NnsightError(
        f"{name} belongs to another trace, which is still being recorded",
        hint="Save it there, and use it once that trace has ended.",
    )


def mode_now() -> int:
    """The autograd state of this line, as nodes carry it."""
    return (1 if _grad_enabled() else 0) | (2 if _inference() else 0)


def version(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def proxies(tree: Any) -> Iterator[Proxy]:
    """The proxies in a structure of containers, in order; each container is looked into once."""
    seen: set[int] = set()
    stack = [tree]
    while stack:
        x = stack.pop()
        if type(x) is Proxy:
            yield x
        elif isinstance(x, list | tuple | dict | set | frozenset | slice) or hasattr(type(x), "_nng_items"):
            if id(x) in seen:
                continue
            seen.add(id(x))
            stack.extend(reversed(_items(x)))


def _items(x: Any) -> list[Any]:
    if hasattr(type(x), "_nng_items"):
        return list(x._nng_items())
    if isinstance(x, dict):
        return list(x.values())
    if isinstance(x, slice):
        return [x.start, x.stop, x.step]
    return list(x)
