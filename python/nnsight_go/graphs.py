"""``tracer.graph``: what a trace has recorded, to be read, drawn, kept and run again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch

from . import inputs, positions, stored
from .errors import GraphError
from .positions import here
from .wire import Kind

if TYPE_CHECKING:
    from .hosted import Given
    from .model import LanguageModel
    from .wrapping import NNsight

_KIND = "graph"


class Graph:
    """The graph of a trace. ``print(graph)`` shows it, a line a node with the user's line beside it."""

    inputs: Sequence[Given] | None = None  # those it was recorded with, of a wrapped model that is still there

    def __init__(self, recording: stored.Recording, facts: stored.Facts) -> None:
        self.recording = recording
        self.facts = facts

    def __str__(self) -> str:
        return self._text()

    def __repr__(self) -> str:
        return f"<Graph of {len(self.recording.invokes)} invokes and {len(self.recording.nodes)} nodes>"

    def mermaid(self) -> str:
        """The graph as a Mermaid flow chart."""
        return self._text(mermaid=True)

    def _text(self, mermaid: bool = False) -> str:
        text = self.recording.text(mermaid)
        own = [i for i, v in enumerate(self.recording.invokes) if v[0] is not None]
        for invoke, sizes in zip(own, self.facts.sizes or (), strict=False):  # to the engine they are a token each
            inputs = f"an input of {', '.join(map(str, sizes))}" if sizes else "an input without tensors"
            text = text.replace(f"invoke {invoke}: 1 row of 1 token", f"invoke {invoke}: {inputs}")
        return text

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the graph to a file: data and the tensors it uses, no code.

        Raises:
            GraphError: it keeps no values, a tensor that it uses has changed, or it gives a skipped module's
                caller what is neither a tensor nor a plain value.
        """
        self._check()
        for name, at, value in (
            (n, at, x) for left in self.facts.left for n, of in left.items() for at, x in of.items()
        ):
            if not isinstance(value, bool | int | float | str | None):
                raise GraphError(
                    f"a file keeps tensors and plain values, and {at or 'this'} is a {type(value).__name__}",
                    path=name,
                    hint="Give None where nobody looks at it: module.skip((hidden, None)).",
                    **positions.fields(here()),
                )
        self.recording.save(path, _KIND, self.facts)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Graph:
        """Reads a graph from a file.

        Raises:
            GraphError: the file holds none.
        """
        return Graph(*stored.load(path, _KIND))

    def run(self, model: LanguageModel | NNsight, *prompts: Any) -> list[torch.Tensor]:
        """Runs the graph on a model.

        Args:
            model: any whose modules have the names that the graph uses.
            prompts: an input for each invoke that had one, all of which may be of other lengths; none at
                all: the inputs it was recorded with. A wrapped module's is a value, a tuple of them, or a
                dictionary of them by name.

        Returns:
            The values that were saved, in the order in which they were.

        Raises:
            GraphError: there are more or fewer inputs than it had; or a line of it used the sizes or the
                values of its own inputs, so that it fits no others.
        """
        self._check()
        if model._native.by_input:
            from . import hosted_graphs

            return hosted_graphs.run(self, cast("NNsight", model), prompts)
        invokes = self.recording.invokes
        own = [i for i, v in enumerate(invokes) if v[0] is not None]
        if prompts:
            self.check_count(len(own), len(prompts))
            given = dict(zip(own, prompts, strict=True))
            invokes = [
                inputs.read(model._tokenizer_for_text, (given[i],), {}) if i in given else v
                for i, v in enumerate(invokes)
            ]
            self._check_inputs(invokes)
        elif self.facts.sizes is not None:
            self.lacks_inputs()
        constants = self.recording.constants_on(model.device)
        recording = stored.Recording(invokes, self.recording.nodes, constants)
        run = model._native.begin(recording.wire(), recording.constants, end=True)
        try:
            values = run.results(None)
        finally:
            run.free()
        saves = [i for i, node in enumerate(recording.nodes) if node[0] == Kind.SAVE]
        by_node = dict(zip(saves, values, strict=True))
        return [by_node[i] for i in self.facts.kept]

    def _check(self) -> None:
        if not self.facts.kept:
            raise GraphError(
                "this graph keeps no values",
                hint="Take tracer.graph after the block, of a trace that saves something.",
                **positions.fields(here()),
            )
        self.recording.check()

    def _check_inputs(self, invokes: list[tuple[Any, ...]]) -> None:
        def sizes(all_: list[tuple[Any, ...]]) -> list[tuple[int, int] | None]:
            return [None if v[0] is None else (len(v[0]), max(map(len, v[0]))) for v in all_]

        own = self.recording.invokes
        wrapped = self.facts.sizes is not None  # tokens are nothing to compare with them
        self.check_fit(
            same=not wrapped and [v[:2] for v in invokes] == [v[:2] for v in own],
            same_sizes=not wrapped and sizes(invokes) == sizes(own),
        )

    def check_count(self, inputs: int, given: int) -> None:
        """Raises where another number of inputs is given than the graph has."""
        if given != inputs:
            raise GraphError(
                f"this graph has {inputs} inputs, and {given} were given",
                hint="Give one for each invoke that had one, or none to use its own.",
                **positions.fields(here()),
            )

    def lacks_inputs(self) -> NoReturn:
        """Raises: the inputs that it was recorded with are not there."""
        raise GraphError(
            "this graph was recorded on a wrapped module, whose inputs it does not bring along",
            hint="Give an input for each invoke that had one: graph.run(model, x).",
            **positions.fields(here()),
        )

    def check_fit(self, same: bool, same_sizes: bool) -> None:
        """Raises where inputs are others, or of other sizes, than those that lines of the graph have used."""
        facts = self.facts
        if facts.forced is not None and not same:
            raise GraphError(
                "this graph fits only the inputs it was recorded with: a line of it used their values",
                hint="Do with operations of torch what that line does with a number, and record again.",
                **positions.fields(facts.forced),
            )
        if facts.pinned is not None and not same_sizes:
            raise GraphError(
                "this graph fits only inputs of the sizes it was recorded with: a line of it used them",
                hint="Write that line without sizes of batch or sequence (h[:, -1], h.mean(1)), and record again.",
                **positions.fields(facts.pinned),
            )
