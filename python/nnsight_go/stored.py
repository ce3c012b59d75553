"""Recordings as values: kept, written to files, printed, and put into other recordings.

A file is safetensors: the constants are its tensors ("0", "1", ...), and the graph stands in its
metadata, in wire form (``docs/wire.md``). Nothing in it is code.
"""

from __future__ import annotations

import base64
import dataclasses
import os
from typing import Any

import msgspec
import torch

from . import _ffi, positions, wire
from .errors import GraphError
from .positions import here
from .wire import Node


@dataclasses.dataclass(frozen=True)
class Recording:
    """Nodes with the tensors they use from outside.

    Attributes:
        invokes: in wire form, ``(rows, masks)`` each.
        nodes: as the recorder keeps them: third comes the place of the line.
        constants: what const nodes number.
    """

    invokes: list[tuple[Any, ...]]
    nodes: list[Node]
    constants: list[torch.Tensor]

    def wire(self) -> bytes:
        """The graph in wire form."""
        rows, indices = positions.table(node[2] for node in self.nodes)
        nodes = [(*node[:2], index, *node[3:]) for node, index in zip(self.nodes, indices, strict=True)]
        return wire.graph(self.invokes, nodes, rows)

    def text(self, mermaid: bool = False) -> str:
        """The graph for reading: a line a node with the user's line beside it, or a Mermaid flow chart."""
        data = self.wire()
        return _ffi.call(_ffi.lib().nng_graph_text, data, len(data), mermaid).decode()

    def save(self, path: str | os.PathLike[str], kind: str) -> None:
        """Writes a file that ``load`` reads."""
        from safetensors.torch import save_file

        tensors = {str(i): t.detach().cpu().contiguous().clone() for i, t in enumerate(self.constants)}
        save_file(tensors, os.fspath(path), {"nnsight_go": kind, "graph": base64.b64encode(self.wire()).decode()})


def load(path: str | os.PathLike[str], kind: str) -> Recording:
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
    except (KeyError, ValueError) as e:
        raise GraphError(f"{name} cannot be read: {e}", **positions.fields(here())) from None
    placed = [(*n[:2], tuple(lines[n[2]]) if n[2] >= 0 else None, *n[3:]) for n in nodes]
    return Recording([tuple(v) for v in invokes], placed, constants)
