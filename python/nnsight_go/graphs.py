"""``tracer.graph``: what a trace has recorded, to be read, drawn, kept and run again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from . import inputs, positions, stored
from .errors import GraphError
from .positions import here
from .wire import Kind

if TYPE_CHECKING:
    from .model import LanguageModel

_KIND = "graph"


class Graph:
    """The graph of a trace. ``print(graph)`` shows it, a line a node with the user's line beside it."""

    def __init__(self, recording: stored.Recording, facts: stored.Facts) -> None:
        self.recording = recording
        self._facts = facts

    def __str__(self) -> str:
        return self.recording.text()

    def __repr__(self) -> str:
        return f"<Graph of {len(self.recording.invokes)} invokes and {len(self.recording.nodes)} nodes>"

    def mermaid(self) -> str:
        """The graph as a Mermaid flow chart."""
        return self.recording.text(mermaid=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the graph to a file: data and the tensors it uses, no code.

        Raises:
            GraphError: it keeps no values, or a tensor that it uses has changed.
        """
        self._check()
        self.recording.save(path, _KIND, self._facts)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Graph:
        """Reads a graph from a file.

        Raises:
            GraphError: the file holds none.
        """
        return Graph(*stored.load(path, _KIND))

    def run(self, model: LanguageModel, *prompts: Any) -> list[torch.Tensor]:
        """Runs the graph on a model.

        Args:
            model: any whose modules have the names that the graph uses.
            prompts: an input for each invoke that had one, all of which may be of other lengths; none at
                all: the inputs it was recorded with.

        Returns:
            The values that were saved, in the order in which they were.

        Raises:
            GraphError: there are more or fewer inputs than it had; or a line of it used the sizes or the
                values of its own inputs, so that it fits no others.
        """
        self._check()
        invokes = self.recording.invokes
        own = [i for i, v in enumerate(invokes) if v[0] is not None]
        if prompts:
            if len(prompts) != len(own):
                raise GraphError(
                    f"this graph has {len(own)} inputs, and {len(prompts)} were given",
                    hint="Give one for each invoke that had one, or none to use its own.",
                    **positions.fields(here()),
                )
            given = dict(zip(own, prompts, strict=True))
            invokes = [
                inputs.read(model._tokenizer_for_text, (given[i],), {}) if i in given else v
                for i, v in enumerate(invokes)
            ]
            self._check_inputs(invokes)
        recording = stored.Recording(invokes, self.recording.nodes, self.recording.constants)
        run = model._native.begin(recording.wire(), recording.constants, end=True)
        try:
            values = run.results(None)
        finally:
            run.free()
        saves = [i for i, node in enumerate(recording.nodes) if node[0] == Kind.SAVE]
        by_node = dict(zip(saves, values, strict=True))
        return [by_node[i] for i in self._facts.kept]

    def _check(self) -> None:
        if not self._facts.kept:
            raise GraphError(
                "this graph keeps no values",
                hint="Take tracer.graph after the block, of a trace that saves something.",
                **positions.fields(here()),
            )
        self.recording.check()

    def _check_inputs(self, invokes: list[tuple[Any, ...]]) -> None:
        def sizes(all_: list[tuple[Any, ...]]) -> list[tuple[int, int] | None]:
            return [None if v[0] is None else (len(v[0]), max(map(len, v[0]))) for v in all_]

        facts = self._facts
        if facts.forced is not None and [v[:2] for v in invokes] != [v[:2] for v in self.recording.invokes]:
            raise GraphError(
                "this graph fits only the inputs it was recorded with: a line of it used their values",
                hint="Do with operations of torch what that line does with a number, and record again.",
                **positions.fields(facts.forced),
            )
        if facts.pinned is not None and sizes(invokes) != sizes(self.recording.invokes):
            raise GraphError(
                "this graph fits only inputs of the sizes it was recorded with: a line of it used them",
                hint="Write that line without sizes of batch or sequence (h[:, -1], h.mean(1)), and record again.",
                **positions.fields(facts.pinned),
            )
