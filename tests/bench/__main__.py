"""`make bench`: ours against transformers, nnsight and hooks, in one process and one run.

Prints tables and writes them as Markdown and JSON under --out. Against transformers the model is of
GPT-2-small's size with random weights; --small takes a tiny one, to try the harness itself. Against
nnsight and hooks it is a small module (hosted.py). --only chooses parts.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nnsight_go import LanguageModel

from .gradients import hooked_gradients, traced_gradients
from .harness import Timing, interleave, ratio
from .hosted import hosted_cases, hosted_table
from .memory import of_job

PARTS = ("forward", "generation", "gradients", "opening", "hosted")


def save_model(directory: str, small: bool) -> GPT2LMHeadModel:
    """Makes a GPT-2 with random weights and saves it as a model directory."""
    size = {"n_layer": 4, "n_head": 4, "n_embd": 64, "vocab_size": 1000} if small else {}
    torch.manual_seed(0)
    reference = GPT2LMHeadModel(GPT2Config(**size)).eval()
    reference.save_pretrained(directory)
    return reference


def one_save(model: LanguageModel, ids: torch.Tensor, layer: int | None) -> torch.Tensor:
    """A whole trace with one save: a block's hidden states, or the logits where layer is None."""
    with model.trace(ids):
        saved = (model.lm_head.output if layer is None else model.transformer.h[layer].output[0]).save()
    return saved


def forward_cases(reference: GPT2LMHeadModel, directory: str, rounds: int) -> list[dict]:
    """Whole traces at 10 and 64 tokens against the bare forward pass."""
    model = LanguageModel(directory, tokenizer=False, dispatch=True)
    middle = len(model.transformer.h) // 2 - 1
    rows = []
    for tokens in (10, 64):
        ids = torch.randint(0, reference.config.vocab_size, (1, tokens))

        def bare(ids: torch.Tensor = ids) -> torch.Tensor:
            with torch.no_grad():
                return reference(ids, use_cache=False).logits

        error = (one_save(model, ids, None) - bare()).abs().max().item()
        contenders = {
            "bare": bare,
            "logits": lambda ids=ids: one_save(model, ids, None),
            "middle": lambda ids=ids: one_save(model, ids, middle),
        }
        timed = interleave(contenders, rounds)
        for name, what in (("logits", "one save: all logits"), ("middle", f"one save: layer {middle}")):
            rows.append(row(f"{what}, {tokens} tokens", timed[name], timed["bare"], f"max error {error:.1e}"))
    return rows


