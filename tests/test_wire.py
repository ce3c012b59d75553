"""The wire form, between the two languages: what Python encodes Go decodes, and the other way round.

Python writes ``engine/graph/testdata/python.msgpack``, which Go's tests decode and print; Go writes
``go.msgpack`` and ``results.msgpack``, which the tests here decode. Run this file with ``--update``
after changing the form, then ``go test ./engine/graph -update``.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import msgspec
import pytest
import torch

from nnsight_go import wire

TESTDATA = pathlib.Path(__file__).parents[1] / "engine" / "graph" / "testdata"


def value(number: int) -> torch.Tensor:
    """A tensor that stands for value ``number``."""
    return torch.tensor(number)


def name(tensor: torch.Tensor) -> int:
    return int(tensor.item())


def arg(x: Any) -> Any:
    return wire.argument(x, name)


# Every argument that has a wire form, with that form.
ARGUMENTS: list[tuple[Any, Any]] = [
    (None, None),
    (True, True),
    (7, 7),
    (-(2**63), -(2**63)),
    (2**63 - 1, 2**63 - 1),
    (0.5, 0.5),
    ("none", "none"),
    (value(3), [0, 3]),
    ([1, [2.5]], [1, 1, [1, 2.5]]),
    (torch.Size([2, 3]), [1, 2, 3]),
    ((), [2]),
    ((1, None), [2, 1, None]),
    ({"a": value(0), "b": {}}, [3, "a", [0, 0], "b", [3]]),
    (slice(None, -1, 2), [4, None, -1, 2]),
    (slice(value(1), None), [4, [0, 1], None, None]),
    (..., [5]),
    (torch.float16, [6, "float16"]),
    (torch.device("cuda:1"), [7, "cuda:1"]),
    (torch.sparse_coo, [8, "sparse_coo"]),
    (torch.channels_last, [9, "channels_last"]),
    (1 - 2j, [10, 1.0, -2.0]),
]


@pytest.mark.parametrize(("x", "form"), ARGUMENTS, ids=lambda x: repr(x)[:30])
def test_argument(x: Any, form: Any) -> None:
    got = arg(x)
    assert got == form
    assert type(got) is type(form)


def test_what_has_no_form() -> None:
    for x in (object(), {1: 2}, (i for i in range(3)), [print]):
        with pytest.raises(wire.Unrecordable):
            arg(x)


def graph() -> bytes:
    """A graph with every kind of node and of argument."""
    K = wire.Kind
    read = (K.READ, 0, 0, 1, "transformer.h.5", wire.OUTPUT, 0, "0")
    nodes = [
        read,
        (K.SET_INDEX, 0, 1, 1, [0, 0], arg((slice(None), -1, ...)), 0.0),
        (K.INDEX, 0, 1, 1, [0, 0], arg(([0, 2], None))),
        (
            K.CALL,
            0,
            2,
            0,
            "aten::to",
            [[0, 2], *[arg(x) for x, _ in ARGUMENTS if not isinstance(x, dict | torch.Tensor)]],
            None,
        ),
        (K.CALL, 0, 2, 2, "aten::topk", [[0, 0], 70000], {"largest": True, "dim": -1}),
        (K.ITEM, 0, -1, 3, [0, 4], 1),
        (K.CONST, 1, -1, 1, 0),
        (K.READ, 1, -1, 1, "", wire.INPUT, 3, "kwargs.attention_mask"),
        (K.WRITE, 1, 0, 1, "transformer.h.5", wire.OUTPUT, 0, "0", [0, 6]),
        (K.READ, 1, 0, 1, "transformer.h.5", wire.OUTPUT, 0, "0"),
        (K.MODULE, 1, -1, 1, "lm_head", [[0, 6]], {"scale": None}),
        (K.SAVE, 2, -1, 1, arg({"logits": value(10), "all": [value(0), (value(2),)]})),
        (K.SAVE, 2, -1, 1, [11, "CausalLMOutput", "logits", [0, 10]]),
        (K.TRACK, 2, -1, 1, [0, 0], 2),
        (K.BACKWARD, 2, -1, 1, arg([value(10)]), None, False, True, True, True),
        (K.GRAD, 2, -1, 1, [0, 0], [0, 14]),
        (K.SET_GRAD, 2, -1, 1, [0, 0], [0, 14], [0, 15]),
        (K.END, 2, -1, 1, [0, 14]),
    ]
    invokes = [([[464, 412, 0]], None), ([[1, 2], [300, 70000, 3]], [[0, 1], [1, 1, 1]]), (None, None)]
    positions = [("/home/user/demo.py", 12, "<module>"), ("/home/user/demo.py", 13, "<module>"), ("кот.py", 70000, "f")]
    return wire.graph(invokes, nodes, positions)


def test_go_reads_what_python_writes() -> None:
    assert (TESTDATA / "python.msgpack").read_bytes() == graph(), "run this file with --update, then Go's tests"


def test_python_reads_what_go_writes() -> None:
    version, invokes, nodes, positions = msgspec.msgpack.decode((TESTDATA / "go.msgpack").read_bytes())
    assert version == wire.VERSION
    assert invokes == [[[[5, 6, 7]], None], [[[1, 2], [3, 4, 5]], [[0, 1], [1, 1, 1]]], [None, None]]
    assert {node[0] for node in nodes} == set(wire.Kind)
    assert nodes[0] == [wire.Kind.READ, 0, 0, 1, "h.0", wire.OUTPUT, 0, "0"]
    assert nodes[1] == [wire.Kind.SET_INDEX, 0, 1, 1, [0, 0], arg((slice(None), -1)), 0.0]
    assert nodes[3] == [wire.Kind.CALL, 0, 1, 0, "aten::topk", [[0, 2], 3], {"largest": True}]
    assert positions[0] == ["/home/user/demo.py", 12, "<module>"]


def test_results() -> None:
    tensors = [object(), object()]
    (first, list_of), (second, plain) = wire.results((TESTDATA / "results.msgpack").read_bytes(), tensors)
    assert (first, second) == (5, 300)
    assert list_of[0] is tensors[0]
    assert list_of[1]["y"] is tensors[1]
    assert plain == (-70000, 0.5, None, True, "é")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    (TESTDATA / "python.msgpack").write_bytes(graph())
