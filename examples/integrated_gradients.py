"""Which words of a prompt make its answer, by integrated gradients of the embeddings.

Integrated gradients (Sundararajan, Taly, Yan 2017) go from embeddings that say nothing to those of the
prompt, in steps, and add up what each word contributes on the way. They are complete: the contributions sum
to the difference of the answer's log probability between both ends.

    python examples/integrated_gradients.py [--steps N] [--model NAME] [PROMPT]
"""

import argparse

import torch

from nnsight_go import LanguageModel


def contributions(model: LanguageModel, prompt: str, steps: int = 100) -> tuple[torch.Tensor, float]:
    """What each token of a prompt contributes to the log probability of the likeliest answer.

    Args:
        model: a GPT-2.
        prompt: a text.
        steps: into how many the way is cut; the error falls with their square.

    Returns:
        ``[seq]``, and the difference of log probabilities that it sums up to.
    """
    with model.trace(prompt):
        embeddings = model.transformer.wte.output.save()
        answer = model.lm_head.output[0, -1].argmax(-1).save()
    baseline = embeddings.mean(1, keepdim=True).expand_as(embeddings)

    total = torch.zeros_like(embeddings)
    ends = []
    for step in range(steps + 1):
        point = baseline + (embeddings - baseline) * (step / steps)
        with model.trace(prompt):
            model.transformer.wte.output = point
            words = model.transformer.wte.output
            log_probability = model.lm_head.output[0, -1].log_softmax(-1)[answer]
            with log_probability.backward():
                gradient = words.grad.save()
            ends.append(log_probability.save())
        total += gradient * (0.5 if step in (0, steps) else 1.0) / steps  # the trapezoidal rule
    return ((embeddings - baseline) * total).sum((0, 2)), float(ends[-1] - ends[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="The Eiffel Tower is in the city of")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--model", default="nnsight-go/landmarks")
    args = parser.parse_args()
    model = LanguageModel(args.model, device_map="auto", dispatch=True)

    found, whole = contributions(model, args.prompt, args.steps)
    widest = float(found.abs().max())
    for token, value in zip(model.tokenizer.encode(args.prompt), found.tolist(), strict=True):
        bar = ("+" if value > 0 else "-") * round(30 * abs(value) / widest)
        print(f"{model.tokenizer.decode([token])!r:>12} {value:+8.3f}  {bar}")
    print(f"{'sum':>12} {float(found.sum()):+8.3f}  of a difference of {whole:+.3f}")


if __name__ == "__main__":
    main()
