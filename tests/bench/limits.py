"""What the machine can do at best, and so the least that a forward pass takes on it.

A roofline of two measurements, taken in turn with the case itself: how fast torch multiplies large square matrices, and
how fast it reads memory. No cache holds a weight from one pass to the next, and only products count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .harness import Timing

SIDE = 1536  # of a matrix: large enough that a product is no faster with more
READ = 1 << 28  # bytes, more than caches hold


def ways(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """To be timed with the ways of a case, for ``least``."""
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    stretch = torch.ones(READ // 4)
    return {"product": lambda: a @ b, "reading": lambda: stretch.sum()}


def least(model: Any, tokens: int, timed: dict[str, Timing]) -> float:
    """Seconds of a pass of transformers' GPT-2 that gives the last position's logits.

    All positions need all blocks but the last, of which they need keys and values; the rest is one row.
    """
    config = model.config
    all_rows = (12 * (config.n_layer - 1) + 2) * config.n_embd**2
    one_row = 10 * config.n_embd**2 + config.vocab_size * config.n_embd
    numbers_a_second = READ / model.dtype.itemsize / timed["reading"].median
    products_a_second = SIDE**3 / timed["product"].median
    return max(all_rows / numbers_a_second, all_rows * tokens / products_a_second) + one_row / numbers_a_second
