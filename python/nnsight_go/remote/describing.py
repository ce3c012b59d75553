"""What is known of a model that is computed elsewhere, and has no weights here."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from .. import hub
from ..errors import ModelLoadError, NnsightError


class Described:
    """A directory that holds a model's config, and its tokenizer where that was to be had.

    Args:
        name: of the model, or its directory.
        remote: the server that has it.
        revision: this and what follows as ``hub.resolve`` takes it.
        token: likewise.
        cache_dir: likewise.
        local_files_only: likewise.

    Raises:
        ModelLoadError: neither its files are to be had, nor does the server know it.
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        remote: bool | str | None,
        revision: str | None,
        token: str | bool | None,
        cache_dir: str | os.PathLike[str] | None,
        local_files_only: bool,
    ) -> None:
        self._own: tempfile.TemporaryDirectory[str] | None = None
        try:
            self.path = hub.resolve(name, revision, token, cache_dir, local_files_only, weights=False)
        except ModelLoadError as error:
            self.path = self._asked(os.fspath(name), remote, error)

    def _asked(self, name: str, remote: bool | str | None, error: ModelLoadError) -> Path:
        from .server import Server

        try:
            about = Server(remote if isinstance(remote, str) else None).describe(name)
            config = dict(about["config"])
        except NnsightError as refused:
            error.cause = f"the server does not describe it either: {refused.message}"
            raise error from None
        except (LookupError, TypeError, ValueError):
            raise error from None
        config["dtype"] = about.get("dtype", config.get("dtype"))
        self._own = tempfile.TemporaryDirectory(prefix="nnsight-go-")
        path = Path(self._own.name)
        (path / "config.json").write_text(json.dumps(config))
        return path


def dtype(directory: Path) -> str:
    """The dtype that a model's config names."""
    try:
        config = json.loads((directory / "config.json").read_text())
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")
    except (OSError, ValueError, AttributeError):
        return "float32"  # opening it tells what is wrong
