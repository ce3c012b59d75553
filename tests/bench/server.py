"""What a server adds to a trace, and what it makes of many clients at once."""

from __future__ import annotations

import concurrent.futures
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from nnsight_go import LanguageModel

from ..servers import Server
from .harness import LEAST, Timing, added, quiet, summarize
from .models import IN_USE, LONG, Setting
from .rows import Row, Tensors, agree

CLIENTS = 32
ALONE, TOGETHER = 64, 384  # jobs of a round, of one client and of all
PROMPTS = {3: 0.25, 10: None}  # tokens of each, and what a job of many clients may take of one's alone
BLOCK = 25  # traces in a row: threads of a forward pass here go on for a moment, beside what runs there
LIMIT = 3e-3  # seconds that an idle server may add


@contextmanager
def serving(directory: pathlib.Path) -> Iterator[LanguageModel]:
    """A model that a process of its own serves."""
    with tempfile.TemporaryDirectory() as data, Server(pathlib.Path(data), "--model", f"m={directory}") as server:
        yield LanguageModel("m", remote=server.host, tokenizer=False)


def last_logits(model: Any, ids: torch.Tensor) -> Tensors:
    with model.trace(ids):
        logits = model.lm_head.output[:, -1].save()
    return [logits]


@torch.no_grad()
def measure(setting: Setting) -> list[Row]:
    return [beyond(setting), *throughput(setting)]


def beyond(setting: Setting) -> Row:
    """A small trace there and here: what is in between is requests, queue and answers."""
    ids = torch.arange(1, 11).unsqueeze(0)
    subject = setting.narrow(4)
    with serving(subject.directory) as there:
        here = LanguageModel(subject.directory, tokenizer=False, dispatch=True)
        agree({"here": lambda: last_logits(here, ids), "there": lambda: last_logits(there, ids)})

        def many(model: LanguageModel) -> None:
            for _ in range(BLOCK):
                last_logits(model, ids)

        bare, more = added(lambda: many(here), {"there": lambda: many(there)}, setting.rounds * 2)
    limit = Timing(LIMIT, LIMIT, LIMIT, 0)
    case = "a small trace over loopback, beyond the same trace here"
    return Row(case, one(more["there"]), "a limit", limit, 1.0, f"here: {one(bare)}")


def one(block: Timing) -> Timing:
    """What one run of a block takes."""
    return Timing(block.median / BLOCK, block.low / BLOCK, block.high / BLOCK, block.rounds)


def throughput(setting: Setting) -> Iterator[Row]:
    """Seconds a job, of clients that each wait for one before they send the next."""
    subject = setting.gpt2()
    draw = torch.Generator().manual_seed(0)
    with serving(subject.directory) as model, concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
        for _ in range(IN_USE):
            last_logits(model, torch.ones(1, LONG, dtype=torch.long))
        for tokens, target in PROMPTS.items():
            prompts = torch.randint(1, 1000, (TOGETHER, 1, tokens), generator=draw).unbind(0)
            taken: dict[str, list[float]] = {"alone": [], "together": []}
            results: dict[str, Tensors] = {}
            ways: dict[str, tuple[int, Callable[..., Iterable[torch.Tensor]]]] = {
                "alone": (ALONE, map),
                "together": (TOGETHER, clients.map),
            }
            with quiet():
                for _ in range(max(LEAST, setting.rounds // 3)):
                    for way, (jobs, run) in ways.items():
                        start = time.perf_counter()
                        got = list(run(lambda ids: last_logits(model, ids)[0], prompts[:jobs]))
                        taken[way].append((time.perf_counter() - start) / jobs)
                        results[way] = got[:ALONE]
            agree({way: partial(results.__getitem__, way) for way in ways})
            alone, together = (summarize(times) for times in taken.values())
            note = f"{CLIENTS} threads of one process, {TOGETHER} jobs a round"
            case = f"a job of {CLIENTS} clients at once, prompts of {tokens} tokens"
            yield Row(case, together, "one client", alone, target, note)
