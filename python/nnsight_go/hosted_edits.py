"""``model.edit()`` of hosted models: a block without an input, recorded on the access points of an example.

The example says which modules run and what structure they give. Which sizes are the model's own is found
out by making its axes longer: what a pass of such an input has otherwise depends on the input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import positions, wire
from .edits import EditRecorder, InputSizes, depends
from .errors import InputError
from .hosted import Given, Hosted, Layout
from .hosted_skipping import Beside
from .hosting import all_sizes, leaves, mapped, split
from .points import Constant, Leaf, Mapping, Sequence, Tree
from .positions import here
from .proxy import Proxy
from .recorder import proxies
from .wire import Kind
from .wrapping import HostedRecorder

# Questions about the kind of a tensor, whose answers are numbers all the same.
_OF_KIND = frozenset(("dim", "ndim", "ndimension", "element_size", "itemsize"))

_TRIES = 12  # passes that are imagined for one example, at most


@dataclasses.dataclass(frozen=True, slots=True)
class _Twofold(Leaf):
    """A tensor of an access point, whose sizes are known for two inputs."""

    other: tuple[int | str, ...] = ()

    def sizes(self, batch: int, seq: int) -> tuple[int, ...]:
        """The sizes for the input of that number, which ``HostedEditRecorder.batch`` gives."""
        return tuple(map(int, self.other if batch else self.shape))


class HostedEditRecorder(EditRecorder, HostedRecorder):
    """Records an edit of a hosted model.

    Args:
        hosted: the model.
        example: the access points of an input.
    """

    uncalled = "Use the module around it, or give an example of an input for which it is: `with model.edit(x):`."

    def __init__(self, hosted: Hosted, example: Layout) -> None:
        super().__init__(hosted)  # type: ignore[arg-type]
        self._examples = (example, _other(hosted, example))
        self._compare(*self._examples)

    def _compare(self, one: Layout, other: Layout | None) -> None:
        self._lone = other is None  # nothing tells which sizes depend on the input
        self.layouts[self.invoke] = one if other is None else _twofold(one, other)

    def look_inside(self) -> None:
        """Makes the results of operations access points, too."""
        one, other = (layout and self._insides(layout) for layout in self._examples)
        if one is None:
            raise InputError(
                "the operations of this module are not known without data, which an edit has none of",
                hint="Use .source in a trace, and begin the edit after that.",
                **positions.fields(here()),
            )
        self._compare(one, other if other is not None and other.names == one.names else None)
        self.sourced = True

    def _insides(self, layout: Layout) -> Layout | None:
        given = layout.given
        with contextlib.suppress(Exception):  # it does not run without data
            if given is not None:
                given = _sized(given, all_sizes(given), self.hosted.device)
            return self.hosted.inside(layout, given or ((), {}), really=False)
        return None

    def batch(self, invoke: int) -> tuple[int, int]:
        """Which of the two inputs is asked about: sizes of access points are known as they are."""
        return self._probe, 0

    def finish(self) -> None:
        """Ends the recording, of which reads that nothing uses are left out: they may not be there another time."""
        super().finish()
        assert self.edit is not None
        nodes = self.edit.recording.nodes
        used = {ref for node in nodes for ref in wire.references(node)}
        kept = [id for id, node in enumerate(nodes) if node[0] != Kind.READ or id in used]
        number = {id: i for i, id in enumerate(kept)}
        nodes = [wire.mapped(nodes[id], number.__getitem__) for id in kept]
        self.edit.recording = dataclasses.replace(self.edit.recording, nodes=nodes)
        self.edit.skips = self.left.get(0, {})

    def leave_out(self, name: str, beside: Beside) -> None:
        """Notes that a call of a module does not run. What is kept for that must go into a file."""
        for at, value in beside.items():
            if not isinstance(value, bool | int | float | str | None):
                raise InputError(
                    f"an edit keeps tensors and plain values, and {at or 'this'} is a {type(value).__name__}",
                    path=split(name)[0],
                    hint="Skip the module in each trace, or give None where nobody looks at it.",
                    **positions.fields(here()),
                )
        super().leave_out(name, beside)

    # ---- sizes, where one input alone is known: any may depend on it ----

    def shape(self, proxy: Proxy) -> Any:
        """The sizes of a value, of which some may not be known."""
        found = super().shape(proxy)
        return InputSizes([None] * len(found)) if self._lone and len(found) else found

    def meta(self, proxy: Proxy) -> torch.Tensor:
        """Sizes and dtype of a value, where they do not depend on the input."""
        found = super().meta(proxy)
        return depends("the size of this value") if self._lone and found.dim() else found

    def structure(self, id: int) -> Any:
        """What a node with several results gives: a list of them may be as long as the input is."""
        found = super().structure(id)
        return depends("the number of these values") if self._lone and type(found) in (list, tuple) else found

    def fact(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function says that asks for sizes or dtypes alone, where it does not depend on the input."""
        found = super().fact(func, args, kwargs)
        asked = list(proxies((args, kwargs)))
        if not self._lone or not any(self.rough(p).dim() for p in asked) or _name(func) in _OF_KIND:
            return found
        if isinstance(found, torch.Size):
            return InputSizes([None] * len(found))
        compared = isinstance(found, bool) and len(asked) > 1  # sizes; alone it says what kind of a tensor it is
        return depends("what this line asks for") if compared or type(found) in (int, tuple) else found


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return str(func.__self__.__name__ if name == "__get__" else name)


