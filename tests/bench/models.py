"""The models that are measured: random weights, saved as a directory, opened in every way.

The ways share one set of weights in memory, except for ours, which maps the files, and TransformerLens's,
which splits some. They do not share modules: nnsight replaces the `forward` of what it wraps.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any, TypeVar

import tokenizers
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from nnsight_go import LanguageModel

from .install import LENS, NNSIGHT

IN_USE = 80  # traces after which the engine has packed the weights of a model that is large enough for it ...
LONG = 64  # ... if they have so many tokens
MANY = 10**7  # parameters

T = TypeVar("T")

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 64, "vocab_size": 1000}


def gpt2(small: bool) -> PreTrainedConfig:
    """GPT-2 small, which is transformers' default."""
    return GPT2Config(bos_token_id=0, eos_token_id=0, **(SMALL if small else {}))


def narrow(layers: int) -> PreTrainedConfig:
    """A GPT-2 whose layers compute little, so that what stands around them shows."""
    return GPT2Config(bos_token_id=0, eos_token_id=0, **{**SMALL, "n_layer": layers})


def llama(small: bool) -> PreTrainedConfig:
    """Two layers of a Llama with a billion parameters."""
    full = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"num_hidden_layers": 2, "vocab_size": 1000 if small else 32000, "max_position_embeddings": 2048}
    return LlamaConfig(bos_token_id=0, eos_token_id=0, **(tiny if small else full), **rest)


@dataclasses.dataclass
class Subject:
    """One model with one dtype, in each of the ways."""

    directory: pathlib.Path
    dtype: torch.dtype
    device: str

    @cached_property
    def bare(self) -> Any:
        """transformers' model."""
        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=self.dtype).to(self.device).eval()

    @cached_property
    def ours(self) -> LanguageModel:
        """The engine's model, after it has been in use for a while."""
        model = self._open()
        for _ in range(IN_USE if self.bare.num_parameters() > MANY else 1):
            with model.trace(self.ids(LONG)):
                model.lm_head.output.save()
        return model

    @cached_property
    def captured(self) -> LanguageModel:
        """The same once more, whose traces in a loop a GPU does by CUDA graphs."""
        return self._open(cuda_graphs=True)

    @cached_property
    def nnsight(self) -> Any:
        """nnsight's model with `generate`, or None where nnsight is missing."""
        library = NNSIGHT.available()
        if library is None:
            return None
        return library.TransformersModel(self._copy(), task="text-generation", tokenizer=self._tokenizer())

    @cached_property
    def lens(self) -> Any:
        """TransformerLens's bridge, or None where that is missing."""
        library = LENS.available()
        if library is None:
            return None
        options = {"hf_model": self._copy(), "tokenizer": self._tokenizer(), "device": self.device}
        return library.TransformerBridge.boot_transformers(str(self.directory), **options)

    def libraries(self, **does: Callable[[Any], T]) -> dict[str, Callable[[], T]]:
        """The ways of libraries that are there, by name (`nnsight`, `lens`): what each does with its model."""
        models = {name: getattr(self, name) for name in does}
        return {name: partial(do, models[name]) for name, do in does.items() if models[name] is not None}

    def ids(self, tokens: int, rows: int = 1) -> torch.Tensor:
        """The same at each call."""
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(1, self.bare.config.vocab_size, (rows, tokens), generator=generator).to(self.device)

    def _open(self, **more: Any) -> LanguageModel:
        options = {"dtype": self.dtype, "device_map": self.device, "tokenizer": False}
        return LanguageModel(self.directory, dispatch=True, **options, **more)

    def _copy(self) -> Any:
        """Modules of their own around the same parameters."""
        return copy.deepcopy(self.bare, {id(p): p for p in self.bare.parameters()})

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        """One that the libraries take. It writes numbers, and no text is ever given to it."""
        directory = self.directory / "tokenizer"
        if not directory.is_dir():
            words = {str(i): i for i in range(self.bare.config.vocab_size)}
            made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
            special = {"bos_token": "0", "eos_token": "0", "pad_token": "0"}
            PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(directory)
        return PreTrainedTokenizerFast.from_pretrained(directory)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run of the benchmark was asked for, and where its models lie."""

    folder: pathlib.Path
    rounds: int
    small: bool
    device: str

    def gpt2(self, dtype: torch.dtype = torch.float32) -> Subject:
        return subject(self.folder / "gpt2", gpt2, self.small, dtype, self.device)

    def narrow(self, layers: int) -> Subject:
        return subject(self.folder / f"narrow-{layers}", narrow, layers, torch.float32, self.device)

    def llama(self, dtype: torch.dtype = torch.float32) -> Subject:
        return subject(self.folder / "llama", llama, self.small, dtype, self.device)

    def forget(self) -> None:
        """Closes all models that are open, and removes their files."""
        subject.cache_clear()
        shutil.rmtree(self.folder)
        self.folder.mkdir()


@cache
def subject(directory: pathlib.Path, config: Any, size: Any, dtype: torch.dtype, device: str) -> Subject:
    """Opened once for each dtype; the files are made with the first."""
    if not directory.is_dir():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config(size)).save_pretrained(directory)
        os.sync()  # pages that are yet to be written count as private memory of who maps them
    return Subject(directory, dtype, device)
