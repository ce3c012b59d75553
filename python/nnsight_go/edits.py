"""``model.edit()``: interventions that every later trace of a model brings along.

An edit is recorded once, without an input, and put ahead of each invoke's own lines: where both come
to the same module, the edit goes first, and the invoke sees the edited value.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Self, TypeVar

import torch

from . import positions, saving, sessions, shapes, stored, torchmap
from .errors import GraphError, InputError, OpError
from .positions import here
from .proxy import Proxy
from .recorder import Invoke, Recorder, current, proxies
from .wire import Kind

if TYPE_CHECKING:
    from .native import Native

_KIND = "edit"

# Stand-ins for the sizes of an input: what comes out the same with both does not depend on them.
_PROBES = ((2, 7), (3, 11))


class Edit:
    """A recorded intervention.

    It can be printed, saved, and applied to a model whose modules have the same names.
    """

    def __init__(
        self, recording: stored.Recording, resizes: bool = False, skips: Mapping[str, dict[str, Any]] | None = None
    ) -> None:
        self.recording = recording
        self.resizes = resizes  # whether it may put values of other sizes in the place of the model's
        self.skips = skips or {}  # by name: calls of a wrapped model's modules that do not run (hosted_skipping)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the edit to a file: a graph and the tensors it uses, no code."""
        self.recording.save(path, _KIND, stored.Facts(resizes=self.resizes, skips=dict(self.skips)))

    def __str__(self) -> str:
        return self.recording.text().partition("\n")[2].replace(_STAND_IN, "an edit", 1)

    def __repr__(self) -> str:
        return f"<Edit of {len(self.recording.nodes)} operations>"

    def mermaid(self) -> str:
        """The edit as a Mermaid flow chart."""
        return self.recording.text(mermaid=True).replace(_STAND_IN, "an edit", 1)


_STAND_IN = "invoke 0: 1 row of 1 token"


def load_edit(path: str | os.PathLike[str]) -> Edit:
    """Reads an edit from a file.

    Raises:
        GraphError: the file holds none.
    """
    recording, facts = stored.load(path, _KIND)
    if len(recording.invokes) != 1 or any(node[0] == Kind.SAVE for node in recording.nodes):
        raise GraphError(f"{os.fspath(path)} holds no edit: it keeps values", **positions.fields(here()))
    return Edit(recording, facts.resizes, facts.skips)


