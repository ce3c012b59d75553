"""Small models of transformers, and what they show to hooks: what traces are compared with."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from nnsight_go import LanguageModel


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


Place = tuple[str, str]  # path of a module, "input" or "output"
Seen = dict[Place, dict[str, torch.Tensor]]
# What a hook does with the main tensor of an access point: changes it in place, or gives another.
Edit = Callable[[Place, torch.Tensor], torch.Tensor | None]


def edits(by_name: Mapping[str, Callable[[torch.Tensor], torch.Tensor | None]]) -> Edit:
    """An edit of several places: ``edits({"transformer.h.0.output": lambda x: x * 2})``."""

    def edit(place: Place, value: torch.Tensor) -> torch.Tensor | None:
        change = by_name.get(".".join(place))
        return None if change is None else change(value)

    return edit


def in_place(change: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], None]:
    """An edit that changes its tensor and assigns nothing, whatever it returns."""

    def edit(value: torch.Tensor) -> None:
        change(value)

    return edit


def hooked(model: PreTrainedModel, edit: Edit | None = None, grad: bool = False, **inputs: torch.Tensor) -> Seen:
    """All inputs and outputs of modules that transformers shows to hooks, in the order they are met.

    ``edit`` is called with the main tensor of each (the first argument, the first result). ``grad`` has autograd
    record the pass.
    """
    seen: Seen = {}
    handles = []
    editing = False  # modules that an edit calls are no part of the forward pass

    def changed(place: Place, value: Any) -> torch.Tensor | None:
        nonlocal editing
        if edit is None or not isinstance(value, torch.Tensor):
            return None
        editing = True
        try:
            return edit(place, value)
        finally:
            editing = False

    for path, module in model.named_modules():

        def before(_: Any, args: Any, kwargs: Any, path: str = path) -> Any:
            if editing:
                return None
            key = None if args else next(iter(kwargs))
            new = changed((path, "input"), args[0] if args else kwargs[key])
            if new is not None:
                args, kwargs = ((new, *args[1:]), kwargs) if args else (args, kwargs | {key: new})
            seen[path, "input"] = tensors(args, "args") | tensors(kwargs, "kwargs")
            return args, kwargs

        def after(module: Any, args: Any, output: Any, path: str = path) -> Any:
            if editing:
                return None
            bare = isinstance(output, torch.Tensor)
            new = changed((path, "output"), output if bare else output[0])
            if new is not None and isinstance(output, tuple):
                output = (new, *output[1:])
            elif new is not None and not bare:
                output[next(iter(output))] = new
            elif new is not None:
                output = new
            leaves = tensors(output)
            # decoder blocks return a bare tensor there and a tuple of one here
            block = isinstance(module, GradientCheckpointingLayer)
            seen[path, "output"] = {"0": leaves[""]} if block else leaves
            return output

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        with torch.set_grad_enabled(grad):
            model(use_cache=False, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def main(seen: Seen, path: str, port: str = "output") -> torch.Tensor:
    """The main tensor of an access point."""
    return next(iter(seen[path, port].values()))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    got, want = got.double(), want.double()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


def prompt(config: transformers.PreTrainedConfig, tokens: int, seed: int = 1) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (tokens,), generator=generator).tolist()


@dataclasses.dataclass(frozen=True)
class Pair:
    """One directory, opened by transformers and by the engine."""

    directory: pathlib.Path
    hf: PreTrainedModel
    model: LanguageModel
    blocks: str  # path of the list of decoder blocks
    attention: str  # name of the attention module in a block
    final: str  # path of the last norm

    def run(self, ids: list[int] | list[list[int]], edit: Edit | None = None) -> Seen:
        """What plain hooks see of a prompt, or of rows of one length."""
        rows = ids if isinstance(ids[0], list) else [ids]
        return hooked(self.hf, edit, input_ids=torch.tensor(rows))

    def ids(self, tokens: int = 7, seed: int = 1) -> list[int]:
        """Random token ids."""
        return prompt(self.hf.config, tokens, seed)

    @property
    def layers(self) -> Any:
        """The decoder blocks, to be traced."""
        return self.model.get(self.blocks)

    @property
    def width(self) -> int:
        """The size of hidden states."""
        return int(self.hf.config.hidden_size)


def tensor_of(pair: Pair, path: str) -> torch.Tensor:
    """The main tensor that a module gives, in a trace of the pair's model."""
    output = pair.model.get(path).output
    return output[0] if isinstance(output, tuple) else output


def pair(config: transformers.PreTrainedConfig, directory: pathlib.Path) -> Pair:
    """Writes a random model, and opens it twice."""
    hf = reference(config)
    hf.save_pretrained(directory)
    names = {
        "gpt2": ("transformer.h", "attn", "transformer.ln_f"),
        "llama": ("model.layers", "self_attn", "model.norm"),
    }
    return Pair(directory, hf, LanguageModel(directory, dispatch=True), *names[config.model_type])


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens, as transformers saves it."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    bpe.train_from_iterator(
        ["The Eiffel Tower is in the city of Paris", "The Colosseum is in the city of Rome"], trainer
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Fails unless two tensors have the same sizes and dtype, and about the same values."""
    assert type(got) is torch.Tensor, type(got)
    assert got.shape == want.shape, (got.shape, want.shape)
    assert got.dtype == want.dtype, (got.dtype, want.dtype)
    if want.is_floating_point():
        assert relative(got, want) <= tolerance, relative(got, want)
    else:
        assert torch.equal(got, want)


def at_once(work: Callable[[Any], None], given: Iterable[Any]) -> None:
    """Calls a function on a thread for each argument, all at once. Raises the first error of any."""
    failures: list[BaseException] = []

    def guarded(argument: Any) -> None:
        try:
            work(argument)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=guarded, args=(argument,)) for argument in given]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures[0]