def generation_cases(reference: GPT2LMHeadModel, directory: str, rounds: int) -> list[dict]:
    """Greedy generation, plain and with one save and one edit a step."""
    model = LanguageModel(directory, tokenizer=False, dispatch=True)
    middle = len(model.transformer.h) // 2
    prompt, new = torch.randint(0, reference.config.vocab_size, (1, 10)), 40
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def theirs() -> torch.Tensor:
        return reference.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)

    def plain(settings: dict = settings) -> torch.Tensor:
        with model.generate(prompt, **settings):
            output = model.generator.output.save()
        return output

    def steps() -> list[torch.Tensor]:
        with model.generate(prompt, **settings) as tracer:
            states = list().save()  # noqa: C408
            with tracer.all():
                model.transformer.h[middle].output[0][:, -1, :] *= 0.9
                states.append(model.transformer.h[-1].output[0])
        return states

    same = "same ids" if torch.equal(plain(), theirs()) else "OTHER IDS"
    timed = interleave({"theirs": theirs, "plain": plain, "steps": steps}, max(rounds // 3, 3), 1)
    rows = [row(f"generate, {new} tokens", timed["plain"], timed["theirs"], same)]
    rows.append(row("one save and one edit a step", timed["steps"], timed["theirs"]))
    rows.append(row("the same, against our own plain speed", timed["steps"], timed["plain"], "second column: ours"))
    return rows


def gradient_cases(reference: GPT2LMHeadModel, directory: str, rounds: int) -> list[dict]:
    """A forward pass and the gradients of every block's hidden states."""
    model = LanguageModel(directory, tokenizer=False, dispatch=True)
    rows = []
    for tokens in (10, 64):
        ids = torch.randint(0, reference.config.vocab_size, (1, tokens))

        def theirs(ids: torch.Tensor = ids) -> list[torch.Tensor]:
            return hooked_gradients(reference, ids)

        def ours(ids: torch.Tensor = ids) -> list[torch.Tensor]:
            return traced_gradients(model, ids)

        error = max((a - b).abs().max().item() for a, b in zip(ours(), theirs(), strict=True))
        timed = interleave({"theirs": theirs, "ours": ours}, rounds)
        what = f"gradients of {len(model.transformer.h)} hidden states, {tokens} tokens"
        rows.append(row(what, timed["ours"], timed["theirs"], f"with hooks; max error {error:.1e}"))
    for key, what in (("Anonymous", "the same, peak memory, anonymous"), ("Rss", "the same, peak memory, resident")):
        sides = {who: of_job("tests.bench.job", who, directory, "64", "gradients") for who in ("ours", "theirs")}
        rows.append(memory_row(what, sides["ours"][key], sides["theirs"][key]))
    return rows


def opening_cases(directory: str, rounds: int) -> list[dict]:
    """From nothing to a model, and to its first logits, each in a fresh process."""
    runs: dict[str, list[dict]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for who in runs:
            runs[who].append(of_job("tests.bench.job", who, directory, "10"))
    rows = []
    for key, what in (("open", "opening the model"), ("first", "opening and first forward")):
        sides = {who: sorted(r[key] for r in results) for who, results in runs.items()}
        timed = {who: Timing(s[len(s) // 2], s[0], s[-1], len(s)) for who, s in sides.items()}
        rows.append(row(what, timed["ours"], timed["theirs"], "fresh processes, warm page cache"))
    for key, what in (("Anonymous", "peak memory, anonymous"), ("Rss", "peak memory, resident")):
        ours, theirs = (sorted(r[key] for r in runs[who])[rounds // 2] for who in ("ours", "theirs"))
        rows.append(memory_row(what, ours, theirs))
    return rows


def memory_row(case: str, ours: float, theirs: float) -> dict:
    sides = {"ours": f"{ours / 2**20:.0f} MiB", "theirs": f"{theirs / 2**20:.0f} MiB"}
    note = "grown over a process that has imported the library"
    return {"case": case, **sides, "ratio": f"{ours / theirs:.2f}x", "note": note}


def row(case: str, ours: Timing, theirs: Timing, note: str = "") -> dict:
    return {"case": case, "ours": str(ours), "theirs": str(theirs), "ratio": ratio(ours, theirs), "note": note}


def table(rows: list[dict]) -> str:
    lines = ["| case | nnsight_go | transformers | ratio | |", "|---|---|---|---|---|"]
    lines += ["| {case} | {ours} | {theirs} | **{ratio}** | {note} |".format(**r) for r in rows]
    return "\n".join(lines)


def transformers_cases(parts: list[str], small: bool, rounds: int) -> list[dict]:
    """What the parts measure on one model directory, in the order of PARTS."""
    with tempfile.TemporaryDirectory() as directory:
        reference = save_model(directory, small)
        rows = []
        if "forward" in parts:
            rows += forward_cases(reference, directory, rounds)
        if "generation" in parts:
            rows += generation_cases(reference, directory, rounds)
        if "gradients" in parts:
            rows += gradient_cases(reference, directory, rounds)
        if "opening" in parts:
            rows += opening_cases(directory, min(rounds, 5))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/bench"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict]] = {"rows": [], "hosted": []}
    tables = []
    if set(args.only) != {"hosted"}:
        results["rows"] = transformers_cases(args.only, args.small, args.rounds)
        tables.append(table(results["rows"]))
    if "hosted" in args.only:  # last: nnsight changes torch and object when it is imported
        results["hosted"] = hosted_cases(args.rounds)
        tables.append(hosted_table(results["hosted"]))
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    text = "\n\n".join([*tables, machine]) + "\n"
    print(text)
    (args.out / "bench.md").write_text(text)
    (args.out / "bench.json").write_text(json.dumps({"machine": machine, **results}, indent=1))


if __name__ == "__main__":
    main()
