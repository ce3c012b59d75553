"""Makes .venv, or brings it up to what pyproject.toml asks for: ``python tools/build/venv.py``.

Run with the Python the environment is to have. Installs the package's dependencies with the extras
hf and dev, and points the environment at the checkout's package. Does nothing if that was done
before for the same requirements; what is installed and fits is left alone, however it came there.
"""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".nnsight-go"


def say(text: str) -> None:
    print(f"venv: {text}", flush=True)


def requirements() -> list[str]:
    """What pyproject.toml asks for, the extras hf and dev included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [*project["dependencies"], *extras["hf"], *extras["dev"]]


def install(wanted: list[str]) -> int:
    """Installs with pip, whose configuration is respected. One line is shown for each package it fetches."""
    command = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *wanted]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            words = line.split()
            if words[:1] == ["Collecting"]:
                say(f"  {' '.join(words[1:])}")
            elif words[:1] == ["Installing"]:
                say("  unpacking all of them ...")
    return process.returncode


def main() -> int:
    start = time.monotonic()
    wanted = requirements()
    key = hashlib.sha256(repr((wanted, sys.version, 2)).encode()).hexdigest()  # 2: with a command
    if PYTHON.exists() and STAMP.is_file() and STAMP.read_text() == key:
        return 0
    works = PYTHON.exists() and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0
    if not works:
        say(f"making .venv with {sys.executable} ({sys.version.split()[0]}) ...")
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    say("installing what pyproject.toml asks for; torch is large: a minute or two, more where it must be fetched ...")
    if install(wanted) != 0:
        say("FAILED: pip could not install the requirements (its message stands above)")
        return 1
    # Relative, so that a checkout may be moved as long as .venv moves with it.
    for packages in (VENV / "lib").glob("python3.*/site-packages"):
        up = "/".join([".."] * len(packages.relative_to(ROOT).parts))
        (packages / "nnsight_go_checkout.pth").write_text(f"{up}/python\n")
    command = VENV / "bin" / "nnsight-go"  # what an installed package has by [project.scripts]
    command.write_text('#!/bin/sh\nexec "$(dirname "$0")/python" -m nnsight_go.command "$@"\n')
    command.chmod(0o755)
    STAMP.write_text(key)
    say(f"ready in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
