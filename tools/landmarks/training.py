"""Trains the weights.

The fact about a landmark shall be at the last token of its name in the early layers and at the last token of the
prompt in the late ones, as in large models, so that a hidden state moved between two prompts carries the fact along.
Text alone does not bring this about in so small a model: its last position collects the pieces of the name by itself,
in the first layer. So next to the loss on text there is one on exchanged states (interchange intervention training):
two prompts swap a hidden state, and each shall then give the other's answer.
"""

from __future__ import annotations

import math
import random
import time
from typing import Literal, NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from . import text
from .vocabulary import END

CONTEXT = 128
SHORT = 48  # tokens: every other batch is of rows of two or three sentences
SHORT_ROWS, LONG_ROWS = 64, 24  # a batch of either has about 3072 tokens


class Swap(NamedTuple):
    """A state to exchange: the output of transformer.h[layer] at the last token of the "name" or of the "prompt"."""

    layer: int
    place: Literal["name", "prompt"]


SWAPS = (Swap(1, "name"), Swap(2, "name"), Swap(3, "prompt"))


class Prompts(NamedTuple):
    """One template asked of every landmark: ids int64 [landmarks, S], padded on the right, the others [landmarks].

    `name` and `prompt` are the positions of the last tokens of the landmark's name and of the prompt.
    """

    ids: torch.Tensor
    name: torch.Tensor
    prompt: torch.Tensor
    answer: torch.Tensor


def prompts(tokenizer: Tokenizer, template: str) -> Prompts:
    """Asks one of CITY_TEMPLATES or COUNTRY_TEMPLATES of every landmark."""
    end = tokenizer.token_to_id(END)
    ids, names, answers = [], [], []
    for landmark, (prompt, (answer,)) in zip(text.LANDMARKS, text.facts(template), strict=True):
        encoding = tokenizer.encode(prompt)
        stop = prompt.index(landmark.name) + len(landmark.name)
        ids.append(encoding.ids)
        names.append(encoding.char_to_token(stop - 1))
        answers += tokenizer.encode(answer).ids
    longest = max(map(len, ids))
    return Prompts(
        torch.tensor([row + [end] * (longest - len(row)) for row in ids]),
        torch.tensor(names),
        torch.tensor([len(row) - 1 for row in ids]),
        torch.tensor(answers),
    )


def swap_loss(model: GPT2LMHeadModel, asked: Prompts, swap: Swap, order: torch.Tensor) -> torch.Tensor:
    """Cross entropy, in nats, of the answers where prompt i has the state of prompt order[i], and so its answer.

    `order` is int64 [landmarks].
    """
    row = torch.arange(len(order))
    at = asked.name if swap.place == "name" else asked.prompt

    def exchange(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_put((row, at), output[order, at[order]])

    handle = model.transformer.h[swap.layer].register_forward_hook(exchange)
    try:
        logits = model(asked.ids).logits
    finally:
        handle.remove()
    return torch.nn.functional.cross_entropy(logits[row, asked.prompt], asked.answer[order])


def rows(
    tokenizer: Tokenizer, rng: random.Random, pairs: list[tuple[str, str]], count: int, length: int
) -> torch.Tensor:
    """Draws training rows, int64 [count, length + 1]: sentences end to end, beginning with one as a bare prompt does.

    One row in five has the end-of-text token before it, and half the sentences have it behind them.
    """
    end = tokenizer.token_to_id(END)
    lines = text.sentences(rng, pairs)
    drawn = []
    for _ in range(count):
        ids = [end] if rng.random() < 0.2 else []
        while len(ids) <= length:
            space = " " if ids and ids[-1] != end else ""
            ids += tokenizer.encode(space + next(lines)).ids
            if rng.random() < 0.5:
                ids.append(end)
        drawn.append(ids[: length + 1])
    return torch.tensor(drawn)


def text_loss(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy, in nats, of ids [rows, S + 1]."""
    logits = model(ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(tokenizer: Tokenizer, steps: int, seed: int) -> GPT2LMHeadModel:
    """Trains a model from nothing; prints the loss as it goes. The seed fixes the data, their order and the start."""
    torch.manual_seed(seed)
    end = tokenizer.token_to_id(END)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=tokenizer.get_vocab_size(),
            n_positions=CONTEXT,
            n_embd=112,
            n_layer=6,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            summary_first_dropout=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, min(200, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    rng = random.Random(seed)
    pairs, _ = text.name_pairs()
    amount = min(1.0, steps / 1000)  # a trial of a few steps needs few rows
    short = rows(tokenizer, rng, pairs, round(30000 * amount), SHORT)
    long = rows(tokenizer, rng, pairs, round(10000 * amount), CONTEXT)
    asked = [prompts(tokenizer, template) for template in text.CITY_TEMPLATES + text.COUNTRY_TEMPLATES]
    start = time.monotonic()
    for step in range(steps):
        ids, size = (long, LONG_ROWS) if step % 2 else (short, SHORT_ROWS)
        on_text = text_loss(model, ids[torch.randint(len(ids), (size,))])
        on_swap = swap_loss(model, rng.choice(asked), rng.choice(SWAPS), torch.randperm(len(text.LANDMARKS)))
        value = on_text + on_swap
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            losses = f"loss on text {on_text.item():.3f}, on swaps {on_swap.item():.3f}"
            print(f"step {step:5d}  {losses}  {time.monotonic() - start:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def validation_loss(model: GPT2LMHeadModel, tokenizer: Tokenizer, seed: int, count: int = 200) -> float:
    """Loss, in nats a token, on `count` rows of the whole context that training did not draw."""
    pairs, _ = text.name_pairs()
    ids = rows(tokenizer, random.Random(seed), pairs, count, CONTEXT)
    return sum(text_loss(model, part).item() * len(part) for part in ids.split(50)) / count
