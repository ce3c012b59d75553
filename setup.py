"""The one thing pyproject.toml cannot say: the wheel holds libraries, and they are built first."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).resolve().parent
SCRATCH = "build/setuptools"  # build/ itself is the project's


class BuildLibraries(build_py):
    """Builds the engine's libraries for the torch of this Python, then copies the package."""

    def run(self) -> None:
        # pip runs this in a clean environment of its own: the same doctor and the same build as `make build`.
        environment = {**os.environ, "PYTHON": sys.executable}
        doctor = subprocess.run([ROOT / "tools" / "build" / "doctor.sh", "-q"], env=environment, check=False)
        if doctor.returncode:
            raise SystemExit("nnsight-go cannot be built here: see above for what is missing")
        subprocess.run([sys.executable, ROOT / "tools" / "build" / "native.py"], check=True)
        shutil.rmtree(self.build_lib, ignore_errors=True)  # nothing of an earlier wheel stays
        super().run()


class NativeDistribution(Distribution):
    """Makes the wheel's name tell Python version and platform."""

    def has_ext_modules(self) -> bool:
        return True


(ROOT / SCRATCH).mkdir(parents=True, exist_ok=True)
setup(
    cmdclass={"build_py": BuildLibraries},
    distclass=NativeDistribution,
    options={"build": {"build_base": SCRATCH}, "egg_info": {"egg_base": SCRATCH}},
)
