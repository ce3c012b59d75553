"""Jobs in processes of their own: job.py."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

from .harness import summarize
from .models import Setting
from .rows import Memory, Row

MOST = 3  # processes of one way
KINDS = {"Anonymous": "anonymous", "Private_Dirty": "private", "Rss": "resident"}


def of_job(*args: str) -> dict[str, float]:
    """The figures of one job, which it prints as JSON on its last line."""
    done = subprocess.run([sys.executable, "-m", "tests.bench.job", *args], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_jobs(setting: Setting, job: str, ways: Sequence[str], tokens: int) -> dict[str, list[dict[str, float]]]:
    """The figures of each way, whose processes run in turn."""
    directory = str(setting.gpt2().directory)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(min(setting.rounds, MOST)):
        for way, taken in runs.items():
            taken.append(of_job(job, way, directory, str(tokens), setting.device))
    return runs


def memory_rows(
    case: str,
    runs: Mapping[str, list[dict[str, float]]],
    others: Mapping[str, str],
    targets: Mapping[str, float] | None = None,
) -> list[Row]:
    """Peak memory, by kind: ours against each other way, `{way: what it is called}`.

    Targets are not for resident memory: mapped weights count in it, which processes share.
    """
    rows = []
    for kind, name in KINDS.items():
        peaks = {way: Memory(**vars(summarize([run[kind] for run in taken]))) for way, taken in runs.items()}
        for way, called in others.items():
            target = (targets or {}).get(way) if kind != "Rss" else None
            rows.append(Row(f"{case}: peak memory, {name}", peaks["ours"], called, peaks[way], target))
    return rows
