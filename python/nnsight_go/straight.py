"""Blocks that go straight ahead: their lines are done in Python, in the hooks of a hosted module's pass.

Most blocks name modules in the order in which the pass comes to them, and change in place only what it has
just come to. Doing such a block needs no plan: at each access point the operations are done that the block
has behind it. That costs a fraction of what a visit of the engine does, which is given all other blocks: those
whose order differs from the pass's, that want values in the middle, or gradients.

``plan`` says whether a recording is of that kind, and what is to be done where. ``Straight`` does it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from . import hooked, hosting, wire
from .recorder import mode_now, version
from .torchmap.computing import substituted
from .torchmap.operators import RESHAPING, changes_first
from .wire import Kind

if TYPE_CHECKING:
    from .wrapping import HostedRecorder

Key = tuple[str, int]  # name and port of an access point

_READ, _WRITE, _CALL, _CONST = int(Kind.READ), int(Kind.WRITE), int(Kind.CALL), int(Kind.CONST)
_INDEX, _SET_INDEX, _ITEM = int(Kind.INDEX), int(Kind.SET_INDEX), int(Kind.ITEM)
_NO_REFERENCES = frozenset((_READ, _CONST))
_KNOWN = frozenset((_READ, _WRITE, _CALL, _CONST, _INDEX, _SET_INDEX, _ITEM))

_MOST = 64  # schedules that a model remembers


class Schedule:
    """Where each node of a block is done. It holds for every recording that says the same.

    Attributes:
        steps: by invoke: the nodes to be done at each access point, in order.
        sides: by invoke: the same access points, as sides of modules.
        first: by invoke: the nodes to be done before its pass.
        mixes: a value of an invoke is used by a later one.
        late: and it is made where a pass of both has not come yet.
        edited: the access points at which something is replaced or changed in place.
        ends: by node: those that none uses after it.
        program: the same for builtins, where they can do it.
    """

    def __init__(self, invokes: int) -> None:
        self.steps: list[dict[Key, list[int]]] = [{} for _ in range(invokes)]
        self.sides: list[dict[str, set[int]]] = []
        self.first: list[list[int]] = [[] for _ in range(invokes)]
        self.mixes = self.late = False
        self.edited: set[Key | None] = set()
        self.ends: dict[int, list[int]] = {}
        self.program: hooked.Program | None = None


class Straight:
    """A block on its way through the passes of a module, and the values that it has got so far."""

    def __init__(self, rec: HostedRecorder, schedule: Schedule) -> None:
        self._rec, self.schedule = rec, schedule
        self.values: dict[int, Any] = {}

    def forget(self) -> None:
        """Begins anew: what was done so far has no effect."""
        self.values.clear()

    def do(self, ids: Iterable[int], leaves: dict[str, Any]) -> bool:
        """Does nodes, with the tensors that stand at their access point by name; says whether one was replaced.

        Raises:
            OpError: an operation failed; it names the user's line.
        """
        if mode_now() != self._rec.mode or (torch._C._is_any_autocast_enabled() and not self._rec.autocast):
            with _as_written(self._rec):
                return self._do(ids, leaves)
        return self._do(ids, leaves)

    def _do(self, ids: Iterable[int], leaves: dict[str, Any]) -> bool:
        nodes, values, ends = self._rec.nodes, self.values, self.schedule.ends
        wrote = False
        for id in ids:
            node = nodes[id]
            kind = node[0]
            if kind == _READ:
                values[id] = leaves[node[7]]
                if values[id] is None:
                    raise self._rec.absent(id)
                continue
            if kind == _WRITE:
                leaves[node[7]] = values[node[8][1]]
                wrote = True
            else:
                try:
                    values[id] = self._call(id, kind, node)
                except Exception as error:
                    raise self._rec.failure(id, error, values) from None
            for ref in ends.get(id, ()):
                values.pop(ref, None)
        return wrote

    def _call(self, id: int, kind: int, node: tuple[Any, ...]) -> Any:
        values = self.values
        if kind == _CONST:
            return self._rec.captures[node[4]].sent
        if kind == _ITEM:
            return values[node[4][1]][node[5]]
        if kind == _INDEX:
            return values[node[4][1]][substituted(self._rec.made[id][1][1], values)]  # type: ignore[index]
        if kind == _SET_INDEX:
            values[node[4][1]][wire.value(node[5], values)] = wire.value(node[6], values)
            return None
        made = self._rec.made[id]
        assert made is not None
        function, args, kwargs = made
        if isinstance(function, hooked.CALLABLE):
            return function(*substituted(args, values), **(substituted(kwargs, values) if kwargs else {}))
        named = {k: wire.value(x, values) for k, x in node[6].items()} if node[6] else {}
        return hooked.operator(node[4])(*[wire.value(x, values) for x in node[5]], **named)


@contextlib.contextmanager
def _as_written(rec: HostedRecorder) -> Iterator[None]:
    """The autograd state that the block was written in, where the module's forward has changed it."""
    casts = contextlib.nullcontext() if rec.autocast else torch._C._DisableAutocast()
    with torch.inference_mode(bool(rec.mode & 2)), torch.set_grad_enabled(bool(rec.mode & 1)), casts:
        yield


