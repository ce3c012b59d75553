"""Models on another device than the CPU: one that is none, or a GPU (``NNSIGHT_GO_TEST_DEVICE=cuda``).

Torch has one accelerator a process, so the tests are in processes of their own: those of ``simdevice``, and those
of the language.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

import nnsight_go
from nnsight_go import LanguageModel

HERE = pathlib.Path(__file__).resolve().parent
LANGUAGE = "cache edits generate graphs invokes packing pausing saving trace values verbs".split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "paths", [["simdevice"], [f"test_{name}.py" for name in LANGUAGE]], ids=["captures", "language"]
)
def test_on_a_device(paths: list[str]) -> None:
    python = os.pathsep.join([str(HERE), str(HERE.parent / "python"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "simdevice.plugin", *paths]
    done = subprocess.run(command, cwd=HERE, env={**os.environ, "PYTHONPATH": python}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.slow
def test_the_benchmark_on_a_device(tmp_path: pathlib.Path) -> None:
    program = """
import sys
from tests.simdevice import NAME, begin
from tests.bench.__main__ import main
sys.modules |= dict.fromkeys(("nnsight", "transformer_lens"))  # which do not know the device
begin()
main([*sys.argv[1:], "--device", NAME])
"""
    options = ["--small", "--no-install", "--rounds", "1", "--out", str(tmp_path), "--only", "forward"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *options]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((tmp_path / "bench.json").read_text())["parts"]["forward"]
    assert any("by a CUDA graph" in row["case"] for row in rows)


@pytest.mark.parametrize("where", ["cuda:77", "xpu", 77])
def test_a_device_that_is_not_there(where: str | int) -> None:
    with pytest.raises(nnsight_go.ModelLoadError, match="no such device here") as e:
        LanguageModel("nnsight-go/landmarks", device_map=where)
    assert 'device_map="auto"' in str(e.value)


def test_graphs_are_for_devices_that_have_them() -> None:
    """On the CPU the option changes nothing."""
    model = LanguageModel("nnsight-go/landmarks", device_map="cpu", cuda_graphs=True)
    found = []
    for _ in range(5):
        with model.trace("The Colosseum is in the city of"):
            found.append(model.lm_head.output.save())
    assert all(x.equal(found[0]) for x in found)
