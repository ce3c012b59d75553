"""Checks all Markdown pages of the repository: ``python tools/build/docs.py [--links] [PAGE ...]``.

Relative links must lead to a file of the repository, and to a heading where they name one; every page
under docs/ must be reachable from README.md; the examples must run (see snippets.py) and give what the
page shows. Addresses on the network are not looked up.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
import urllib.parse
from collections.abc import Iterable

import pages
import snippets

ROOT = pathlib.Path(__file__).resolve().parents[2]


def links(page: pages.Page, root: pathlib.Path) -> list[str]:
    """What is wrong with a page's links."""
    wrong = []
    for line, target in page.links:
        place = urllib.parse.urlsplit(target)
        if place.scheme or place.netloc:
            continue
        name = urllib.parse.unquote(place.path)
        file = (page.path.parent / name).resolve() if name else page.path
        why = None
        if name.startswith("/") or not file.is_relative_to(root):
            why = "leads out of the repository"
        elif not file.exists():
            why = "does not exist"
        elif place.fragment and file.suffix == ".md" and place.fragment not in pages.read(file).anchors:
            why = "has no such heading"
        if why:
            wrong.append(f"{page.path.relative_to(root)}:{line}: {target} {why}")
    return wrong


def unreachable(all_pages: Iterable[pages.Page], root: pathlib.Path) -> list[str]:
    """Pages under docs/ to which no links lead from README.md."""
    by_path = {page.path: page for page in all_pages}
    queue, seen = [root / "README.md"], set()
    while queue:
        path = queue.pop()
        if path in seen or path not in by_path:
            continue
        seen.add(path)
        queue += [(path.parent / target.partition("#")[0]).resolve() for _, target in by_path[path].links]
    lost = sorted(p.relative_to(root) for p in by_path if p not in seen and p.is_relative_to(root / "docs"))
    return [f"{path}:1: no links lead here from README.md" for path in lost]


def examples(page: pages.Page, root: pathlib.Path) -> tuple[int, list[str]]:
    """Runs a page's examples: how many ran, and what failed."""
    try:
        return snippets.run(page, root), []
    except snippets.Failure as failure:
        text = str(failure).rstrip().replace("\n", "\n    ")
        return 0, [f"{page.path.relative_to(root)}:{failure.line}: {text}"]


def main() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"  # no example may download anything
    parser = argparse.ArgumentParser(description="Checks the links of all pages and runs their examples.")
    parser.add_argument("pages", nargs="*", type=pathlib.Path, help="only these pages")
    parser.add_argument("--links", action="store_true", help="run no examples")
    args = parser.parse_args()
    found = [pages.read(path) for path in pages.find(ROOT)]
    wrong = unreachable(found, ROOT)
    if args.pages:
        chosen = {path.resolve() for path in args.pages}
        found, wrong = [page for page in found if page.path in chosen], []
    for page in found:
        wrong += links(page, ROOT)
    print(f"docs: {sum(len(page.links) for page in found)} links on {len(found)} pages", flush=True)
    for page in [] if args.links else found:
        start = time.monotonic()
        ran, failed = examples(page, ROOT)
        wrong += failed
        if ran or failed:
            verdict = "FAILED" if failed else f"{ran} example{'s' * (ran > 1)}"
            print(f"docs: {page.path.relative_to(ROOT)}: {verdict} ({time.monotonic() - start:.1f} s)", flush=True)
    for message in wrong:
        print(message, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