def _changed(node: tuple[Any, ...]) -> Any:
    """The argument that a node changes in place, in wire form, or None."""
    if node[0] == _SET_INDEX:
        return node[4]
    if node[0] == _CALL:
        if node[6] and "out" in node[6]:
            return node[6]["out"]
        name = node[4].partition("::")[2].partition(".")[0]
        if changes_first(name):
            return node[5][0]
    return None


def plan(rec: HostedRecorder, wanted: list[int]) -> Schedule | None:
    """Where each node of a whole recording is done, if it goes straight ahead; None where it needs the engine.

    Args:
        rec: the recording, at the end of its block.
        wanted: the nodes whose values are to be kept.
    """
    if rec.gradients is not None or len(rec.made) != len(rec.nodes) or mode_now() != rec.mode:
        return None
    if rec.captures and not _unchanged(rec):
        return None
    # remembered by what decides it: a trace in a loop says the same each time
    nodes, known = rec.nodes, rec.hosted.schedules
    says = (nodes, wanted, rec.layouts, len(rec.invokes), rec.mode)
    key = (nodes[0][2] if nodes else None, len(nodes))
    found = known.get(key)
    if found is not None and found[0] == says:
        schedule: Schedule | None = found[1]
        return schedule
    if len(known) >= _MOST:
        known.clear()
    schedule = _scheduled(rec, wanted)
    known[key] = (list(nodes), wanted, dict(rec.layouts), *says[3:]), schedule  # the recording goes on
    return schedule


def _scheduled(rec: HostedRecorder, wanted: list[int]) -> Schedule | None:
    """The same, worked out."""
    nodes = rec.nodes
    uses: list[list[int]] = [[]] * len(nodes)
    changed: dict[int, Any] = {}  # by node: what it changes in place
    live = bytearray(len(nodes))
    for id in wanted:
        live[id] = 1
    for id in range(len(nodes) - 1, -1, -1):
        node = nodes[id]
        kind = node[0]
        if kind not in _KNOWN:
            return None
        if kind not in _NO_REFERENCES:
            if kind == _CALL and not node[4].startswith("aten::"):
                return None
            target = _changed(node)
            if target is not None:
                changed[id] = target
            if live[id] or kind == _WRITE or target is not None:
                live[id] = 1
                uses[id] = refs = list(wire.references(node))
                for ref in refs:
                    live[ref] = 1
    out = Schedule(len(rec.invokes))
    last = dict.fromkeys(wanted, len(nodes))  # by node: the last one that uses it; never, of what is kept
    if not _placed(out, rec, uses, live, changed, last):
        return None
    for ref, id in last.items():
        out.ends.setdefault(id, []).append(ref)
    out.sides = [hosting.sides(steps) for steps in out.steps]
    out.program = hooked.program(rec, out)
    return out


def _placed(
    out: Schedule,
    rec: HostedRecorder,
    uses: list[list[int]],
    live: bytearray,
    changed: dict[int, Any],
    last: dict[int, int],
) -> bool:
    """Says where each node is done. False where one cannot be done where the pass stands then."""
    at: list[tuple[float, Key | None]] = [(-1, None)] * len(rec.invokes)
    made = [-1.0] * len(rec.nodes)  # the order of the access point where each is done
    reads: list[frozenset[tuple[int, float]]] = [frozenset()] * len(rec.nodes)  # of what a value is made
    for id, node in enumerate(rec.nodes):
        if not live[id]:
            continue
        kind, invoke = node[0], node[1]
        if node[3] != rec.mode:
            return False
        if kind in (_READ, _WRITE):
            key = (node[4], node[5])
            order = rec.order(invoke, key)
            before = at[invoke][0]
            if kind == _READ and order < before:  # it is the same wherever it is read
                reads[id] = frozenset(((invoke, order),))
                made[id] = order
                out.steps[invoke].setdefault(key, []).append(id)
                continue
            if order < before or (kind == _WRITE and order > before):
                return False
            at[invoke] = (order, key)
            if kind == _READ:
                reads[id] = frozenset(((invoke, order),))
        elif kind == _CONST:
            reads[id] = frozenset(((-1, -1),))
        for ref in uses[id]:
            last[ref] = max(last.get(ref, -1), id)
            reads[id] |= reads[ref]
            if rec.nodes[ref][1] != invoke:
                out.mixes = True
                out.late = out.late or made[ref] > at[invoke][0]
        target = changed.get(id)
        if target is not None:
            if node[0] == _CALL and node[4].partition("::")[2] in RESHAPING:
                return False
            if target[0] != 0 or reads[target[1]] != {(invoke, at[invoke][0])}:
                return False  # a value that the pass has left behind, or that belongs to somebody else
        made[id], point = at[invoke]
        if target is not None or kind == _WRITE:
            out.edited.add(point)
        (out.first[invoke] if point is None else out.steps[invoke].setdefault(point, [])).append(id)
    return True


def _unchanged(rec: HostedRecorder) -> bool:
    """Whether the tensors from outside are what they were at the lines that use them."""
    return all(c.version >= 0 and version(c.original) == c.version for c in rec.captures)
