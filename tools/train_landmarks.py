"""Trains the built-in model, nnsight-go/landmarks, from nothing: tokenizer, weights, model card.

    python tools/train_landmarks.py [--out DIR] [--steps N] [--seed N] [--threads N]

Needs torch, transformers and tokenizers, no network and no GPU, and takes about a quarter of an hour on two cores that
do nothing else. The same seed gives the same text and the same tokenizer, and with the same torch, machine and number
of threads the same weights. The card's figures are measured on the files that were saved; where one is below 95 % the
script exits with 1, and the model must not be shipped. With fewer than 100 steps it is a trial: all parts run, on
little, and nothing is asked of the result.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import torch
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

from landmarks import card, measuring, training, vocabulary

OUT = pathlib.Path(__file__).parents[1] / "python" / "nnsight_go" / "models" / "landmarks"
WEIGHTS_LIMIT = 5_000_000  # bytes of model.safetensors: it travels in the package
ENOUGH = 0.95


def save(directory: pathlib.Path, model: GPT2LMHeadModel, tokenizer: Tokenizer) -> None:
    """Writes the files that transformers and nnsight-go open."""
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    weights = directory / "model.safetensors"
    weights.chmod(0o644)  # it is written for its owner alone
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "add_prefix_space": False,
        "bos_token": vocabulary.END,
        "clean_up_tokenization_spaces": False,
        "eos_token": vocabulary.END,
        "model_max_length": training.CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    size = weights.stat().st_size
    assert size <= WEIGHTS_LIMIT, f"{weights.name} has {size:,} bytes, over {WEIGHTS_LIMIT:,}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="directory to write to")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    torch.set_num_threads(args.threads)
    trial = args.steps < 100

    tokenizer = vocabulary.train(args.seed)
    save(args.out, training.train(tokenizer, args.steps, args.seed), tokenizer)

    model = GPT2LMHeadModel.from_pretrained(args.out).eval()
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    figures = measuring.measure(model, tokenizer, share=0.02 if trial else 1.0)
    transplants = measuring.transplants(model, tokenizer, count=5 if trial else 200)
    facts = card.Training(
        seed=args.seed,
        steps=args.steps,
        rows=f"{training.SHORT_ROWS} rows of {training.SHORT} tokens, every other on {training.LONG_ROWS} of "
        f"{training.CONTEXT}",
        parameters=sum(p.numel() for p in model.parameters()),
        validation_loss=training.validation_loss(model, tokenizer, args.seed + 1, count=10 if trial else 200),
    )
    (args.out / "README.md").write_text(card.render(model.config, facts, figures, transplants))

    print(f"validation loss {facts.validation_loss:.3f}")
    for kind, figure in figures.items():
        print(f"{figure.right:4d} of {figure.total:4d}  {kind}")
    for place, shares in zip(("name", "prompt"), transplants, strict=True):
        print(f"moved at the {place}'s last token: " + " ".join(f"{share:4.0%}" for share in shares))
    short = [kind for kind, figure in figures.items() if figure.right < ENOUGH * figure.total]
    for layer, place in training.SWAPS:
        if transplants[place == "prompt"][layer] < ENOUGH:
            short.append(f"moving h[{layer}] at the {place}'s last token")
    if short and not trial:
        print("below 95 %: " + "; ".join(short), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
