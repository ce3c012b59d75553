"""``model.edit()``: interventions that every later trace of a model brings along.

An edit is recorded once, without an input, and put ahead of each invoke's own lines: where both come
to the same module, the edit goes first, and the invoke sees the edited value.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import positions, saving, shapes, stored, torchmap
from .errors import InputError
from .positions import here
from .proxy import Proxy
from .recorder import Invoke, Recorder, current

if TYPE_CHECKING:
    from .model import LanguageModel
    from .native import Native

_KIND = "edit"

# Stand-ins for the sizes of an input: what comes out the same with both does not depend on them.
_PROBES = ((2, 7), (3, 11))


class Edit:
    """A recorded intervention.

    It can be printed, saved, and applied to a model whose modules have the same names.
    """

    def __init__(self, recording: stored.Recording) -> None:
        self.recording = recording

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the edit to a file: a graph and the tensors it uses, no code."""
        self.recording.save(path, _KIND)

    def __str__(self) -> str:
        return self.recording.text()

    def __repr__(self) -> str:
        return f"<Edit of {len(self.recording.nodes)} operations>"

    def mermaid(self) -> str:
        """The edit as a Mermaid flow chart."""
        return self.recording.text(mermaid=True)


def load_edit(path: str | os.PathLike[str]) -> Edit:
    """Reads an edit from a file.

    Raises:
        GraphError: the file holds none.
    """
    return Edit(stored.load(path, _KIND))


class EditRecorder(Recorder):
    """Records a block that has no input yet: sizes that depend on one are not known."""

    def __init__(self, native: Native) -> None:
        super().__init__(native)
        self.recording: stored.Recording | None = None
        self.invokes = [Invoke([[0]])]  # stands for the invoke that the edit will belong to
        self.invoke = 0
        self._probe = 0
        self._seen: list[dict[int, Any]] = [{}, {}]

    def batch(self, invoke: int) -> tuple[int, int]:
        """Sizes of one of the stand-ins for an input."""
        return _PROBES[self._probe]

    def structure(self, id: int) -> Any:
        """What a node gives, on meta tensors, where that does not depend on the input."""
        found = []
        for self._probe in (0, 1):
            self.metas = self._seen[self._probe]
            found.append(shapes.infer(self, id))
        self._probe, self.metas = 0, self._seen[0]
        if _sizes(found[0]) != _sizes(found[1]):
            raise InputError(
                "the sizes of this depend on the input, and an edit is recorded without one",
                hint="Write the line so that it names no size of batch or sequence: h[:, -1], h.mean(1), ...",
                **positions.fields(here()),
            )
        return found[0]

    def rough(self, proxy: Proxy) -> torch.Tensor:
        """Dtype and number of axes of a value."""
        self.alive(proxy)
        out = shapes.infer(self, proxy._id)
        assert isinstance(out, torch.Tensor)
        return out

    def meta(self, proxy: Proxy) -> torch.Tensor:
        """Sizes and dtype of a value, where they do not depend on the input."""
        self.alive(proxy)
        out = self.structure(proxy._id)
        assert isinstance(out, torch.Tensor)
        return out

    def unknown(self, id: int, error: Exception) -> NoReturn:
        """Refuses: what is not known without values is not known here."""
        raise error

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
        """Ends the recording. Nothing runs."""
        self.conclude()
        self.recording = stored.Recording([([[0]], None)], self.nodes, [c.sent for c in self.captures])
        self.close("an edit keeps no values")


def _sizes(structure: Any) -> Any:
    if isinstance(structure, torch.Tensor):
        return structure.shape, structure.dtype
    return [_sizes(item) for item in structure] if isinstance(structure, tuple | list) else structure


class Editing:
    """``with model.edit() as edited:`` — see ``LanguageModel.edit``."""

    def __init__(self, model: LanguageModel, inplace: bool) -> None:
        self._model, self._inplace = model, inplace
        self._edited = model if inplace else model._view()

    def __enter__(self) -> LanguageModel:
        if current.recorder is not None:
            raise InputError(
                "an edit cannot begin inside a trace",
                hint="A line of the trace itself does what an edit of it would do.",
                **positions.fields(here()),
            )
        saving.mount()
        self._recorder = EditRecorder(self._model._native)
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
                assert self._recorder.recording is not None
                self._edited._edits = (*self._edited._edits, Edit(self._recorder.recording))
            else:
                self._recorder.close(f"its block was left by {kind.__name__}")
        finally:
            current.recorder = None
