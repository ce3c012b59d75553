"""Small models of transformers, and what they show to hooks: what traces are compared with."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def gpt2(**changes: Any) -> GPT2Config:
    """A small GPT-2 with an odd number of heads."""
    small = {"n_embd": 48, "n_head": 3, "n_layer": 3, "n_positions": 64, "vocab_size": 61}
    return GPT2Config(bos_token_id=0, eos_token_id=0, **(small | changes))


def llama(**changes: Any) -> LlamaConfig:
    """A small Llama whose query heads share heads of keys and values three to one."""
    small = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3}
    small |= {"vocab_size": 61, "intermediate_size": 40, "max_position_embeddings": 600}
    return LlamaConfig(**(small | changes))


def reference(config: transformers.PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A transformers model whose random weights are large enough that every part shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.15)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model


def shared(name: str) -> pathlib.Path:
    """A model of the shared folder; the test is skipped where it is not there."""
    root = pathlib.Path(os.environ.get("NNSIGHT_GO_SHARED") or pathlib.Path(__file__).parents[2] / "shared")
    directory = root / "models" / name
    if not directory.is_dir():
        pytest.skip(f"the shared model {name} is not here (set NNSIGHT_GO_SHARED)")
    return directory


def tensors(value: Any, leaf: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a structured value, named as the engine names leaves."""
    if isinstance(value, torch.Tensor):
        return {leaf: value}
    dot = f"{leaf}." if leaf else ""
    items: dict[str, torch.Tensor] = {}
    if isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            items |= tensors(item, f"{dot}{i}")
    elif hasattr(value, "items"):
        for key, item in value.items():
            items |= tensors(item, f"{dot}{key}")
    return items


Seen = dict[tuple[str, str], dict[str, torch.Tensor]]


def hooked(model: PreTrainedModel, **inputs: torch.Tensor) -> Seen:
    """All inputs and outputs of modules that transformers shows to hooks, in the order they are met."""
    seen: Seen = {}
    handles = []
    for path, module in model.named_modules():

        def before(_: Any, args: Any, kwargs: Any, path: str = path) -> None:
            seen[path, "input"] = tensors(args, "args") | tensors(kwargs, "kwargs")

        def after(module: Any, args: Any, output: Any, path: str = path) -> None:
            leaves = tensors(output)
            # decoder blocks return a bare tensor there and a tuple of one here
            block = isinstance(module, GradientCheckpointingLayer)
            seen[path, "output"] = {"0": leaves[""]} if block else leaves

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    with torch.no_grad():
        model(use_cache=False, **inputs)
    for handle in handles:
        handle.remove()
    return seen


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    got, want = got.double(), want.double()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def prompt(config: transformers.PreTrainedConfig, tokens: int, seed: int = 1) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (tokens,), generator=generator).tolist()
