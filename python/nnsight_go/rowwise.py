"""Several invokes in one forward pass of a hosted module, each with rows of its own.

A module may do anything with the rows of a batch (``x.mean(0)``), so it is asked: a pass of two inputs together
must give at each access point what two passes give, side by side along one axis. Where it does not, and where
autograd or random numbers would tell the difference, each invoke has a pass of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import _ffi, hosting, positions
from .errors import InputError
from .hosting import Spot
from .positions import Place, here
from .straight import Key, Straight

if TYPE_CHECKING:
    from .hosted import Given, Hosted, Layout

_MOST = 128  # rows of one pass
_SHARED = -1  # the axis of a tensor that all rows have in common

# What a row's values may differ by, where the kernels of another number of rows add up in another order.
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Unfit(BaseException):
    """Ends a pass of several invokes: one of them puts something of other sizes into it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor is divided among rows: along which axis, and how much of it each has."""

    axis: int
    each: int

    def part(self, whole: torch.Tensor, row: int, rows: int) -> torch.Tensor:
        """What belongs to some rows, as a view."""
        return whole if self.axis == _SHARED else whole.narrow(self.axis, row * self.each, rows * self.each)


Cuts = dict[tuple[str, int, str], Cut | None]  # by name and port of an access point, and leaf


@dataclasses.dataclass(slots=True)
class Pass:
    """Invokes that share a forward pass, the rows of each, and how what they see is divided."""

    invokes: list[int]
    rows: list[int] = dataclasses.field(default_factory=list)
    cuts: Cuts | None = None


class Together:
    """Which inputs of a module may share a pass: found out once a kind of input and access point.

    Where the user has said which axis the rows are on, nothing is tried out.
    """

    def __init__(self, hosted: Hosted) -> None:
        self._hosted, self._declared, self._axis = hosted, hosted.batch_dim is not None, hosted.batch_dim or 0

    def passes(
        self, given: Sequence[Given], layouts: Callable[[int], Layout], block: Straight, alone: Container[int]
    ) -> list[Pass]:
        """The passes that the invokes of a block need, in the order of the first invoke of each.

        Args:
            given: their inputs.
            layouts: gives the access points of each.
            block: what is to be done.
            alone: those that have a pass of their own in any case.
        """
        each = [Pass([i]) for i in range(len(given))]
        if len(given) < 2 or block.schedule.mixes or self._followed(given):
            return each
        groups: dict[Any, list[Pass]] = {}
        for i, one in enumerate(given):
            rows = self._rows(one)
            kind = i if rows == 0 or i in alone or not block.schedule.steps[i] else self._kind(one, rows)
            if kind not in groups or sum(groups[kind][-1].rows) + rows > _MOST:
                groups.setdefault(kind, []).append(Pass([]))
            groups[kind][-1].invokes.append(i)
            groups[kind][-1].rows.append(rows)
        out = []
        for group in (group for of_kind in groups.values() for group in of_kind):
            if len(group.invokes) > 1:
                group.cuts = self._cuts(given, layouts(group.invokes[0]), block, group)
            out += [group] if group.cuts else [each[i] for i in group.invokes]
        return sorted(out, key=lambda one: one.invokes[0])

    def whole(self, given: Sequence[Given]) -> Given:
        """The inputs of all invokes as one, which an invoke without an input sees.

        Raises:
            InputError: they differ in more than the number of their rows.
        """
        rows = [self._rows(one) for one in given]
        if len(given) == 1:
            return given[0]
        if not all(rows) or any(
            self._kind(x, n) != self._kind(given[0], rows[0]) for x, n in zip(given, rows, strict=True)
        ):
            raise apart(
                here(),
                "these inputs cannot be put together: they differ in more than the number of their rows",
                hint="Give inputs of the same sizes, texts of as many tokens, or all of them as one input.",
            )
        return self._stacked(given, rows)

    def run_whole(self, given: Sequence[Given], layout: Layout, block: Straight, place: Place) -> None:
        """Does all invokes of a block in one pass; the last of them has no input and sees the rows of all others.

        Args:
            given: the inputs by invoke.
            layout: the access points of each.
            block: what is to be done.
            place: the line that begins the last invoke.

        Raises:
            InputError: they cannot share a pass.
            OpError: an operation failed.
        """
        own, last = list(range(len(given))), len(given)
        group = Pass(own, [self._rows(one) for one in given])
        if len(own) == 1:
            named = [
                (*key, leaf.name)
                for key in block.schedule.steps[own[0]]
                for leaf in hosting.leaves(layout.points[key].tree)
            ]
            group.cuts = dict.fromkeys(named, Cut(_SHARED, 0))
        else:
            group.cuts = self._cuts(given, layout, block, group)
        if group.cuts is None:
            names = sorted({name or "the model" for i in own for name, _ in block.schedule.steps[i]})
            raise apart(
                place,
                f"what {', '.join(names[:3])}{', ...' if names[3:] else ''} takes or gives is not made of the rows of "
                "its invokes: they mix, or random numbers or statistics of the batch are in them",
                hint="Switch the model to eval(), or say which axis the rows are on: NNsight(module, batch_dim=...).",
            )
        if block.schedule.late:
            raise apart(place, "an invoke uses a value of another one before that pass has come to it")
        if not self.run(given, layout, block, group, last):
            raise apart(place, "one of them gives a value other sizes, or names a module that was not called")

    def _followed(self, given: Sequence[Given]) -> bool:
        """Whether autograd follows these passes: alone, each would have a history of its own."""
        if not torch.is_grad_enabled():
            return False
        return any(p.requires_grad for p in self._hosted.module.parameters()) or any(
            t.requires_grad for one in given for t in _tensors(one)
        )

    def _rows(self, one: Given) -> int:
        """The rows of an input: the size of its first tensor."""
        first = next((t for t in _tensors(one) if t.dim() > self._axis), None)
        return 0 if first is None else first.shape[self._axis]

    def _is_stacked(self, tensor: torch.Tensor, rows: int) -> bool:
        return tensor.dim() > self._axis and tensor.shape[self._axis] == rows

    def _kind(self, one: Given, rows: int) -> Any:
        """What inputs must have in common to be put together."""

        def of(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if not self._is_stacked(x, rows):
                return (id(x),)  # the same one for all
            sizes = (*x.shape[: self._axis], *x.shape[self._axis + 1 :])
            return (sizes, str(x.dtype), str(x.device))

        return _ffi.calls()["frozen"](hosting.mapped(one, of))

    def _stacked(self, given: Sequence[Given], rows: Sequence[int]) -> Given:
        """Inputs of a kind as one."""
        columns = zip(*map(_tensors, given), strict=True)
        whole = iter([torch.cat(c, self._axis) if self._is_stacked(c[0], rows[0]) else c[0] for c in columns])
        return hosting.mapped(given[0], lambda _: next(whole))  # type: ignore[no-any-return]

    def run(
        self, given: Sequence[Given], layout: Layout, block: Straight, group: Pass, last: int | None = None
    ) -> bool:
        """Does the invokes of a group in one pass. False where they need one each after all: nothing is done then.

        Args:
            given: the inputs by invoke.
            layout: the access points of each.
            block: what is to be done.
            group: which invokes.
            last: one that sees the rows of all of them, as they have left them.

        Raises:
            OpError: an operation failed.
        """
        visitor = _Visitor(self._hosted, layout, block, group, last)
        for i in visitor.invokes:
            block.do(block.schedule.first[i], {})
        try:
            inputs = [given[i] for i in group.invokes]
            whole = self._stacked(inputs, group.rows) if len(inputs) > 1 else inputs[0]
            self._hosted.forward(whole, hosting.sides(visitor.missing), visitor.visit)
        except Unfit:
            block.forget()
            return False
        if visitor.missing:
            block.forget()
        return not visitor.missing

    # ---- what a module does with rows ----

    def _cuts(self, given: Sequence[Given], layout: Layout, block: Straight, group: Pass) -> Cuts | None:
        """How the tensors that a group names are divided, or None where one of them is not."""
        points = {key for i in group.invokes for key in block.schedule.steps[i]}
        wanted = [(*key, leaf) for key in points for leaf in hosting.leaves(layout.points[key].tree)]
        one, other = (given[i] for i in group.invokes[:2])
        if self._declared:
            cuts = self._as_declared(wanted, group.rows[0])
        else:
            cuts = self._hosted.cuts.setdefault(self._hosted.kind(one), {})
            missing = {(name, port) for name, port, leaf in wanted if (name, port, leaf.name) not in cuts}
            if missing:
                cuts |= self._tried(one, other, (group.rows[0], group.rows[1]), missing)
        for name, port, leaf in wanted:
            at = (name, port, leaf.name)
            cut = cuts.setdefault(at, None)  # it is not asked again
            if cut is None or (cut.axis == _SHARED and at[:2] in block.schedule.edited):
                return None
        return cuts

    def _as_declared(self, wanted: list[Any], rows: int) -> Cuts:
        axis, out = self._axis, Cuts()
        for name, port, leaf in wanted:
            size = leaf.shape[axis] if len(leaf.shape) > axis else 0
            if size and size % rows == 0 and ".source." not in f".{name}":  # an operation may turn it around
                out[name, port, leaf.name] = Cut(axis, size // rows)
        return out

    def _tried(self, one: Given, other: Given, rows: tuple[int, int], points: set[Key]) -> dict[Any, Cut | None]:
        """The cuts that passes of two inputs, alone and together, agree with; None for what has none."""
        hosted = self._hosted
        try:
            with hosted.aside() as untouched:
                other = self._another(other, rows[1])
                whole = self._stacked([one, other], rows)
                first, second, both = (hosted.seen(x, points) for x in (one, other, whole))
                if not untouched():  # random numbers, or statistics of the batch
                    both = {}
        except Exception:  # it does not take them together
            both = {}
        return {at: _cut(first.get(at), second.get(at), tensor, rows) for at, tensor in both.items()}

    def _another(self, given: Given, rows: int) -> Given:
        """An input like one, with other values: rows that depend on others would show it. Draws no random numbers."""

        def changed(x: torch.Tensor) -> torch.Tensor:
            if not self._is_stacked(x, rows):
                return x
            if x.is_floating_point() and x.numel():
                slope = torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape) * x.abs().max().clamp_min(1e-3)
                return (x * 0.5 + slope).to(x.dtype)
            flipped = x.flip(-1)
            if x.dtype == torch.bool or not torch.equal(flipped, x) or not bool((x > 1).any()):
                return flipped  # a mask stays one
            return torch.where(x > 0, x - 1, x + 1)

        return hosting.mapped(given, changed)  # type: ignore[no-any-return]


class _Visitor:
    """What is done at the access points of a pass of several invokes."""

    def __init__(self, hosted: Hosted, layout: Layout, block: Straight, group: Pass, last: int | None) -> None:
        self._hosted, self._layout, self._block, self._cuts = hosted, layout, block, group.cuts or {}
        starts = itertools.accumulate(group.rows, initial=0)
        self._parts = list(zip(group.invokes, starts, group.rows, strict=False))
        self._last = last
        self.invokes = group.invokes if last is None else [*group.invokes, last]
        self.missing = {key for i in self.invokes for key in block.schedule.steps[i]}

    def visit(self, spot: Spot, value: Any) -> Any:
        """Does the nodes of each invoke, and joins what they put in the place of their rows."""
        key = (spot.name, spot.port)
        if key not in self.missing:
            return value
        self.missing.discard(key)
        tree = self._layout.points[key].tree
        whole = self._hosted.tensors(spot, tree, value)
        changed: dict[str, Any] = {}
        if key in self._block.schedule.edited:
            for name, tensor in whole.items():
                if tensor is not None and 0 in tensor.stride():  # rows that lie in the same memory
                    whole[name] = changed[name] = tensor.contiguous()
        changed |= self._each(key, whole)
        changed |= self._all(key, whole | changed)
        return hosting.replaced(value, changed) if changed else value

    def _each(self, key: Key, whole: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Does what each invoke does with its rows. Gives the tensors in which rows were replaced."""
        new: dict[str, dict[int, torch.Tensor]] = {}
        for invoke, row, rows in self._parts:
            ids = self._block.schedule.steps[invoke].get(key)
            if ids is None:
                continue
            parts = {n: t if t is None else self._cut(key, n).part(t, row, rows) for n, t in whole.items()}
            after = dict(parts)
            if self._block.do(ids, after):
                for name in whole:
                    if after[name] is not parts[name]:
                        new.setdefault(name, {})[invoke] = _fitting(after[name], parts[name])
        changed: dict[str, torch.Tensor] = {}
        for name, by_invoke in new.items():
            cut, tensor = self._cut(key, name), whole[name]
            rows_of = [by_invoke[i] if i in by_invoke else cut.part(tensor, row, n) for i, row, n in self._parts]
            changed[name] = torch.cat(rows_of, cut.axis) if len(rows_of) > 1 else rows_of[0]
        return changed

    def _all(self, key: Key, whole: dict[str, Any]) -> dict[str, Any]:
        """Does what the last invoke does with all rows. Gives the tensors that are others after it."""
        ids = None if self._last is None else self._block.schedule.steps[self._last].get(key)
        if ids is None:
            return {}
        edited = key in self._block.schedule.edited  # what the invokes have read stays as they have read it
        after = {n: t.clone() if edited and t is not None else t for n, t in whole.items()}
        self._block.do(ids, after)
        return {n: t for n, t in after.items() if t is not whole[n]}

    def _cut(self, key: Key, leaf: str) -> Cut:
        cut = self._cuts[(*key, leaf)]
        assert cut is not None
        return cut


