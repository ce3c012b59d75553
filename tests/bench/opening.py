"""From nothing to a model, to its first trace, and the imports before: all in fresh processes."""

from __future__ import annotations

import subprocess
import sys

from .harness import Timing, summarize
from .install import NNSIGHT
from .models import Setting
from .processes import MOST, memory_rows, run_jobs
from .rows import Row, against

TARGET = 0.4
IMPORTS = {
    "torch": "import torch",
    "ours": "from nnsight_go import LanguageModel",
    "transformers": "from transformers import AutoModelForCausalLM",
    "nnsight": "from nnsight import LanguageModel",
}


def measure(setting: Setting) -> list[Row]:
    runs = run_jobs(setting, "open", ["ours", "transformers"], 10)
    checks = {who: taken[0]["check"] for who, taken in runs.items()}
    assert abs(checks["ours"] - checks["transformers"]) <= 1e-4 * abs(checks["transformers"]), checks
    rows = []
    for key, case, target in (("open", "opening a model", None), ("first", "opening, and the first forward", TARGET)):
        ours, theirs = (summarize([run[key] for run in taken]) for taken in runs.values())
        rows.append(Row(case, ours, "transformers", theirs, target, "the files are in the page cache"))
    rows += memory_rows("opening, and the first forward", runs, {"transformers": "transformers"})
    return rows + imports(setting)


def imports(setting: Setting) -> list[Row]:
    """Everything that the first line of a program takes, torch included."""
    lines = dict(IMPORTS)
    if NNSIGHT.available() is None:
        del lines["nnsight"]
    taken: dict[str, list[float]] = {who: [] for who in lines}
    for _ in range(min(setting.rounds, MOST)):
        for who, line in lines.items():
            taken[who].append(import_time(line))
    timed: dict[str, Timing] = {who: summarize(times) for who, times in taken.items()}
    note = f"import torch alone: {timed['torch']}"
    return [
        Row("import", timed["ours"], "transformers", timed["transformers"], note=note),
        against("import", timed["ours"], NNSIGHT, timed.get("nnsight"), note=note),
    ]


def import_time(line: str) -> float:
    """Seconds of one import in a process of its own."""
    path = [str(NNSIGHT.directory())] if NNSIGHT.found() is not None else []
    code = f"import sys, time; sys.path += {path!r}; t = time.perf_counter(); {line}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])
