"""Runs the examples in a page, as a reader would: from top to bottom.

    ```python                      runs; all blocks of a page share one namespace
    ```python no-run               does not
    ```python raises=NotSavedError must raise that error
    <!-- python  ...  -->          runs, and readers do not see it: set-up
    ```text                        directly below a block that runs: what it prints, or the error it
                                   raises; ... stands for anything, and white space does not count
    ```go                          runs where it is a whole program (package main)

In messages a block calls itself example.py, and its lines count from its own first one.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import itertools
import linecache
import os
import pathlib
import subprocess
import tempfile
import traceback
from typing import Any

from pages import Block, Page

NAME = "example.py"
_LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Failure(Exception):
    """What is wrong with a block, and in which line of the page."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(what)
        self.line = line


def run(page: Page, root: pathlib.Path) -> int:
    """Runs a page's examples in an empty folder and gives their number. Raises ``Failure`` at the first that fails."""
    space: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block, below in itertools.zip_longest(page.blocks, page.blocks[1:]):
                if block.language == "python" and "no-run" not in block.words:
                    printed = _python(block, space)
                elif block.language == "go" and block.text.startswith("package main"):
                    printed = _go(block, root)
                else:
                    continue
                ran += 1
                if below is not None and below.after and below.language == "text":
                    _compare(below, printed)
        finally:
            os.chdir(home)
    return ran


def _python(block: Block, space: dict[str, Any]) -> str:
    """Runs a block and gives what it printed, or the error that it was to raise."""
    wanted = next((w.removeprefix("raises=") for w in block.words if w.startswith("raises=")), None)
    # the errors of the package show the user's line, which they find here
    linecache.cache[NAME] = (len(block.text), None, block.text.splitlines(keepends=True), NAME)
    out = io.StringIO()
    try:
        code = compile(block.text, NAME, "exec", dont_inherit=True)
        with contextlib.redirect_stdout(out):
            exec(code, space)
    except SyntaxError as error:
        raise Failure(block.line + (error.lineno or 1) - 1, f"{type(error).__name__}: {error.msg}") from None
    except Exception as error:
        if wanted in [cls.__name__ for cls in type(error).__mro__]:
            return f"{type(error).__name__}: {error}\n"
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f.lineno for f in frames if f.filename == NAME), None) or 1
        text = "".join(traceback.format_exception(error))
        raise Failure(block.line + line - 1, f"{out.getvalue()}{text}") from None
    if wanted is not None:
        raise Failure(block.line, f"no {wanted} was raised")
    return out.getvalue()


def _go(block: Block, root: pathlib.Path) -> str:
    """Builds and runs a program inside this module, and gives what it printed."""
    env = dict(os.environ)
    for line in subprocess.run(
        ["sh", "-c", 'eval "$("$0/tools/build/env.sh")" && env -0', root], check=True, capture_output=True, text=True
    ).stdout.split("\0"):
        name, _, value = line.partition("=")
        if name.startswith("CGO_"):
            env[name] = value
    (root / "build").mkdir(exist_ok=True)
    # an underscore: `go build ./...` passes over it
    with tempfile.TemporaryDirectory(dir=root / "build", prefix="_docs-") as folder:
        (pathlib.Path(folder) / "main.go").write_text(block.text)
        done = subprocess.run(["go", "run", "."], cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise Failure(block.line, f"go run failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def _compare(below: Block, printed: str) -> None:
    """Holds what a block printed to what the page shows below it."""
    if not doctest.OutputChecker().check_output(below.text, printed, _LOOSE):
        raise Failure(below.line, f"the example above gives\n\n{printed}\nand the page shows\n\n{below.text}")
