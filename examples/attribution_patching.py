"""Which hidden states carry a fact, by two forward passes and one backward pass instead of a patch each.

Attribution patching (Nanda 2023) estimates what activation patching measures: putting the state of one
prompt in place of another's changes the answer by about gradient * (one state - the other). All layers and
positions come out of one trace.

    python examples/attribution_patching.py [--out DIR] [--model NAME]
"""

import argparse
import pathlib

import matplotlib
import torch

from nnsight_go import LanguageModel

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLEAN = "The Eiffel Tower is in the city of"
OTHER = "The Rialto Bridge is in the city of"


def answers(model: LanguageModel, *prompts: str) -> list[int]:
    """The likeliest next token of each prompt."""
    found = []
    with model.trace() as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                found.append(model.lm_head.output[0, -1].argmax(-1).save())
    return [int(token) for token in found]


def attribution(model: LanguageModel, clean: str, other: str) -> torch.Tensor:
    """What each hidden state of ``clean``, put into ``other``, is estimated to add to the logit difference.

    Returns:
        ``[layer, position]``; positions are counted from the end, where the prompts agree.
    """
    right, wrong = answers(model, clean, other)
    shared = min(len(model.tokenizer.encode(p)) for p in (clean, other))
    effects = []
    with model.trace() as tracer:
        with tracer.invoke(clean):
            clean_states = [block.output[0] for block in model.transformer.h]
        with tracer.invoke(other):
            states = [block.output[0] for block in model.transformer.h]
            logits = model.lm_head.output[0, -1]
            with (logits[right] - logits[wrong]).backward():
                for state, given in zip(states, clean_states, strict=True):
                    change = (given[:, -shared:] - state[:, -shared:]).detach()
                    effects.append((state.grad[:, -shared:] * change).sum((0, 2)).save())
    return torch.stack(list(effects))


def patching(model: LanguageModel, clean: str, other: str, layer: int, back: int) -> float:
    """What that patch really adds: the measurement which the estimate stands for."""
    right, wrong = answers(model, clean, other)
    with model.trace() as tracer:
        with tracer.invoke(clean):
            state = model.transformer.h[layer].output[0][:, -back]
        with tracer.invoke(other):
            before = model.lm_head.output[0, -1].save()
        with tracer.invoke(other):
            model.transformer.h[layer].output[0][:, -back] = state
            after = model.lm_head.output[0, -1].save()
    return float((after[right] - after[wrong]) - (before[right] - before[wrong]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nnsight-go/landmarks")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/demo"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = LanguageModel(args.model, device_map="auto", dispatch=True)

    estimate = attribution(model, CLEAN, OTHER)
    layers, positions = estimate.shape
    measured = torch.tensor(
        [[patching(model, CLEAN, OTHER, layer, positions - p) for p in range(positions)] for layer in range(layers)]
    )
    tokens = [model.tokenizer.decode([i]) for i in model.tokenizer.encode(OTHER)][-positions:]

    figure, both = plt.subplots(
        1, 2, figsize=(2 + 1.2 * positions, 1 + 0.55 * layers), layout="constrained", sharey=True
    )
    for axes, grid, title in zip(
        both, (estimate, measured), ("estimated by gradients", "measured by patches"), strict=True
    ):
        most = float(grid.abs().max())
        image = axes.imshow(grid, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower")
        axes.set_xticks(range(positions), [repr(t)[1:-1] for t in tokens], rotation=45, ha="right")
        axes.set_title(title)
        figure.colorbar(image, label="logit difference gained")
    both[0].set_yticks(range(layers), range(layers))
    both[0].set_ylabel("layer")
    path = args.out / "attribution.png"
    figure.savefig(path, dpi=150)

    agreement = torch.corrcoef(torch.stack([estimate.flatten(), measured.flatten()]))[0, 1]
    print(f"{layers * positions} hidden states, estimated in one trace; correlation with patching {agreement:.2f}")
    print(f"picture: {path.resolve()}")


if __name__ == "__main__":
    main()
