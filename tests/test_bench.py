"""The benchmark runs, on tiny models and without a network, and writes its report."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
from tests.bench.harness import Timing
from tests.bench.rows import Row

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_a_small_run(tmp_path: pathlib.Path) -> None:
    """All parts that need no processes of their own; other libraries only where they are installed."""
    parts = ["forward", "sweep", "lens", "generation", "hosted", "scaling", "llama"]
    options = ["--small", "--no-install", "--rounds", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "tests.bench", *options, "--only", *parts]
    # Threads that wait for each other on a busy machine take most of the time of tiny models.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(found["parts"]) == [part for part in parts if part not in ("scaling", "llama")] + ["llama"]
    assert all(rows for rows in found["parts"].values()) and len(found["curves"]) == 5
    assert (tmp_path / "scaling.png").stat().st_size > 0
    page = (tmp_path / "README.md").read_text()
    assert page in done.stdout and "## Patching sweep" in page and "(scaling.png)" in page


def test_a_row_and_its_target() -> None:
    ours, theirs, none = (Timing(median, 0, 1, 3) for median in (1.0, 2.0, 0.0))
    assert Row("", ours, "", theirs).met is None and Row("", ours, "", theirs).ratio == 0.5
    assert Row("", ours, "", theirs, 0.5).met is True and Row("", ours, "", theirs, 0.4).met is False
    for unknown in (None, none):
        assert Row("", ours, "", unknown, 0.5).met is None and Row("", ours, "", unknown).ratio is None
