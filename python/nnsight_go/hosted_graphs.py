"""Stored graphs on wrapped modules: recorded there or elsewhere, they run with the forward passes of a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import hosting, positions
from .errors import GraphError
from .hosted import Given, Hosted
from .hosted_language import HostedLanguageModel
from .positions import here
from .recorder import Invoke
from .wire import Kind
from .wrapping import HostedRecorder

if TYPE_CHECKING:
    from .graphs import Graph
    from .wrapping import NNsight


class Replayer(HostedRecorder):
    """A recording that was made before, as if its block had just ended.

    Args:
        hosted: the module.
        graph: the recording, and what it leaves out.
        given: an input for each invoke that has one.
    """

    foreign = ("this graph", "Run it on a model that has this module, with an input of the kind it was recorded for.")

    def __init__(self, hosted: Hosted, graph: Graph, given: Sequence[Given]) -> None:
        super().__init__(hosted)
        recording = graph.recording
        self.nodes = list(recording.nodes)
        for tensor in recording.constants_on(hosted.device):
            self.brought(tensor)
        self.given = list(given)
        for number, (rows, masks, *edit) in enumerate(recording.invokes):
            if rows is not None:
                self._passes[number] = len(self._passes)
            self.invokes.append(Invoke(rows, masks, bool(edit and edit[0])))
        self.sourced = self.names_operations(self.nodes)
        for number, left in enumerate(graph.facts.left):
            invoke = next(i for i, of in self._passes.items() if of == number)
            self.left[number] = left
            self.skipped |= {(invoke, name): None for name in left}

    def values(self, kept: Sequence[int]) -> list[torch.Tensor]:
        """Runs it, and gives what save nodes keep.

        Raises:
            ModulePathError: a pass does not come to what the recording names.
            OpError: an operation failed; it names the line that was recorded.
        """
        for node in self.nodes:
            if node[0] in (Kind.READ, Kind.WRITE):
                self.found(node)
        ids = [self.nodes[save][4][1] for save in kept]
        return self._go_on(ids, end=True, adopt=None)[-len(ids) :]


def run(graph: Graph, model: NNsight, prompts: Sequence[Any]) -> list[torch.Tensor]:
    """The values that a graph keeps, of inputs that are given or those it was recorded with.

    Raises:
        GraphError: it fits no such inputs, or has none.
    """
    facts, invokes = graph.facts, graph.recording.invokes
    own = [(rows, masks) for rows, masks, *_ in invokes if rows is not None]
    recorded = graph.inputs if facts.sizes is not None else _of_tokens(model, own)
    if any(rows is None and not any(edit) for rows, _, *edit in invokes):
        raise GraphError(
            "an invoke without an input sees the whole batch, and stored graphs of wrapped models have none",
            hint="Write the trace again, or record it on a model that the engine computes.",
            **positions.fields(here()),
        )
    if prompts:
        graph.check_count(len(own), len(prompts))
        given = [model.input_of(prompt) for prompt in prompts]
        sizes = facts.sizes or list(map(hosting.all_sizes, recorded or ()))
        graph.check_fit(same=False, same_sizes=list(map(hosting.all_sizes, given)) == sizes)
    elif recorded is None:
        graph.lacks_inputs()
    else:
        given = list(recorded)
    return Replayer(model._hosted, graph, given).values(facts.kept)


def _of_tokens(model: NNsight, own: Sequence[tuple[Any, Any]]) -> list[Given] | None:
    """What a language model is called with for rows of tokens and their masks. Other modules take none."""
    if not isinstance(model, HostedLanguageModel):
        return None
    return [
        model.input_of(rows if masks is None else {"input_ids": rows, "attention_mask": masks}) for rows, masks in own
    ]
