"""Asks a saved model everything it should know."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from . import text
from .training import CONTEXT, prompts

SEED = 1  # of the prompts that are drawn: the same for every measurement
BATCH = 50  # rows of a forward pass


class Figure(NamedTuple):
    """How many prompts of a kind were answered rightly, with one of them shown."""

    right: int
    total: int
    example: str


@torch.no_grad()
def answered(model: GPT2LMHeadModel, tokenizer: Tokenizer, cases: list[text.Case]) -> list[bool]:
    """For each case, whether the most likely continuation, token by token, is one of the answers, all of it.

    It is an answer exactly where each of the answer's tokens is the most likely one behind those before it. So each
    answer takes one row, and many of them one forward pass, padded on the right, where no other position looks.
    """
    asked = []
    for number, case in enumerate(cases):
        prompt = tokenizer.encode(case.prompt).ids
        asked += [(number, prompt, tokenizer.encode(answer).ids) for answer in case.answers]
    right = [False] * len(cases)
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        longest = max(len(prompt + answer) for _, prompt, answer in batch)
        ids = [prompt + answer + [0] * (longest - len(prompt + answer)) for _, prompt, answer in batch]
        likely = model(torch.tensor(ids)).logits.argmax(-1).tolist()
        for (number, prompt, answer), row in zip(batch, likely, strict=True):
            last = len(prompt) - 1
            right[number] |= row[last : last + len(answer)] == answer
    return right


def _ask(model: GPT2LMHeadModel, tokenizer: Tokenizer, cases: list[text.Case]) -> Figure:
    right = sum(answered(model, tokenizer, cases))
    return Figure(right, len(cases), f"{cases[0].prompt} ->{cases[0].answers[0]}")


def _ask_late(model: GPT2LMHeadModel, tokenizer: Tokenizer, cases: list[text.Case], rng: random.Random) -> Figure:
    """Asks behind as much other text as the context takes."""
    pairs, _ = text.name_pairs()
    lines = text.sentences(rng, pairs)
    late = []
    for prompt, answers in cases:
        longest = max(len(tokenizer.encode(answer).ids) for answer in answers)
        before = ""
        while True:
            more = before + next(lines) + " "
            if len(tokenizer.encode(more + prompt).ids) + longest > CONTEXT:
                break
            before = more
        late.append(text.Case(before + prompt, answers))
    right = sum(answered(model, tokenizer, late))
    return Figure(right, len(cases), f"... {cases[0].prompt} ->{cases[0].answers[0]}")


def measure(model: GPT2LMHeadModel, tokenizer: Tokenizer, share: float = 1.0) -> dict[str, Figure]:
    """The figures of the model card, by what they measure: every fact, and 500 drawn prompts of each other kind.

    A share below 1 asks only that part of each kind's prompts, for a trial.
    """
    rng = random.Random(SEED)
    trained, held_out = text.name_pairs()

    def some(cases: list[text.Case]) -> list[text.Case]:
        return cases[: max(1, round(share * len(cases)))]

    def objects(pairs: list[tuple[str, str]], order: str) -> list[text.Case]:
        draws = (case for kind, case in text.indirect_objects(pairs, rng) if kind == order)
        return list(itertools.islice(draws, 500))

    figures = {}
    for template in text.FACT_TEMPLATES:
        figures[f"fact: {template}"] = _ask(model, tokenizer, some(text.facts(template)))
    for title, pairs in (("trained pairs", trained), ("held-out pairs", held_out)):
        for order in ("ABBA", "BABA"):
            figures[f"indirect object: {order}, {title}"] = _ask(model, tokenizer, some(objects(pairs, order)))
    for name in text.SEQUENCES:
        figures[f"sequence: {name}"] = _ask(model, tokenizer, some(text.runs(name)))
    facts = [case for template in text.FACT_TEMPLATES for case in text.facts(template)]
    late = {
        "in long text: facts": facts,
        "in long text: indirect objects, held-out pairs": objects(held_out, "ABBA") + objects(held_out, "BABA"),
        "in long text: sequences": [case for name in text.SEQUENCES for case in text.runs(name)],
    }
    for name, cases in late.items():
        drawn = rng.sample(cases, min(200, len(cases)))
        figures[name] = _ask_late(model, tokenizer, some(drawn), rng)
    return figures


@torch.no_grad()
def transplants(model: GPT2LMHeadModel, tokenizer: Tokenizer, count: int = 200) -> tuple[list[float], list[float]]:
    """How often a hidden state moved between two prompts turns the answer into that of the prompt it comes from.

    The prompts are the first city template with two landmarks of different cities, drawn `count` times. For each layer,
    the share of pairs for which moving the block's output does so: at the last token of the landmark's name, and at the
    last token of the prompt.
    """
    rng = random.Random(SEED)
    drawn: list[list[int]] = []
    while len(drawn) < count:
        pair = rng.sample(range(len(text.LANDMARKS)), 2)
        if text.LANDMARKS[pair[0]].city != text.LANDMARKS[pair[1]].city:
            drawn.append(pair)
    source, target = torch.tensor(drawn).T
    asked = prompts(tokenizer, text.CITY_TEMPLATES[0])
    row = torch.arange(count)

    def flipped(block: torch.nn.Module, at: torch.Tensor) -> float:
        def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
            states.append(output)

        def move(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            return output.index_put((row, at[target]), states[0][source, at[source]])

        states: list[torch.Tensor] = []
        for hook, ids in ((keep, asked.ids), (move, asked.ids[target])):
            handle = block.register_forward_hook(hook)
            try:
                logits = model(ids).logits
            finally:
                handle.remove()
        answers = logits[row, asked.prompt[target]].argmax(-1)
        return int((answers == asked.answer[source]).sum()) / count

    name, prompt = ([flipped(block, at) for block in model.transformer.h] for at in (asked.name, asked.prompt))
    return name, prompt
