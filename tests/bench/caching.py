"""A cache of every module: time in one process, peak memory in fresh ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .harness import interleave
from .install import LENS, NNSIGHT
from .models import Setting
from .processes import memory_rows, run_jobs
from .rows import Row, against, agree

TIME_TARGET, MEMORY_TARGET = 0.7, 1.1
TOKENS = 64


def traced_cache(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    with model.trace(ids) as tracer:
        cache = tracer.cache()
    return {name: entry.output for name, entry in cache.items()}


def nnsight_cache(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    with model.trace(ids) as tracer:
        cache = tracer.cache()
    return {name: cache[name].output for name in cache.keys()}  # noqa: SIM118 (it is no dictionary)


def hooked_cache(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            kept[name] = output

        return hook

    named = [(f"model.{name}".rstrip("."), module) for name, module in model.named_modules()]
    handles = [module.register_forward_hook(keep(name)) for name, module in named]
    try:
        model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept


def lens_cache(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(model.run_with_cache(ids)[1].items())


def tensors(cache: dict[str, Any], names: list[str]) -> list[torch.Tensor]:
    return [main(cache[name]) for name in names]


def main(value: Any) -> torch.Tensor:
    """What a module gives first: some ways give it alone, others in a tuple or an object."""
    if isinstance(value, torch.Tensor):
        return value
    return next(iter(value.values() if hasattr(value, "values") else value))


@torch.no_grad()
def measure(setting: Setting) -> list[Row]:
    subject = setting.gpt2()
    ids = subject.ids(TOKENS)
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "hooks": lambda: hooked_cache(subject.bare, ids),
        "ours": lambda: traced_cache(subject.ours, ids),
        **subject.libraries(nnsight=lambda model: nnsight_cache(model, ids)),
    }
    named = {way: run() for way, run in ways.items()}
    common = [name for name in named["ours"] if all(name in found for found in named.values())]
    error = agree({way: lambda found=found: tensors(found, common) for way, found in named.items()})
    counts = {way: f"{len(found)} there" for way, found in named.items()}
    # its values have names of their own, and not all of them are outputs of modules
    apart = subject.libraries(lens=lambda model: lens_cache(model, ids))
    counts |= {way: f"{len(run())} there" for way, run in apart.items()}
    ways |= apart
    del named
    timed = interleave(ways, setting.rounds)
    case, note = f"cache of every module, {TOKENS} tokens", f"{len(common)} values compared, difference {error:.0e}"
    rows = [
        Row(case, timed["ours"], "hooks", timed["hooks"], note=f"{note}; {counts['hooks']}"),
        against(case, timed["ours"], NNSIGHT, timed.get("nnsight"), TIME_TARGET, counts.get("nnsight", "")),
        against(case, timed["ours"], LENS, timed.get("lens"), note=counts.get("lens", "")),
    ]
    others = {"nnsight": NNSIGHT.label, "transformers": "hooks"}
    if subject.nnsight is None:
        del others["nnsight"]
    runs = run_jobs(setting, "cache", ["ours", *others], TOKENS)
    return rows + memory_rows(case, runs, others, {"nnsight": MEMORY_TARGET})
