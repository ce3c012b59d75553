"""The lists of operators that a server runs and refuses (engine/guard)."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

import torch

_GUARD = pathlib.Path(__file__).parent.parent / "engine" / "guard"

# Arguments that a server gives to no operator.
_WITHHELD = ("generator", "pin_memory", "out")


def _lines(name: str) -> list[list[str]]:
    return [line.split() for line in (_GUARD / name).read_text().splitlines()]


def allowed() -> dict[str, list[str]]:
    """The operators that a server runs, with the names of their arguments."""
    return {name: arguments for name, *arguments in _lines("operators.txt")}


def refused() -> set[str]:
    """The operators that somebody decided against."""
    return {name for name, *_ in _lines("refused.txt")}


def arguments(name: str) -> list[str]:
    """The names of an operator's arguments, of its overloads that give their results."""
    found: dict[str, None] = {}
    for schema in schemas(name):
        if not any("Dimname" in str(a.type) for a in schema.arguments):
            found |= dict.fromkeys(a.name for a in schema.arguments if a.name not in _WITHHELD)
    return list(found)


def schemas(name: str) -> list[Any]:
    """The overloads of an operator that give their results, rather than write them somewhere."""
    return [
        s
        for s in torch._C._jit_get_schemas_for_operator(name)
        if torch._C._dispatch_has_kernel(f"{s.name}.{s.overload_name}" if s.overload_name else s.name)
        and not any(a.is_out for a in s.arguments)
    ]


def undecided(names: Iterable[str]) -> str:
    """What to do about operators that are in neither list."""
    lines = "\n".join(" ".join((name, *arguments(name))) for name in names)
    return (
        "the recorder writes operators of which nobody has decided whether a server runs them: what writes to files, "
        "draws, looks past its arguments' sizes, or ends the process if it is given nonsense goes into "
        f"engine/guard/refused.txt with its reason, the rest into engine/guard/operators.txt:\n{lines}"
    )
