"""nnsight, for the benchmark only: what this Python has, or a copy in the user's cache.

Nothing else of the project needs it, so it is no requirement of the project's environment. The copy
is made with pip, without what it depends on: torch and transformers are those that are measured.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pathlib
import subprocess
import sys
import tempfile
from types import ModuleType

from tools.build.native import cache_root

VERSION = "0.8.1"
# greenlet is what nnsight imports to run a trace and the environment lacks.
REQUIREMENTS = [f"nnsight=={VERSION}", "greenlet==3.5.6"]


class NotInstalled(Exception):
    """There is no nnsight to compare with; the message says why."""


def nnsight() -> ModuleType:
    """The module, installed first if need be. Raises NotInstalled."""
    if found() is None:
        # Both have compiled parts, which are for one version of Python.
        directory = cache_root() / "bench" / f"nnsight-{VERSION}-{sys.implementation.cache_tag}"
        try:
            if not directory.is_dir():
                install(directory)
        except OSError as e:
            raise NotInstalled(str(e)) from e
        sys.path.append(str(directory))
        importlib.invalidate_caches()
    if found() != VERSION:
        raise NotInstalled(f"this Python has nnsight {found()}, not {VERSION}")
    try:
        return importlib.import_module("nnsight")
    except ImportError as e:
        raise NotInstalled(f"it cannot be imported: {e}") from e


def found() -> str | None:
    """The version that an import would take."""
    try:
        return importlib.metadata.version("nnsight")
    except importlib.metadata.PackageNotFoundError:
        return None


def install(directory: pathlib.Path) -> None:
    """Fills the directory as a whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        target = pathlib.Path(scratch) / directory.name
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        options = ["--retries", "1", "--target", str(target)]
        done = subprocess.run([*command, *options, *REQUIREMENTS], capture_output=True, text=True)
        if done.returncode != 0 or not target.is_dir():
            raise NotInstalled((done.stderr.strip().splitlines() or ["pip gave no reason"])[-1])
        target.rename(directory)
