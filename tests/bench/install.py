"""The libraries that are compared with: what this Python has, or copies in the user's cache.

Nothing else of the project needs them, so they are no requirements of the project's environment. A copy
is made with pip, without what it depends on: torch and transformers are those that are measured. What is
left of its dependencies is listed here.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import pathlib
import subprocess
import sys
import tempfile
from types import ModuleType

from tools.build.native import cache_root


class NotInstalled(Exception):
    """There is no such library to compare with; the message says why."""


@dataclasses.dataclass
class Library:
    """One library at one version."""

    name: str
    version: str
    module: str
    needs: tuple[str, ...]
    missing: str = ""  # why it could not be had, once that is known

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    def load(self) -> ModuleType:
        """The module, installed first if need be. Raises NotInstalled."""
        if self.missing:
            raise NotInstalled(self.missing)
        try:
            return self._load()
        except NotInstalled as e:
            self.missing = str(e)
            raise

    def available(self) -> ModuleType | None:
        """The module, or None where it cannot be had."""
        try:
            return self.load()
        except NotInstalled:
            return None

    def found(self) -> str | None:
        """The version that an import would take."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def directory(self) -> pathlib.Path:
        """Where the copy is. Compiled parts are for one version of Python."""
        return cache_root() / "bench" / f"{self.name}-{self.version}-{sys.implementation.cache_tag}"

    def _load(self) -> ModuleType:
        if self.found() is None:
            try:
                if not self.directory().is_dir():
                    self._install()
            except OSError as e:
                raise NotInstalled(str(e)) from e
            sys.path.append(str(self.directory()))
            importlib.invalidate_caches()
        if self.found() != self.version:
            raise NotInstalled(f"this Python has {self.name} {self.found()}, not {self.version}")
        try:
            return importlib.import_module(self.module)
        except ImportError as e:
            raise NotInstalled(f"it cannot be imported: {e}") from e

    def _install(self) -> None:
        """Fills the directory as a whole or not at all."""
        directory = self.directory()
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            target = pathlib.Path(scratch) / directory.name
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            options = ["--only-binary", ":all:", "--retries", "1", "--target", str(target)]
            packages = [f"{self.name}=={self.version}", *self.needs]
            done = subprocess.run([*command, *options, *packages], capture_output=True, text=True)
            if done.returncode != 0 or not target.is_dir():
                raise NotInstalled((done.stderr.strip().splitlines() or ["pip gave no reason"])[-1])
            target.rename(directory)


# greenlet is what nnsight imports to run a trace and the environment lacks.
NNSIGHT = Library("nnsight", "0.8.1", "nnsight", ("greenlet==3.5.6",))
# What TransformerLens imports, data frames and data sets included: about 300 MB.
LENS = Library(
    "transformer-lens",
    "4.3.0",
    "transformer_lens.model_bridge",
    (
        "accelerate==1.15.0",
        "beartype==0.23.1",
        "datasets==5.2.0",
        "dill==0.4.1",
        "fancy-einsum==0.0.3",
        "jaxtyping==0.3.11",
        "multiprocess==0.70.19",
        "pandas==3.1.1",
        "pyarrow==26.0.1",
        "python-dateutil==4.0.0",
        "six==1.17.0",
        "typeguard==4.6.1",
        "wadler-lindig==0.1.8",
        "xxhash==4.1.0",
    ),
)


def forbid() -> None:
    """Installs nothing from here on: what is not there counts as missing."""
    for library in (NNSIGHT, LENS):
        if library.found() is None and not library.directory().is_dir():
            library.missing = "nothing is to be installed"
