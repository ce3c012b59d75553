"""Random programs mean what the same lines mean inside of plain hooks on transformers' model.

``NNSIGHT_GO_PROGRAMS=2000`` runs more of them, ``NNSIGHT_GO_PROGRAMS_FROM=150`` starts at another seed.
"""

from __future__ import annotations

import dataclasses
import functools
import linecache
import os
from collections.abc import Callable, Iterator

import pytest
import torch

from programs import Invoke, Maker, Program, interpret, source, surroundings
from references import Pair, relative

COUNT = int(os.environ.get("NNSIGHT_GO_PROGRAMS", "150"))
FROM = int(os.environ.get("NNSIGHT_GO_PROGRAMS_FROM", "0"))


@functools.cache
def maker(pair: Pair) -> Maker:
    return Maker(pair)


def outcome(program: Program, pair: Pair) -> tuple[str, str] | None:
    """What is wrong with the trace of a program: a kind of failure and its text, or None."""
    want = surroundings(maker(pair))
    torch.manual_seed(0)
    try:
        interpret(program, pair, maker(pair).order, want)
    except RuntimeError as e:
        if "refer to a single memory location" in str(e):
            return None  # a line that writes to a tensor from an overlapping part of it, which PyTorch refuses
        raise
    got = surroundings(maker(pair)) | {"model": pair.model}
    text = source(program)
    linecache.cache["<program>"] = (len(text), None, text.splitlines(keepends=True), "<program>")
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            exec(compile(text, "<program>", "exec"), got)
    except Exception as e:
        return type(e).__name__, str(e)
    for name in program.saved:
        mine, theirs = got[name], want[name]
        if type(mine) is not torch.Tensor or mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return "kind", f"{name} is {type(mine)} {mine.shape} {mine.dtype}, not {theirs.shape} {theirs.dtype}"
        if theirs.numel() and not relative(mine, theirs) <= 1e-3:
            return "values", f"{name} is off by {relative(mine, theirs):.1e}"
    return None


def smaller(program: Program) -> Iterator[Program]:
    """The program without one of its invokes or lines."""
    for i, invoke in enumerate(program.invokes):
        yield dataclasses.replace(program, invokes=program.invokes[:i] + program.invokes[i + 1 :])
        for j in reversed(range(len(invoke.lines))):
            less = Invoke(invoke.rows, invoke.lines[:j] + invoke.lines[j + 1 :])
            yield dataclasses.replace(program, invokes=[*program.invokes[:i], less, *program.invokes[i + 1 :]])
        if len(invoke.rows) > 1:
            less = Invoke(invoke.rows[:1], invoke.lines)
            yield dataclasses.replace(program, invokes=[*program.invokes[:i], less, *program.invokes[i + 1 :]])
    for i in range(len(program.saved)):
        yield dataclasses.replace(program, saved=program.saved[:i] + program.saved[i + 1 :])


Outcome = Callable[[Program, Pair], "tuple[str, str] | None"]


def shrink(
    program: Program, pair: Pair, failure: tuple[str, str], outcome: Outcome = outcome
) -> tuple[Program, tuple[str, str]]:
    """A smaller program that fails in the same way."""
    for less in smaller(program):
        bound = {line.text.split(" = ")[0] for invoke in less.invokes for line in invoke.lines}
        less = dataclasses.replace(less, saved=[name for name in less.saved if name in bound])
        try:
            found = outcome(less, pair)
        except Exception:
            continue  # it makes no sense without that line
        if found is not None and found[0] == failure[0]:
            return shrink(less, pair, found, outcome)
    return program, failure


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("seed", range(FROM, FROM + COUNT))
def test_program(either: Pair, seed: int) -> None:
    program = maker(either).make(seed)
    failure = outcome(program, either)
    if failure is not None:
        program, failure = shrink(program, either, failure)
        pytest.fail(f"{failure[1]}\n\n{source(program)}", pytrace=False)
