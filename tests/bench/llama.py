"""Two layers of a Llama of a billion parameters: forward passes, and generation."""

from __future__ import annotations

import torch

from . import forward, generation
from .models import Setting
from .rows import Row


@torch.no_grad()
def measure(setting: Setting) -> list[Row]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        subject = setting.llama(dtype)
        for tokens in (10, 64):
            rows += forward.at(subject, tokens, setting.rounds, name="Llama, ", targets=False)
        rows += generation.plain(subject, setting.rounds, name="Llama, ")
    return rows
