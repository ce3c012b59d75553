"""``with tracer.iter[...]:`` in a generation: a body that is recorded once and replayed at each step.

It is recorded at its first step. Leaving it, the caller's variables are compared with what they were:
a list that gained values of the body gains one item a step; what a replay could not do raises
``StepLoopError``, which shows the ``for`` form, whose body really runs at each step.
"""

from __future__ import annotations

import dis
import re
from types import CodeType, FrameType
from typing import Any, NoReturn

from . import positions, wire
from .errors import StepLoopError
from .generation import Generation, StepRecorder
from .native import become
from .positions import here
from .proxy import Proxy
from .recorder import proxies
from .structures import Fields
from .wire import Kind


class _Hole:
    """Stands in a body's values for a node of the body."""

    __slots__ = ("offset",)

    def __init__(self, offset: int) -> None:
        self.offset = offset


class Loop:
    """A body and the steps it belongs to.

    Attributes:
        named: values of the body that were saved by themselves: they become those of the last step.
    """

    def __init__(self, generation: Generation, steps: range | list[int], frame: FrameType) -> None:
        self._generation, self._steps = generation, steps
        self._rec = rec = generation.recorder(steps[0])
        self._start = self._stop = len(rec.nodes)
        self._bound, rec.bound = rec.bound, {}  # the body reads anew what it replays
        self._frame: FrameType | None = frame
        self._code, self._begin = frame.f_code, frame.f_lasti
        self._names = dict(frame.f_locals)
        self._containers = [(x, len(x)) for x in _distinct([*self._names.values(), *generation.saved.values()])]
        self._saved_before = set(generation.saved)
        self._growth: list[tuple[list[Any], Any]] = []  # lists, and what each step adds, with holes
        self._outside: dict[int, Proxy] = {}  # values of the first step from before the body
        self._done = {rec.step}  # steps that have the body in their recording
        self._coming: dict[int, list[tuple[list[Any], Any]]] = {}  # by step: what it adds to lists
        self._values: dict[int, list[Proxy]] = {}  # by step: values of names
        self._latest: list[Proxy] = []
        self.named: list[Proxy] = []
        self._named_at: list[int] = []

    # ---- recording ----

    def leave(self) -> None:
        """Ends the recording of the body. Raises where replaying it would not do what it says."""
        rec, nodes, generation = self._rec, self._rec.nodes, self._generation
        assert self._frame is not None
        rec.bound = self._bound | rec.bound
        names, stop, self._frame = dict(self._frame.f_locals), self._frame.f_lasti, None
        self._stop = len(nodes)
        for container, size in self._containers:
            if isinstance(container, list) and len(container) > size:
                self._growth.append((container, self._holes(container[size:])))
                del container[size:]  # they come when their step has run
            elif len(container) != size:
                self._refuse(f"a {type(container).__name__} has another length after it")
        for name in carried(self._code, self._begin, stop):
            if name in self._names and names.get(name) is not self._names[name]:
                self._refuse(f"{name!r} goes from one round to the next: it is used and then rebound")
        for key, value in generation.saved.items():
            if key not in self._saved_before and type(value) is Proxy and self._mine(value):
                self.named.append(value)
                self._named_at.append(value._id - self._start)
        for node in nodes[self._start : self._stop]:
            for ref in wire.references(node):
                if ref < self._start and ref not in self._outside:
                    self._outside[ref] = Proxy._make(rec, ref)
        self._note(rec, self._start)
        self._names, self._containers = {}, []
        generation.loops.append(self)

    def _mine(self, value: Any) -> bool:
        return any(p._rec is self._rec and p._id >= self._start for p in proxies(value))

    def _holes(self, x: Any) -> Any:
        if type(x) is Proxy and self._mine(x):
            return _Hole(x._id - self._start)
        if isinstance(x, Fields | dict):
            return {k: self._holes(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            items = [self._holes(item) for item in x]
            return items if isinstance(x, list) else tuple(items)
        return x

    def _refuse(self, why: str) -> NoReturn:
        raise StepLoopError(
            f"the body of this loop is recorded once for all its steps, and {why}",
            hint="Write `for step in tracer.iter[...]:`, whose body runs at every step.",
            **positions.fields(here()),
        )

    # ---- replaying ----

    def needs(self, step: int, first: int) -> bool:
        """Whether its body at a step uses values of steps from ``first`` on, which have not run."""
        if step in self._done or step not in self._steps or not self._outside:
            return False
        return self._rec.step >= first

    def replay(self, rec: StepRecorder) -> None:
        """Puts the body into the recording of one of its steps, once."""
        if rec.step in self._done or rec.step not in self._steps:
            return
        self._done.add(rec.step)
        body = self._rec.nodes[self._start : self._stop]
        outside = {ref: rec._constant(tensor) for ref, tensor in self._outside.items()}  # tensors by now
        numbers = [self._again(rec, n[4]) if n[0] == Kind.CONST else -1 for n in body]
        start = len(rec.nodes)
        for node, number in zip(body, numbers, strict=True):
            if number >= 0:
                index = rec.nodes[number][4]
                rec.nodes.append((*node[:4], index))
            else:
                rec.nodes.append(
                    wire.mapped(node, lambda ref: outside[ref] if ref < self._start else ref - self._start + start)
                )
            rec.made.append(None)
        self._note(rec, start)

    def _again(self, rec: StepRecorder, capture: int) -> int:
        """A constant of the body as one of another step, whose tokens are others."""
        return rec.tokens() if capture == self._rec.tokens_at else rec._constant(self._rec.captures[capture].sent)

    def _note(self, rec: StepRecorder, start: int) -> None:
        """Readies the values that a step gives."""

        def filled(x: Any) -> Any:
            if type(x) is _Hole:
                return Proxy._make(rec, start + x.offset)
            if isinstance(x, dict):
                return {k: filled(v) for k, v in x.items()}
            if isinstance(x, list | tuple):
                items = [filled(item) for item in x]
                return items if isinstance(x, list) else tuple(items)
            return x

        self._coming[rec.step] = [(into, filled(items)) for into, items in self._growth]
        self._values[rec.step] = [Proxy._make(rec, start + offset) for offset in self._named_at]

    def happened(self, step: int) -> None:
        """Notes that a step has run: its values are tensors, and go where they belong."""
        for into, items in self._coming.pop(step, ()):
            into.extend(items)
        self._latest = self._values.pop(step, self._latest)

    def end(self) -> None:
        """Gives saved names the values of the last step that happened."""
        if not self._latest or not self.named:
            return
        named, self.named = self.named, []
        become(named, self._latest)


def carried(code: CodeType, start: int, stop: int) -> set[str]:
    """The names that instructions between two offsets read first and bind later."""
    read: set[str] = set()
    bound: set[str] = set()
    out: set[str] = set()
    for instruction in dis.get_instructions(code):
        if not start < instruction.offset < stop:
            continue
        named = instruction.argval if isinstance(instruction.argval, tuple) else (instruction.argval,)
        # newer Pythons do two at once: STORE_FAST_LOAD_FAST
        kinds = re.findall(r"(LOAD|STORE)_(?:NAME|FAST|GLOBAL|DEREF)", instruction.opname)
        for kind, name in zip(kinds, named, strict=False):
            if kind == "LOAD" and name not in bound:
                read.add(name)
            elif kind == "STORE":
                bound.add(name)
                if name in read:
                    out.add(name)
    return out


def _distinct(values: list[Any]) -> list[Any]:
    """The containers among values, each once."""
    found = {id(x): x for x in values if isinstance(x, list | dict | set) and not isinstance(x, Fields)}
    return list(found.values())