class InputSizes(Sequence[int]):
    """The sizes of a value in an edit, of which some depend on the input: asking for those is an error.

    No tuple: torch's own reading of tuples does not expect that an item refuses.
    """

    def __init__(self, sizes: Iterable[int | None]) -> None:
        self._sizes = tuple(sizes)

    def __getitem__(self, index: Any) -> Any:
        found = self._sizes[index]
        if isinstance(index, slice):
            return InputSizes(found) if None in found else torch.Size(found)
        return depends("this size") if found is None else found

    def __iter__(self) -> Iterator[int]:
        return iter([self[i] for i in range(len(self))])

    def __len__(self) -> int:
        return len(self._sizes)

    def __add__(self, other: object) -> NoReturn:
        depends("this size")  # what the sum is for names them all

    __radd__ = __add__

    def numel(self) -> int:
        """The product of the sizes."""
        return math.prod(self)

    def __eq__(self, other: object) -> bool:
        return tuple(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"[{', '.join('?' if size is None else str(size) for size in self._sizes)}]"


def depends(what: str) -> NoReturn:
    """Refuses what depends on the input."""
    raise InputError(
        f"{what} depends on the input, and an edit is recorded without one",
        hint="Write the line so that it names no size of batch or sequence: h[:, -1], h.mean(1), "
        "h.unflatten(-1, (heads, -1)).",
        **positions.fields(here()),
    )


class EditRecorder(Recorder):
    """Records a block that has no input yet: sizes that depend on one are not known."""

    plain = False

    def __init__(self, native: Native) -> None:
        super().__init__(native)
        self.edit: Edit | None = None
        self.invokes = [Invoke([[0]])]  # stands for the invoke that the edit will belong to
        self.invoke = 0
        self._probe = 0
        self._seen: list[dict[int, Any]] = [self.metas, {}]

    def batch(self, invoke: int) -> tuple[int, int]:
        """Sizes of one of the stand-ins for an input."""
        return _PROBES[self._probe]

    def _on_each(self, ask: Callable[[], Any]) -> tuple[Any, Any]:
        """The answers to a question with each of the stand-ins."""
        found, now = [], self._probe  # a question may lead to others
        try:
            for self._probe in (0, 1):
                self.metas = self._seen[self._probe]
                found.append(ask())
        finally:
            self._probe, self.metas = now, self._seen[now]
        return found[0], found[1]

    def structure(self, id: int) -> Any:
        """What a node with several results gives, on meta tensors: their number must not depend on the input."""
        one, other = self._on_each(lambda: shapes.infer(self, id))
        if _count(one) != _count(other):
            depends("the number of these values")
        return one

    def rough(self, proxy: Proxy) -> torch.Tensor:
        """Dtype and number of axes of a value."""
        self.alive(proxy)
        out = shapes.infer(self, proxy._id)
        assert isinstance(out, torch.Tensor)
        return out

    def meta(self, proxy: Proxy) -> torch.Tensor:
        """Sizes and dtype of a value, where they do not depend on the input."""
        self.alive(proxy)
        one, other = self._on_each(lambda: shapes.infer(self, proxy._id))
        if one.shape != other.shape:
            depends("the size of this value")
        assert isinstance(one, torch.Tensor)
        return one

    def shape(self, proxy: Proxy) -> Any:
        """The sizes of a value, of which some may not be known."""
        self.alive(proxy)
        return _merged(*self._on_each(lambda: shapes.infer(self, proxy._id).shape))

    def fact(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function says that asks for sizes or dtypes alone, where it does not depend on the input."""
        asked = list(proxies((args, kwargs)))
        for p in asked:
            self.alive(p)

        def ask() -> Any:
            for p in asked:
                shapes.infer(self, p._id)
            with torch._C.DisableTorchFunction():
                return func(*shapes.on_meta(self, args), **shapes.on_meta(self, kwargs))

        one, other = self._on_each(ask)
        if isinstance(one, torch.Size):
            return _merged(one, other)
        return one if one == other else depends("what this line asks for")

    def shown(self, proxy: Proxy) -> str:
        """What is known of a value, for people."""
        return f"shape={self.shape(proxy)}, {str(self.rough(proxy).dtype).removeprefix('torch.')}, "

    def fits(self, write: Any) -> bool:
        """Whether what was written has the sizes of what stood there, with either stand-in."""
        return all(self._on_each(lambda: Recorder.fits(self, write)))

    def unknown(self, id: int, error: Exception) -> NoReturn:
        """Refuses: what is not known without values is not known here."""
        node = self.nodes[id]
        raise OpError(
            "the sizes of what this line gives are known once it is computed, and an edit is recorded without an input"
            if isinstance(error, NotImplementedError)
            else str(error),
            op=node[4] if isinstance(node[4], str) else None,
            **positions.fields(node[2]),
        ) from error

    def force(self, wanted: Iterable[Proxy]) -> NoReturn:
        """Refuses: there are no values."""
        raise InputError(
            "this line needs a value, and an edit is recorded without an input",
            hint="Use operations of torch alone, or write the line into each trace.",
            **positions.fields(here()),
        )

    def save(self, value: Any) -> NoReturn:
        """Refuses: an edit has nobody to keep values for."""
        raise InputError(
            "an edit changes values and keeps none",
            hint="Save in the trace that it is used in.",
            **positions.fields(here()),
        )

    def finish(self) -> None:
        """Ends the recording. Nothing runs. The edit has tensors of its own: what becomes of others does not matter."""
        self.conclude()
        self.check_captures()
        with torch.no_grad():
            constants = [c.sent.detach().clone() if c.sent is c.original else c.sent for c in self.captures]
        resizes = not all(self._keeps_sizes(w) for writes in self._writes.values() for w in writes)
        apart = stored.apart(constants, self.native.device)
        self.edit = Edit(stored.Recording([([[0]], None)], self.nodes, constants, apart=apart), resizes)
        self.close("an edit keeps no values")


def _count(structure: Any) -> Any:
    return [_count(item) for item in structure] if isinstance(structure, tuple | list) else type(structure)


def _merged(one: Sequence[int], other: Sequence[int]) -> torch.Size | InputSizes:
    if one == other:
        return torch.Size(one)
    if len(one) != len(other):  # of a change in place that only one of them has seen
        depends("the number of axes of this value")
    return InputSizes(a if a == b else None for a, b in zip(one, other, strict=True))


class Editable:
    """A model whose traces may bring edits along."""

    _edits: tuple[Edit, ...] = ()

    def _view(self) -> Any:
        """The same model once more, with the edits it has now."""
        raise NotImplementedError

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that traces bring along, in the order in which they are made."""
        return self._edits

    def with_edits(self, *edits: Edit) -> Self:
        """A view of the model, with its weights, that has these edits beside its own."""
        view: Self = self._view()
        view._edits = (*self._edits, *edits)
        return view

    def clear_edits(self) -> None:
        """Forgets all edits of this model."""
        self._edits = ()


Model = TypeVar("Model", bound=Editable)


class Editing(Generic[Model]):
    """``with model.edit() as edited:`` — see ``LanguageModel.edit``.

    Args:
        model: which.
        inplace: whether it is edited itself.
        begin: makes what records the block.
    """

    def __init__(self, model: Model, inplace: bool, begin: Callable[[], EditRecorder]) -> None:
        self._begin = begin
        self._edited: Model = model if inplace else model._view()

    def __enter__(self) -> Model:
        if current.recorder is not None:
            raise InputError(
                "an edit cannot begin inside a trace",
                hint="A line of the trace itself does what an edit of it would do.",
                **positions.fields(here()),
            )
        saving.mount()
        sessions.flush()
        self._recorder = self._begin()
        self._mode = torchmap.Mode()
        self._mode.__enter__()
        current.recorder = self._recorder
        return self._edited

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, traceback)
        try:
            if kind is None:
                self._recorder.finish()
                assert self._recorder.edit is not None
                self._edited._edits = (*self._edited._edits, self._recorder.edit)
            else:
                self._recorder.close(f"its block was left by {kind.__name__}")
        finally:
            current.recorder = None
