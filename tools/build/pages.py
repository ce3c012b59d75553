"""Markdown as the checks of tools/build/docs.py need it: fenced blocks, headings and links of a page.

Only what this repository's pages use is understood; a page that needs more makes this file grow.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})\s*(?P<info>[^`]*)$")
_HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")
_TARGETS = (
    re.compile(r"\]\(\s*<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\s*\)"),  # [text](target), ![alt](target)
    re.compile(r"^\s{0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s|$)"),  # [name]: target
    re.compile(r"(?:src|href)=\"([^\"]+)\""),
)
_HIDDEN = re.compile(r"^<!--\s*python\s*$")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block. ``line`` is the number of its first line of text; ``after`` says that nothing but
    empty lines stands between it and the block before."""

    info: str
    text: str
    line: int
    after: bool

    @property
    def language(self) -> str:
        return self.info.split()[0] if self.info else ""

    @property
    def words(self) -> list[str]:
        """What stands behind the language."""
        return self.info.split()[1:]


@dataclasses.dataclass(frozen=True)
class Page:
    """A page, read."""

    path: pathlib.Path
    blocks: list[Block]
    links: list[tuple[int, str]]  # line and target
    anchors: set[str]


def find(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """All pages under a folder, but for what is hidden, built or installed."""
    for folder, folders, files in os.walk(root):
        here = pathlib.Path(folder)
        built = ("build", "dist") if here == root else ()
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in built)
        yield from (here / f for f in sorted(files) if f.endswith(".md"))


def read(path: pathlib.Path) -> Page:
    """Reads a page. A fence that is never closed reaches to the end, as in Markdown."""
    page = Page(path, [], [], set())
    lines = path.read_text().splitlines()
    at, prose = 0, True
    while at < len(lines):
        line = lines[at]
        fence = _FENCE.match(line)
        if fence or _HIDDEN.match(line):
            end = _close(lines, at + 1, fence)
            indent = len(fence["indent"]) if fence else 0
            text = "".join(f"{x[min(indent, len(x) - len(x.lstrip())) :]}\n" for x in lines[at + 1 : end])
            page.blocks.append(Block(fence["info"].strip() if fence else "python", text, at + 2, not prose))
            at, prose = end + 1, False
            continue
        prose = prose or bool(line.strip())
        heading = _HEADING.match(line)
        if heading:
            page.anchors.add(_unique(_slug(heading[1]), page.anchors))
        plain = re.sub(r"`[^`]*`", "", line)
        page.links.extend((at + 1, target) for pattern in _TARGETS for target in pattern.findall(plain))
        at += 1
    return page


def _close(lines: list[str], at: int, fence: re.Match[str] | None) -> int:
    while at < len(lines):
        text = lines[at].strip()
        if text == "-->" if fence is None else text.startswith(fence["fence"]) and not text.strip(fence["fence"][0]):
            return at
        at += 1
    return at


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


def _unique(slug: str, taken: set[str]) -> str:
    n = 0
    while (name := f"{slug}-{n}" if n else slug) in taken:
        n += 1
    return name
