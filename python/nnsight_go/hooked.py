"""Blocks whose lines are done by builtins, in hooks on what modules give (``pybind/hooked.h``).

Of the blocks that go straight ahead (``straight``) they are those of one invoke that name outputs of one tensor, of
modules that are called once, and do to them what takes no more than tensors and plain values. Most are.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import _ffi, points, positions, wire
from .errors import OpError
from .hosting import Spot, called
from .points import Leaf, Tree
from .proxy import Proxy
from .wire import Kind

if TYPE_CHECKING:
    from .straight import Schedule
    from .wrapping import HostedRecorder

# Functions whose call, as it was recorded, does what the recorded operator does.
CALLABLE = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    torch._ops.OpOverload,
    torch._ops.OpOverloadPacket,
)

Step = tuple[Any, ...]

_READ, _WRITE, _CONST, _ITEM, _STORE, _CALL, _FREE = range(7)  # hooked.h has them, and what belongs to each

_PLAIN = (int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, types.EllipsisType, type(None))


class Unfit(Exception):
    """Builtins cannot do a step."""


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """What is done in the hooks of a pass. It holds for every recording that says the same.

    Attributes:
        spots: the outputs at which something is done.
        modules: whose they are.
        steps: by module: what is done there.
        before: what is done before the pass.
        around: these modules and those around them. One of them that has been compiled calls no hooks.
    """

    spots: list[Spot]
    modules: tuple[torch.nn.Module, ...]
    steps: tuple[tuple[Step, ...], ...]
    before: tuple[Step, ...]
    around: list[torch.nn.Module]


def program(rec: HostedRecorder, schedule: Schedule) -> Program | None:
    """A schedule as builtins do it; None where they cannot."""
    if len(rec.invokes) != 1:
        return None
    modules, keys = rec.hosted.modules, list(schedule.steps[0])
    if rec.hosted.compiles([path for path, _ in keys]):
        return None
    for path, port in keys:
        layout = rec.layout(0)
        once = path in modules and port == wire.OUTPUT and layout.calls.get((path, port)) == 1
        if not once or not _is_bare(layout.points[path, port].tree, path in rec.hosted.wrapped):
            return None
    try:
        steps = tuple([_steps(rec, schedule, schedule.steps[0][key]) for key in keys])
        before = _steps(rec, schedule, schedule.first[0])
    except Unfit:
        return None
    paths = [path for path, _ in keys]
    around = [m for path, m in modules.items() if not path or any(f"{p}.".startswith(f"{path}.") for p in paths)]
    spots = [Spot(path, port, call=0) for path, port in keys]
    return Program(spots, tuple([modules[path] for path in paths]), steps, before, around)


def _is_bare(tree: Tree, wrapped: bool) -> bool:
    """Whether a module gives one tensor, however it is shown."""
    if wrapped and type(tree) is points.Sequence and len(tree.items) == 1:
        (tree,) = tree.items
    return type(tree) is Leaf


# ---- steps ----


def _steps(rec: HostedRecorder, schedule: Schedule, ids: Iterable[int]) -> tuple[Step, ...]:
    out: list[Step] = []
    for id in ids:
        out.append(_step(rec, id, rec.nodes[id]))
        out += [(_FREE, ref) for ref in schedule.ends.get(id, ())]
    return tuple(out)


def _step(rec: HostedRecorder, id: int, node: tuple[Any, ...]) -> Step:
    match node[0]:
        case Kind.READ:
            return _READ, id
        case Kind.WRITE:
            return _WRITE, id, node[8][1]
        case Kind.CONST:
            return _CONST, id, node[4]
        case Kind.ITEM:
            return _ITEM, id, node[4][1], node[5]
        case Kind.INDEX:
            return _ITEM, id, node[4][1], _known(node[5])
        case Kind.SET_INDEX:
            key, value = _known(node[5]), node[6]
            if type(value) is list and value[0] == wire.Tag.REF:
                return _STORE, id, node[4][1], key, value[1], None
            return _STORE, id, node[4][1], key, -1, _known(value)
    return _called(rec, id, node)


def _known(x: Any) -> Any:
    """An argument out of its wire form, which holds no tensors."""
    try:
        return wire.value(x, ())
    except IndexError:
        raise Unfit from None


def _called(rec: HostedRecorder, id: int, node: tuple[Any, ...]) -> Step:
    made = rec.made[id]
    if made is not None and isinstance(made[0], CALLABLE):
        function, given, by_name = made
        nodes = [_node_of(rec, node, x) if isinstance(x, torch.Tensor) else None for x in given]
        plain = _plain
    else:
        function, given, by_name = operator(node[4]), node[5], node[6]
        nodes = [x[1] if type(x) is list and x[0] == wire.Tag.REF else None for x in given]
        plain = _known
    args = tuple([plain(x) if at is None else None for x, at in zip(given, nodes, strict=True)])
    refs = tuple([i for place, at in enumerate(nodes) if at is not None for i in (place, at)])
    return _CALL, id, function, args, refs, {k: plain(x) for k, x in by_name.items()} if by_name else None


def operator(name: str) -> Any:
    """The operator of a name like ``aten::add.Tensor``."""
    _, _, name = name.partition("::")
    name, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, name)
    return getattr(packet, overload) if overload else packet


def _node_of(rec: HostedRecorder, node: tuple[Any, ...], tensor: torch.Tensor) -> int:
    """The node by which another uses a tensor: a proxy, or one from outside."""
    if type(tensor) is Proxy:
        return tensor._id
    for ref in wire.references(node):
        used = rec.nodes[ref]
        if used[0] == Kind.CONST and rec.captures[used[4]].original is tensor:
            return ref
    raise Unfit


def _plain(x: Any) -> Any:
    """An argument that says all that it is, and holds on to nothing."""
    if isinstance(x, torch.Size) or (isinstance(x, _PLAIN) and not isinstance(x, torch.Tensor)):
        return x
    if type(x) is tuple or type(x) is list:
        return type(x)(map(_plain, x))
    raise Unfit


# ---- runs ----


def run(rec: HostedRecorder, program: Program, ids: list[int], adopt: Sequence[Proxy]) -> None:
    """Runs a recording's pass. Proxies become the values of nodes.

    Raises:
        OpError: an operation failed; it names the user's line.
        InputError: a module was not called, or gave no tensor.
    """
    args, kwargs = rec.given[0]
    consts = [c.sent for c in rec.captures] if rec.captures else []
    found = called(
        _ffi.calls()["forward"],
        program.modules, program.steps, program.before, len(rec.nodes), rec.hosted.module, args, kwargs,
        consts, rec.mode, rec.autocast, rec.failure, ids, adopt, torch.Tensor,
    )  # fmt: skip
    if found is not None:
        check(rec, program, found)


def check(rec: HostedRecorder, program: Program, found: Sequence[Any]) -> None:
    """Raises where a module was not called, or gave no tensor: ``found`` has True for the others."""
    for value, spot, steps in zip(found, program.spots, program.steps, strict=True):
        if value is True:
            continue
        reads = [step[1] for step in steps if step[0] == _READ]
        raise rec.absent(reads[0]) if value is None and reads else rec.hosted.wrong(spot, value)


def failure(rec: HostedRecorder, id: int, error: Exception, values: Sequence[Any] | Mapping[int, Any]) -> OpError:
    """The error of an operation that failed, with the sizes of its tensors, which are found by the number of a node."""
    node = rec.nodes[id]
    op = node[4] if node[0] == Kind.CALL else ("index" if node[0] == Kind.INDEX else "index assignment")
    known = values if isinstance(values, Mapping) else dict(enumerate(values))
    sizes = [list(v.shape) for ref in wire.references(node) if isinstance(v := known.get(ref), torch.Tensor)]
    found = OpError(
        str(error).partition("\n")[0],
        op=op,
        node=id,
        invoke=node[1],
        hint=f"Its tensors have the sizes {', '.join(map(str, sizes))}." if sizes else None,
        **positions.fields(node[2]),
    )
    found.late = True
    return found