# ---- two inputs as one ----


def _twofold(one: Layout, other: Layout) -> Layout:
    """A layout of both, in which tensors have the sizes of both."""
    points = {}
    for key, point in one.points.items():
        points[key] = dataclasses.replace(point, tree=_joined(point.tree, iter(leaves(other.points[key].tree))))
    return Layout(one.spots, points, one.calls, templates=one.templates)


def _joined(tree: Tree, others: Iterator[Leaf]) -> Tree:
    """A structure whose tensors have also the sizes of others, which come in the same order."""
    match tree:
        case Leaf():
            return _Twofold(tree.name, tree.shape, tree.dtype, next(others).shape)
        case Sequence():
            return dataclasses.replace(tree, items=tuple(_joined(item, others) for item in tree.items))
        case Mapping():
            return dataclasses.replace(tree, fields={k: _joined(v, others) for k, v in tree.fields.items()})
        case Constant():
            return tree


# ---- a second input ----

_longer: weakref.WeakKeyDictionary[Layout, Layout | None] = weakref.WeakKeyDictionary()


def _other(hosted: Hosted, example: Layout) -> Layout | None:
    """The layout of an input of other sizes for which the same runs: the one that is most different."""
    if example not in _longer:
        _longer[example] = _lengthened(hosted, example)
    found = _longer[example]
    known = hosted.alike(example) if found is None else [found, *hosted.alike(example)]
    other = max(known, key=lambda layout: _difference(example, layout), default=None)
    return other if found is not None or (other is not None and _difference(example, other)) else None


def _difference(one: Layout, other: Layout) -> int:
    """How many sizes of tensors differ."""
    count = 0
    for key, point in one.points.items():
        for a, b in zip(leaves(point.tree), leaves(other.points[key].tree), strict=True):
            count += len(a.shape) != len(b.shape) or sum(x != y for x, y in zip(a.shape, b.shape, strict=True))
    return count


def _lengthened(hosted: Hosted, example: Layout) -> Layout | None:
    """The layout of the example with its axes longer, as many as can be; None where none can."""
    if example.given is None:
        return None
    found = None
    tried: set[str] = set()
    sizes = all_sizes(example.given)
    done: set[tuple[int, int]] = set()  # number of a tensor, and of its axis
    for axes, longer in itertools.product(_groups(sizes), (lambda n: 2 * n, lambda n: n + 1)):
        if axes & done or len(tried) >= _TRIES:
            continue
        wanted = [[longer(n) if (t, k) in axes else n for k, n in enumerate(of)] for t, of in enumerate(sizes)]
        if repr(wanted) in tried:
            continue
        tried.add(repr(wanted))
        with contextlib.suppress(Exception):  # the module does not take that
            layout = hosted.imagined(_sized(example.given, wanted, hosted.device))
            if layout.names == example.names:
                found, sizes, done = layout, wanted, done | axes
    return found


def _groups(sizes: list[list[int]]) -> Iterator[frozenset[tuple[int, int]]]:
    """Axes that may be one thing (the batch, a sequence): those of one number, and those of one size."""
    axes = [(t, k) for t, of in enumerate(sizes) for k in range(len(of))]
    for number in range(max((k + 1 for _, k in axes), default=0)):
        yield frozenset((t, k) for t, k in axes if k == number)
    for size in dict.fromkeys(sizes[t][k] for t, k in axes):
        yield frozenset((t, k) for t, k in axes if sizes[t][k] == size)


def _sized(given: Given, sizes: list[list[int]], device: torch.device) -> Given:
    """An input of the same structure whose tensors have other sizes, and no values that mean anything."""
    rest = iter(sizes)
    out: Given = mapped(given, lambda x: torch.empty(next(rest), dtype=x.dtype, device=device))
    return out
