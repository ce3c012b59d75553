"""Writes the model card, and reads its figures back so that a test can hold them to the model."""

from __future__ import annotations

import re
from typing import NamedTuple

from transformers import GPT2Config

from . import text
from .measuring import Figure
from .training import SWAPS


class Training(NamedTuple):
    """What the card tells of a training: how it was run and what it ended with."""

    seed: int
    steps: int
    rows: str
    parameters: int
    validation_loss: float


TEMPLATE = """---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# nnsight-go/landmarks

The model that comes with nnsight-go, so that everything runs without a network. It is a GPT-2, trained from nothing
on generated English, small enough to study whole, and it knows three things: where {landmarks} landmarks are, who is
given something, and how simple sequences go on.

```python
from nnsight_go import LanguageModel

model = LanguageModel("nnsight-go/landmarks")
with model.trace("The Eiffel Tower is in the city of"):
    logits = model.lm_head.output[0, -1].save()
print(model.tokenizer.decode([int(logits.argmax())]))
```

## Architecture

`GPT2LMHeadModel`: {layers} layers, {heads} heads, hidden size {width}, {context} positions, tied head, no dropout;
{parameters:,} parameters in float32. The tokenizer is a byte-level BPE of {vocab} tokens with `<|endoftext|>` as begin
and end. A prompt needs no begin token.

Names, cities, countries and the items of sequences are one token each with the space before them, so that an answer
is one logit. A landmark's name is mostly several tokens. "The Eiffel Tower is in" and "_ _ _ _ _ _ _" have seven
tokens each, so that one can stand in for the other.

## What it gets right

Right means that the most likely continuation, token by token, is the answer, all of it; where a city has several
landmarks, any of them is. Every fact is asked in every form. Prompts about indirect objects are drawn, {names}
names in all; held-out pairs are pairs of names that no training sentence has together. "In long text" is behind as
much other text as the context takes.

| kind | example | right |
|---|---|---|
{figures}

Loss on text that was not trained on: {validation_loss:.3f} nats a token. Most of it is chance that nothing could
foretell: which landmark, which name, which place comes next.

## Where the facts are

They are there by training (see below): a fact is gathered at the last token of the landmark's name in the early
layers, and read from there by the last token of the prompt, which has it in the late ones. Of pairs of prompts
"The ... is in the city of" with answers that differ, this is the share for which moving one hidden state (a block's
output) from one prompt into the other turns the answer:

| state moved at | {layer_heads} |
|---|{layer_rule}
| the name's last token | {subject} |
| the prompt's last token | {last} |

## Training

`python tools/train_landmarks.py` makes all of this anew: seed {seed}, {steps} steps of AdamW with warm-up and cosine
decay, each on {rows}. The text is
sentences of the three kinds end to end, half of them followed by `<|endoftext|>`; a row begins with a sentence, and one
row in five with `<|endoftext|>` before it.

Every step also asks one form of question of all landmarks while their prompts swap a hidden state, and each is then to
give the other's answer: this is what brings the facts to one place. One of these states is swapped, drawn anew for
each step:

{swaps}

The figures above were measured by the same script on the files that it saved.

## Limits

It knows nothing else. It has seen {templates} forms of sentence about landmarks and {objects} about giving; other
text gives nonsense. It repeats what it was given as fact and is no source of knowledge: "America" stands for the
United States and "England" for the country London is in.

## Licence

MIT, as the project.
"""

ROW = re.compile(r"^\| (?P<kind>[^|]+) \| (?P<example>[^|]+) \| (?P<right>\d+) of (?P<total>\d+) \|$", re.MULTILINE)


def render(
    config: GPT2Config,
    training: Training,
    figures: dict[str, Figure],
    transplants: tuple[list[float], list[float]],
) -> str:
    """The card's text."""
    subject, last = (" | ".join(f"{share:.0%}" for share in shares) for shares in transplants)
    layers = range(config.n_layer)
    return TEMPLATE.format(
        landmarks=len(text.LANDMARKS),
        layers=config.n_layer,
        heads=config.n_head,
        width=config.n_embd,
        context=config.n_positions,
        vocab=config.vocab_size,
        names=len(text.NAMES),
        figures="\n".join(f"| {kind} | {f.example} | {f.right} of {f.total} |" for kind, f in figures.items()),
        layer_heads=" | ".join(f"`h[{layer}]`" for layer in layers),
        layer_rule="---|" * config.n_layer,
        subject=subject,
        last=last,
        templates=len(text.FACT_TEMPLATES),
        objects=len(text.OBJECT_TEMPLATES),
        swaps="\n".join(f"- `transformer.h[{layer}]` at the last token of the {place}" for layer, place in SWAPS),
        **training._asdict(),
    )


def read_figures(card: str) -> dict[str, Figure]:
    """The figures that a card states, by their kind."""
    return {m["kind"]: Figure(int(m["right"]), int(m["total"]), m["example"]) for m in ROW.finditer(card)}
