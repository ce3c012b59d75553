"""``nnsight-go``, the command that serves models: the program beside the libraries, which has no Python in it.

This module only starts it, in the place of this process, with torch's libraries where it finds them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

_LIB = Path(__file__).parent / "_lib"


def program() -> Path:
    """The program itself."""
    return Path(os.environ.get("NNSIGHT_GO_LIB") or _LIB) / "nnsight-go"


def environment() -> dict[str, str]:
    """What it needs in its environment: the folders of the engine's libraries and of torch's."""
    torch = importlib.util.find_spec("torch")  # not imported: that takes seconds
    places = [str(program().parent)]
    if torch is not None and torch.origin:
        places.append(str(Path(torch.origin).parent / "lib"))
    if os.environ.get("LD_LIBRARY_PATH"):
        places.append(os.environ["LD_LIBRARY_PATH"])
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(places)}


def main() -> NoReturn:
    """Starts it with the arguments of this process."""
    if not program().exists():
        sys.exit(
            f"nnsight-go: {program()} is not there. In a source tree run `make build`; else reinstall the package."
        )
    os.execve(program(), [str(program()), *sys.argv[1:]], environment())


if __name__ == "__main__":
    main()
