"""Asks a saved model everything it should know."""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from . import text
from .training import CONTEXT

SEED = 1  # of the prompts that are drawn: the same for every measurement


class Figure(NamedTuple):
    """How many prompts of a kind were answered rightly, with one of them shown."""

    right: int
    total: int
    example: str


@torch.no_grad()
def is_right(model: GPT2LMHeadModel, tokenizer: Tokenizer, case: text.Case, before: str = "") -> bool:
    """Whether the most likely continuation, token by token, is one of the answers, all of it."""
    answers = [tokenizer.encode(answer).ids for answer in case.answers]
    ids = tokenizer.encode(before + case.prompt).ids
    given: list[int] = []
    while answers := [answer for answer in answers if answer[: len(given)] == given]:
        if given in answers:
            return True
        given.append(int(model(torch.tensor([ids + given])).logits[0, -1].argmax()))
    return False


def _ask(model: GPT2LMHeadModel, tokenizer: Tokenizer, cases: list[text.Case]) -> Figure:
    right = sum(is_right(model, tokenizer, case) for case in cases)
    return Figure(right, len(cases), f"{cases[0].prompt} ->{cases[0].answers[0]}")


def _ask_late(model: GPT2LMHeadModel, tokenizer: Tokenizer, cases: list[text.Case], rng: random.Random) -> Figure:
    """Asks behind as much other text as the context takes."""
    pairs, _ = text.name_pairs()
    lines = text.sentences(rng, pairs)
    right = 0
    for case in cases:
        longest = max(len(tokenizer.encode(answer).ids) for answer in case.answers)
        before = ""
        while True:
            more = before + next(lines) + " "
            if len(tokenizer.encode(more + case.prompt).ids) + longest > CONTEXT:
                break
            before = more
        right += is_right(model, tokenizer, case, before)
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


def _run(
    model: GPT2LMHeadModel, ids: list[int], patch: tuple[int, int, torch.Tensor] | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Runs the model on one row; a patch (layer, position, state [hidden]) replaces one state of a block's output.

    Returns logits [1, S, vocab] and each block's output [1, S, hidden].
    """
    states: list[torch.Tensor] = []

    def hook(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        if patch is not None and patch[0] == len(states):
            output = output.clone()
            output[0, patch[1]] = patch[2]
        states.append(output)
        return output

    handles = [block.register_forward_hook(hook) for block in model.transformer.h]
    try:
        return model(torch.tensor([ids])).logits, states
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def transplants(model: GPT2LMHeadModel, tokenizer: Tokenizer, count: int = 200) -> tuple[list[float], list[float]]:
    """How often a hidden state moved between two prompts turns the answer into that of the prompt it comes from.

    The prompts are the first city template with two landmarks of different cities, drawn `count` times. For each layer,
    the share of pairs for which moving the block's output does so: at the last token of the landmark's name, and at the
    last token of the prompt.
    """
    rng = random.Random(SEED)
    template = text.CITY_TEMPLATES[0]
    layers = model.transformer.h
    flips = [[0] * len(layers), [0] * len(layers)]
    for _ in range(count):
        while True:
            source, target = rng.sample(text.LANDMARKS, 2)
            if source.city != target.city:
                break
        ids = {}
        ends = {}
        for landmark in (source, target):
            head, _, tail = template.partition("{landmark}")
            subject = tokenizer.encode(head + landmark.name).ids
            ids[landmark] = subject + tokenizer.encode(tail.format(city="").rstrip()).ids
            ends[landmark] = (len(subject) - 1, len(ids[landmark]) - 1)
        (answer,) = tokenizer.encode(" " + source.city).ids
        states = _run(model, ids[source])[1]
        for place, layer in itertools.product((0, 1), range(len(layers))):
            patch = (layer, ends[target][place], states[layer][0, ends[source][place]])
            logits, _ = _run(model, ids[target], patch)
            flips[place][layer] += int(logits[0, -1].argmax()) == answer
    return [n / count for n in flips[0]], [n / count for n in flips[1]]
