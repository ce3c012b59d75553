"""The wheel: what is in it, and that it works where there is nothing but Python and its dependencies."""

from __future__ import annotations

import email
import pathlib
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARIES = {"libcgotorch.so", "libnng_aten.so", "libnng_py.so", "libnnsight_go.so"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel() -> pathlib.Path:
    """What ``make wheel`` makes."""
    done = subprocess.run(["make", "wheel"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (ROOT / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def python(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A fresh environment with the wheel in it; what it depends on is taken from this one."""
    directory = tmp_path_factory.mktemp("venv")
    venv.create(directory, with_pip=False, symlinks=True)
    interpreter = directory / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", interpreter, "install"]
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", wheel]
    done = subprocess.run([*install, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (site,) = directory.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return interpreter


def run(python: pathlib.Path, *args: object, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs Python without a compiler, without this source tree, without a network."""
    environment = {"PATH": str(python.parent), "HOME": str(cwd), "MPLCONFIGDIR": str(cwd), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, *map(str, args)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_what_is_in_it(wheel: pathlib.Path) -> None:
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in wheel.name and "linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (info,) = [n for n in names if n.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(info))
    assert {n.split("/")[0] for n in names} == {"nnsight_go", info.split("/")[0]}
    in_package = {n.removeprefix("nnsight_go/") for n in names if n.startswith("nnsight_go/")}
    assert {f"_lib/{name}" for name in LIBRARIES} <= in_package
    assert {
        "py.typed",
        "__init__.py",
        "models/landmarks/model.safetensors",
        "models/landmarks/config.json",
    } <= in_package
    sources = {p.relative_to(ROOT / "python" / "nnsight_go").as_posix() for p in (ROOT / "python").rglob("*.py")}
    assert sources <= in_package
    assert any(n.endswith("licenses/LICENSE") for n in names)
    kinds = {pathlib.PurePosixPath(n).suffix for n in in_package}
    assert not kinds & {".go", ".cc", ".h", ".rs", ".pyc", ".c", ".o"}, kinds
    assert not any("__pycache__" in n or "test" in n for n in in_package)
    assert metadata["Name"] == "nnsight-go" and metadata["License-Expression"] == "MIT"
    required = metadata.get_all("Requires-Dist")
    assert required is not None
    assert any(r.startswith("torch==2.15.") for r in required)
    assert not [r for r in required if "transformers" in r and "extra" not in r]


def test_nothing_in_it_tells_of_this_machine(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            for path in (str(ROOT), sys.prefix, str(pathlib.Path.home() / ".cache"), str(pathlib.Path.home() / "go")):
                assert path.encode() not in data, (name, path)
            if name.endswith(".so"):
                assert data[:4] == b"\x7fELF"
                assert b"$ORIGIN" in data, f"{name} does not look for its libraries beside itself"


def test_it_runs_the_quickstart(python: pathlib.Path, tmp_path: pathlib.Path) -> None:
    script = tmp_path / "quickstart.py"
    script.write_text((ROOT / "examples" / "quickstart.py").read_text())
    done = run(python, script, "--out", tmp_path / "out", cwd=tmp_path)
    (image,) = (tmp_path / "out").glob("*.png")
    assert image.read_bytes().startswith(b"\x89PNG")
    assert image.name in done.stdout
    assert "' Paris'" in done.stdout and "' Rome'" in done.stdout
    assert "Warning" not in done.stderr


def test_where_it_comes_from(python: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = run(python, "-c", "import nnsight_go, sys; print(nnsight_go.__file__); print(sys.prefix)", cwd=tmp_path)
    file, prefix = done.stdout.split()
    assert file.startswith(prefix) and prefix != sys.prefix


def test_import_is_quick_and_light(python: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Beside torch, importing takes a moment, and brings in nothing that a trace does not need."""
    code = """\
import sys, time
import torch
loaded = set(sys.modules)
start = time.perf_counter()
import nnsight_go
print(time.perf_counter() - start)
for name in ("transformers", "tokenizers", "matplotlib", "huggingface_hub", "nnsight"):
    assert name not in set(sys.modules) - loaded, name
assert "libnnsight_go" not in open("/proc/self/maps").read(), "the engine loads when it is first needed"
"""
    took = min(float(run(python, "-c", code, cwd=tmp_path).stdout) for _ in range(3))
    assert took < 0.5, took
