"""Where in the user's program a value was asked for.

Recording notes only the code object and the offset in it, which costs next to nothing; the line is
worked out when a graph is encoded or an error is shown.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from types import CodeType
from typing import TypeAlias

import torch

# A code object and the offset of the instruction in it; file, line and function, out of a stored
# recording; None where no frame of the user's was found.
Place: TypeAlias = tuple[CodeType, int] | tuple[str, int, str] | None

_OURS = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep, "<__array_function__")
files: dict[str, bool] = {}  # file name -> it is the user's


def is_users(filename: str) -> bool:
    """Whether a file is the user's; notes it in ``files``."""
    users = files[filename] = not filename.startswith(_OURS)
    return users


def here() -> Place:
    """The innermost line that belongs neither to this package nor to torch."""
    frame = sys._getframe(1)
    known = files
    while frame is not None:
        code = frame.f_code
        name = code.co_filename
        users = known.get(name)
        if users is None:
            users = is_users(name)
        if users:
            return code, frame.f_lasti
        frame = frame.f_back  # type: ignore[assignment]
    return None


def row(place: Place) -> tuple[str, int, str]:
    """File, line and function of a place, ``("", 0, "")`` where there is none."""
    if place is None:
        return "", 0, ""
    if len(place) == 3:
        return place
    code, offset = place
    number = code.co_firstlineno
    for start, end, at in code.co_lines():
        if start <= offset < end:
            number = at or number
            break
    return code.co_filename, number, code.co_name


def fields(place: Place) -> dict[str, object]:
    """The fields of an error that name a place."""
    return dict(zip(("file", "line", "func"), row(place), strict=True)) if place else {}


def other_fields(place: Place) -> dict[str, object]:
    """The fields of an error that name a second place."""
    return dict(zip(("other_file", "other_line"), row(place)[:2], strict=True)) if place else {}


def table(places: Iterable[Place]) -> tuple[list[tuple[str, int, str]], list[int]]:
    """Turns places into a table of lines, each there once, and the index of each place in it, or -1."""
    rows: list[tuple[str, int, str]] = []
    by_row: dict[tuple[str, int, str], int] = {}
    by_place: dict[tuple[int, int], int] = {}
    indices = []
    for place in places:
        if place is None:
            indices.append(-1)
            continue
        key = (id(place[0]), place[1])
        index = by_place.get(key)
        if index is None:
            found = row(place)
            index = by_row.get(found)
            if index is None:
                index = by_row[found] = len(rows)
                rows.append(found)
            by_place[key] = index
        indices.append(index)
    return rows, indices
