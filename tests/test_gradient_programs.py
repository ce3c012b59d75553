"""Gradients of random programs are those of the same lines inside of plain hooks on transformers' model.

``NNSIGHT_GO_PROGRAMS=2000`` runs more of them, ``NNSIGHT_GO_PROGRAMS_FROM=150`` starts at another seed.
"""

from __future__ import annotations

import dataclasses
import functools
import linecache
import os
import random
from typing import Any

import pytest
import torch

from programs import Line, Maker, Program, interpret, source, surroundings
from references import Pair, relative
from test_programs import shrink

COUNT = int(os.environ.get("NNSIGHT_GO_PROGRAMS", "100"))
FROM = int(os.environ.get("NNSIGHT_GO_PROGRAMS_FROM", "0"))


@functools.cache
def maker(pair: Pair) -> Maker:
    return Maker(pair, smooth=True)


def made(pair: Pair, seed: int) -> Program:
    """A program whose last invoke reads the logits."""
    program = maker(pair).make(seed)
    last = program.invokes[-1]
    lines = [*last.lines, Line("end = {}", ("lm_head", "output"))]
    return dataclasses.replace(
        program, invokes=[*program.invokes[:-1], dataclasses.replace(last, lines=lines)], saved=[]
    )


def wanted(program: Program, pair: Pair, seed: int) -> dict[str, torch.Tensor] | None:
    """Gradients of some variables by plain autograd; None where PyTorch refuses the program."""
    names = surroundings(maker(pair))
    torch.manual_seed(0)
    try:
        interpret(program, pair, maker(pair).order, names, grad=True)
        loss = names["end"].tanh().sum()
        variables = [n for n in names if n.startswith("v") and n[1:].isdigit()]
        chosen = random.Random(seed).sample(variables, min(3, len(variables)))
        chosen = [n for n in chosen if isinstance(names[n], torch.Tensor) and names[n].requires_grad]
        if not chosen or not loss.requires_grad:
            return {}
        found = torch.autograd.grad(loss, [names[n] for n in chosen], allow_unused=True)
    except RuntimeError as e:
        if any(
            text in str(e)
            for text in ("modified by an inplace", "single memory location", "a view", "a leaf", "inplace")
        ):
            return None
        raise
    return {n: g for n, g in zip(chosen, found, strict=True) if g is not None}


def outcome(program: Program, pair: Pair, seed: int = 0) -> tuple[str, str] | None:
    """What is wrong with the trace of a program: a kind of failure and its text, or None."""
    want = wanted(program, pair, seed)
    if not want:
        return None
    text = source(program) + "        with end.tanh().sum().backward():\n"
    for name in want:
        text += f"            g{name} = {name}.grad.save()\n"
    got: dict[str, Any] = surroundings(maker(pair)) | {"model": pair.model}
    linecache.cache["<program>"] = (len(text), None, text.splitlines(keepends=True), "<program>")
    torch.manual_seed(0)
    try:
        exec(compile(text, "<program>", "exec"), got)
    except Exception as e:
        if "modified by an inplace" in str(e):
            return None  # as PyTorch, though for another value
        return type(e).__name__, f"{e}\n\n{text}"
    for name, theirs in want.items():
        mine = got[f"g{name}"]
        if mine.shape != theirs.shape:
            return "kind", f"the gradient of {name} is {mine.shape}, not {theirs.shape}\n\n{text}"
        if theirs.numel() and float(theirs.abs().max()) > 1e-12 and not relative(mine, theirs) <= 1e-3:
            return "values", f"the gradient of {name} is off by {relative(mine, theirs):.1e}\n\n{text}"
    return None


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize("seed", range(FROM, FROM + COUNT))
def test_gradients_of_program(either: Pair, seed: int) -> None:
    program = made(either, seed)
    failure = outcome(program, either, seed)
    if failure is not None:
        _, failure = shrink(program, either, failure, lambda p, pair: outcome(p, pair, seed))
        pytest.fail(failure[1], pytrace=False)
