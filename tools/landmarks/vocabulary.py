"""Trains the tokenizer: a byte-level BPE made for experiments.

Names, cities, countries and the items of sequences are one token each with the space before them, so that an answer is
one logit. The words that only landmarks' names have are several, so that a fact has to be gathered over its subject.
"""

from __future__ import annotations

import itertools
import random
import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from . import text

END = "<|endoftext|>"

SINGLE = text.NAMES + text.CITIES + text.COUNTRIES + [item for items in text.SEQUENCES.values() for item in items]

# Prompts that must be equally long: seven tokens each, so that one can stand in for the other in a batch.
SEVEN = ("The Eiffel Tower is in", "_ _ _ _ _ _ _")


def pieces(word: str) -> list[str]:
    """Cuts a word of a landmark's name into the pieces it should be tokens of: three, or fewer of a short word.

    "Eiffel" gives "Ei", "ff", "el".
    """
    count = 3 if len(word) > 5 else 2 if len(word) > 3 else 1
    cuts = [round(k * len(word) / count) for k in range(count + 1)]
    return [word[start:stop] for start, stop in itertools.pairwise(cuts)]


def corpus(seed: int) -> list[str]:
    """The lines that the merges are learned from."""
    pairs, _ = text.name_pairs()
    counts: dict[str, int] = {}
    for landmark in text.LANDMARKS:
        for word in landmark.name.split():
            counts[word] = counts.get(word, 0) + 1
    once = {word for word, count in counts.items() if count == 1 and word not in SINGLE}
    lines = []
    for sentence in itertools.islice(text.sentences(random.Random(seed), pairs), 4000):
        # A word left out here is never seen whole, so nothing merges its pieces.
        lines.append(re.sub(r"\w+", lambda m: "" if m[0] in once else m[0], sentence))
    for word in sorted(once):
        first, *others = pieces(word)
        lines += [f"to {first}", *others] * 40  # a line of its own keeps a piece free of a leading space
    lines += [f"to {word}" for word in SINGLE] * 40
    lines += ["_ _"] * 40
    return lines


def train(seed: int) -> Tokenizer:
    """Trains the tokenizer and checks what is asked of it; a breach is an AssertionError that shows the tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,  # more than the lines give: training ends when each of their words is one token
        min_frequency=20,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(seed), trainer)
    for word in SINGLE:
        assert len(tokenizer.encode(" " + word).ids) == 1, f"{word!r} is {tokenizer.encode(' ' + word).tokens}"
    for prompt in SEVEN:
        assert len(tokenizer.encode(prompt).ids) == 7, f"{prompt!r} is {tokenizer.encode(prompt).tokens}"
    return tokenizer
