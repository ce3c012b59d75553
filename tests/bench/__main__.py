"""`make bench`: ours against transformers, hooks, nnsight and TransformerLens, in one process and one run.

Prints the report and writes it under --out: README.md, bench.json and plots. The models have random weights
and the size of GPT-2 small, or of two layers of a Llama of a billion parameters; --small takes tiny ones, to try
the benchmark itself. --only chooses parts.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import sys
import tempfile
import time
from dataclasses import replace

import torch
from transformers.utils.logging import disable_progress_bar

from . import (
    caching,
    forward,
    generation,
    gradients,
    hosted,
    install,
    lens,
    llama,
    opening,
    report,
    scaling,
    server,
    sweep,
)
from .models import Setting
from .rows import Curve, Row

PARTS = {
    "forward": forward.measure,
    "sweep": sweep.measure,
    "lens": lens.measure,
    "generation": generation.measure,
    "gradients": gradients.measure,
    "caching": caching.measure,
    "opening": opening.measure,
    "hosted": hosted.measure,
    "server": server.measure,
    "scaling": scaling.measure,
    "llama": llama.measure,
}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=15, help="of each case, fewer for slow ones")
    parser.add_argument("--small", action="store_true", help="tiny models: to try the benchmark itself")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="cpu", help='where the models are: "cpu", "cuda"')
    parser.add_argument("--no-install", action="store_true", help="compare with the libraries that are there already")
    args = parser.parse_args(given)
    if args.no_install:
        install.forbid()
    disable_progress_bar()
    parts: dict[str, list[Row]] = {}
    curves: list[Curve] = []
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(pathlib.Path(folder), args.rounds, args.small, args.device)
        for part in (name for name in PARTS if name in args.only):
            start = time.perf_counter()
            if part == "llama":  # the last part, and the largest model
                setting.forget()
            results = PARTS[part](setting)
            if part == "scaling":
                curves = results
            else:
                # What is held to a target is the full size.
                parts[part] = [replace(row, target=None) for row in results] if args.small else results
            # After every part: a run that is interrupted leaves what it has.
            text = report.write(args.out, machine(args.device), parts, curves)
            print(f"bench: {part} took {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        setting.forget()
    print(text)


def machine(device: str) -> str:
    what = [platform.machine(), f"{os.cpu_count()} cores", f"{torch.get_num_threads()} threads"]
    if torch.device(device).type == "cuda":
        what.append(torch.cuda.get_device_name(device))
    return ", ".join([*what, f"torch {torch.__version__}", f"Python {platform.python_version()}"])


if __name__ == "__main__":
    main()