def apart(place: Place, why: str, hint: str | None = None) -> InputError:
    """The error of an invoke without an input, at that line, that no forward pass can be made for."""
    return InputError(
        f"an invoke without an input sees the rows of all others in one forward pass, and {why}",
        hint=hint or "Give all rows as one input, `model.trace(x)`, and say there which of them a line means.",
        **positions.fields(place),
    )


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    out: list[torch.Tensor] = []
    hosting.mapped(x, out.append)
    return iter(out)


def _fitting(new: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor:
    """A replacement that has the sizes of what it replaces. Raises Unfit where it has not."""
    if new is None or old is None or (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
        raise Unfit
    return new


def _cut(one: Any, other: Any, whole: Any, rows: tuple[int, int]) -> Cut | None:
    """How ``whole`` consists of two tensors, or None where it does not."""
    if one is None or other is None or whole is None or one.dim() != whole.dim() or other.dim() != whole.dim():
        return None
    if one.shape == whole.shape == other.shape and _equal(one, whole) and _equal(other, whole):
        return Cut(_SHARED, 0)
    for axis in range(whole.dim()):
        a, b = one.shape[axis], other.shape[axis]
        each = a // rows[0]
        if whole.shape[axis] != a + b or a % rows[0] or each * rows[1] != b or not each:
            continue
        if _equal(whole.narrow(axis, 0, a), one) and _equal(whole.narrow(axis, a, b), other):
            return Cut(axis, each)
    return None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    close = _CLOSE.get(a.dtype)
    if close is None:
        return torch.equal(a, b)
    most = float(b.abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=close, atol=close * most, equal_nan=True)
