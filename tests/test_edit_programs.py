"""Random edits in random traces mean what their lines mean in hooks that come ahead of the trace's own."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

import nnsight_go
import programs
from nnsight_go import LanguageModel
from nnsight_go.edits import Edit
from programs import Invoke, Line, Maker
from references import Pair, hooked, relative

pytestmark = pytest.mark.usefixtures("nothing_stays")

# What an edit cannot do: draw, need values, name sizes of the input, write to what lies outside.
_NO_EDIT = re.compile(
    r"rand|float\((?!\))|int\(|\bif\b|\bfor\b|len\(|tolist|numel|einops|store|\.shape\)|\.shape\[1|shape\[0"
    r"|^c\d|manual_seed|out="
)


def fresh(pair: Pair) -> set[programs.Place]:
    """The places at which a tensor is met for the first time."""
    seen: set[int] = set()
    out = set()
    for place, found in pair.run([1, 2, 3]).items():
        storage = next(iter(found.values())).untyped_storage().data_ptr()
        if storage not in seen:
            out.add(place)
        seen.add(storage)
    return out


def placed(lines: list[Line], free: set[programs.Place]) -> Iterator[Line]:
    """Lines without changes in place of what has been met before under another name.

    An edit and its invoke share no tensors: what one of them has read keeps its numbers when the other changes it.
    """
    now = None
    for line in lines:
        now = line.place or now
        if line.rebinds or re.match(r"\w+ = ", line.text) or now in free:
            yield line


def editable(lines: Iterable[Line], prefix: str) -> list[Line]:
    """Those of a program's lines that an edit may have, with other names for variables."""
    out: list[Line] = []
    known: set[str] = set()
    for line in lines:
        used = set(re.findall(r"\bv\d+\b|\blogits\d+\b", line.text))
        target = line.text.split(" = ")[0]
        new = {target} if re.fullmatch(r"v\d+|logits\d+", target) else set()
        if line.rebinds and re.search(r"= \{\}\[:, -\d", line.text):
            continue  # changes sizes
        if _NO_EDIT.search(line.text) or not used - new <= known:
            known -= new
            continue
        known |= new
        out.append(Line(re.sub(r"\b(v\d+|logits\d+)\b", rf"{prefix}\1", line.text), line.place, line.rebinds))
    return out


class Both(programs._Interpreter):
    """Runs the lines of edits ahead of an invoke's own at each point."""

    def __init__(self, ahead: list[programs._Interpreter], *rest: Any) -> None:
        super().__init__(*rest)
        self.ahead = ahead

    def run(self, pair: Pair, rows: list[list[int]]) -> None:
        hooked(pair.hf, self.at_all, input_ids=torch.tensor(rows))
        for one in (*self.ahead, self):
            assert one.next == len(one.lines)

    def at_all(self, place: programs.Place, value: torch.Tensor) -> torch.Tensor | None:
        now = value
        for one in (*self.ahead, self):
            new = one.at(place, now)
            now = now if new is None else new
        return None if now is value else now


@functools.cache
def maker_of(pair: Pair) -> Maker:
    return Maker(pair)


def check(
    either: Pair, model: LanguageModel, seed: int, tmp_path: pathlib.Path, refusals: tuple[str, ...] = ()
) -> None:
    """Holds a random trace of a model with random edits against hooks; errors that say so are allowed."""
    maker = maker_of(either)
    program = maker.make(seed)
    free = fresh(either)
    program.invokes[:] = [Invoke(v.rows, list(placed(v.lines, free))) for v in program.invokes]
    ahead: list[list[Line]] = []
    for n in range(1 + seed % 2):
        for attempt in range(20):
            other = maker.make(1000 + 97 * seed + 20 * n + attempt)
            lines = editable(placed(other.invokes[0].lines, free), f"e{n}")
            if len(lines) >= 2:
                break
        ahead.append(lines)

    found = programs.surroundings(maker)

    def names() -> dict[str, Any]:
        return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in found.items()}

    want = names() | {"model": either.hf}
    torch.manual_seed(0)
    with torch.no_grad():
        for invoke in program.invokes:
            first = [programs._Interpreter(lines, maker.order, names() | {"model": either.hf}) for lines in ahead]
            try:
                Both(first, invoke.lines, maker.order, want).run(either, invoke.rows)
            except RuntimeError as error:
                if "refer to a single memory location" in str(error):
                    return  # a line that writes to a tensor from an overlapping part of it, which PyTorch refuses
                raise

    got = names() | {"model": model}
    text = []
    for n, lines in enumerate(ahead):
        body = programs.source(programs.Program([Invoke([[0]], lines)], [])).splitlines()[2:]
        text += [f"with model.edit() as e{n}:", *(line[4:] for line in body)]
    edited = model
    source = "\n".join(text) + "\n"
    try:
        exec(compile(source, "<edit>", "exec"), got | {"model": model}, scope := {})
        for n in range(len(ahead)):
            (edit,) = scope[f"e{n}"].edits
            if seed % 3 == 0:
                edit.save(tmp_path / "edit")
                edit = nnsight_go.load_edit(tmp_path / "edit")
            assert isinstance(edit, Edit)
            edited = edited.with_edits(edit)
        got["model"] = edited
        torch.manual_seed(0)
        with torch.no_grad():
            exec(compile(programs.source(program), "<program>", "exec"), got)
    except Exception as error:
        if any(why in str(error) for why in refusals):
            return
        pytest.fail(f"{type(error).__name__}: {error}\n\n{source}\n{programs.source(program)}", pytrace=False)
    for name in program.saved:
        mine, theirs = got[name], want[name]
        wrong = mine.shape != theirs.shape or (theirs.numel() and not relative(mine, theirs) <= 1e-3)
        if wrong:
            pytest.fail(f"{name} is off\n\n{source}\n{programs.source(program)}", pytrace=False)


@pytest.mark.parametrize("seed", range(60))
def test_random_edits(either: Pair, seed: int, tmp_path: pathlib.Path) -> None:
    check(either, either.model, seed, tmp_path)
