"""Recordings as values: kept, written to files, printed, and put into other recordings.

A file is safetensors: the constants are its tensors ("0", "1", ...), and the graph stands in its
metadata, in wire form (``docs/wire.md``). Nothing in it is code.
"""

from __future__ import annotations

import base64
import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import msgspec
import torch

from . import _ffi, positions, wire
from .errors import GraphError
from .positions import here
from .wire import Kind, Node


@dataclasses.dataclass(frozen=True)
class Recording:
    """Nodes with the tensors they use from outside.

    Attributes:
        invokes: in wire form, ``(rows, masks)`` each.
        nodes: as the recorder keeps them: third comes the place of the line.
        constants: what const nodes number.
        versions: how often each of them had been changed in place, -1 for copies; empty where all are.
        apart: the constants that are not to be where the model is.
    """

    invokes: list[tuple[Any, ...]]
    nodes: list[Node]
    constants: list[torch.Tensor]
    versions: tuple[int, ...] = ()
    apart: frozenset[int] = frozenset()
    _there: dict[torch.device, list[torch.Tensor]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def constants_on(self, device: torch.device) -> list[torch.Tensor]:
        """The constants for a model on a device: those that lay with the model they were recorded on are there."""
        if all(i in self.apart or t.device == device for i, t in enumerate(self.constants)):
            return self.constants
        if device not in self._there:
            self._there[device] = [t if i in self.apart else t.to(device) for i, t in enumerate(self.constants)]
        return self._there[device]

    def check(self) -> None:
        """Raises where a constant is not what it was when the recording was made."""
        for tensor, version in zip(self.constants, self.versions, strict=False):
            if version >= 0 and tensor._version != version:
                raise GraphError(
                    f"a tensor of sizes {list(tensor.shape)} that this graph uses was changed in place after that",
                    hint="Tensors of more than 64 KiB are used as they are: record with a copy (.clone()).",
                    **positions.fields(here()),
                )

    def wire(self) -> bytes:
        """The graph in wire form."""
        rows, indices = positions.table(node[2] for node in self.nodes)
        nodes = [(*node[:2], index, *node[3:]) for node, index in zip(self.nodes, indices, strict=True)]
        return wire.graph(self.invokes, nodes, rows)

    def text(self, mermaid: bool = False) -> str:
        """The graph for reading: a line a node with the user's line beside it, or a Mermaid flow chart."""
        data = self.wire()
        return _ffi.call(_ffi.lib().nng_graph_text, data, len(data), mermaid).decode()

    def save(self, path: str | os.PathLike[str], kind: str, facts: Facts) -> None:
        """Writes a file that ``load`` reads."""
        from safetensors.torch import save_file

        tensors = {str(i): t.detach().cpu().contiguous().clone() for i, t in enumerate(self.constants)}
        graph = base64.b64encode(self.wire()).decode()
        facts.apart = sorted(self.apart)
        save_file(
            tensors, os.fspath(path), {"nnsight_go": kind, "graph": graph, "facts": msgspec.json.encode(facts).decode()}
        )


Plain = dict[str, bool | int | float | str | None]


def apart(constants: Iterable[torch.Tensor], device: torch.device) -> frozenset[int]:
    """Those constants that are not where the model is."""
    return frozenset(i for i, t in enumerate(constants) if t.device != device)


class Facts(msgspec.Struct, omit_defaults=True):
    """What a file says beside its graph.

    Attributes:
        kept: the save nodes whose values are wanted.
        pinned: a line that used sizes of the input it was recorded with: file, line, function.
        forced: a line that used values of it.
        resizes: whether it may put values of other sizes in the place of the model's.
        skips: by name: calls of a wrapped model's modules that do not run, and what is no tensor of what they give.
        left: the same of each forward pass, of a graph.
        sizes: of the tensors of each input, where the inputs are a wrapped model's; they are not in the file.
        apart: the constants that are not to be where the model is.
    """

    kept: list[int] = []
    pinned: tuple[str, int, str] | None = None
    forced: tuple[str, int, str] | None = None
    resizes: bool = False
    skips: dict[str, Plain] = {}
    left: list[dict[str, Plain]] = []
    sizes: list[list[list[int]]] | None = None
    apart: list[int] = []


def load(path: str | os.PathLike[str], kind: str) -> tuple[Recording, Facts]:
    """Reads a file that ``Recording.save`` wrote.

    Raises:
        GraphError: it is none, or of another kind.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    try:
        with safe_open(name, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as e:
        raise GraphError(
            f"{name} cannot be read: {e}",
            hint=f"Give a file that was written with the save() of this kind: {kind}.",
            **positions.fields(here()),
        ) from None
    if metadata.get("nnsight_go") != kind:
        raise GraphError(
            f"{name} holds no {kind}",
            hint=f"Give a file that was written with the save() of this kind: {kind}.",
            **positions.fields(here()),
        )
    try:
        data = base64.b64decode(metadata["graph"], validate=True)
        _ffi.call(_ffi.lib().nng_graph_text, data, len(data), False)  # whatever it is, it is well formed
        _, invokes, nodes, lines = msgspec.msgpack.decode(data)
        constants = [tensors[str(i)] for i in range(len(tensors))]
        facts = msgspec.json.decode(metadata["facts"], type=Facts)
        placed = [(*n[:2], tuple(lines[n[2]]) if n[2] >= 0 else None, *n[3:]) for n in nodes]
        if any(nodes[i][0] != Kind.SAVE for i in facts.kept):
            raise ValueError("it keeps what is not saved")
    except (LookupError, ValueError, msgspec.MsgspecError) as e:
        raise GraphError(f"{name} cannot be read: {e}", **positions.fields(here())) from None
    return Recording([tuple(v) for v in invokes], placed, constants, apart=frozenset(facts.apart)), facts
