"""The main job in one page: look inside a model, change it, patch it, and map where a fact lives.

Run it with `make demo`, or `python examples/quickstart.py [--out DIR]`. It uses the small built-in
model, so it needs no network; give another with --model.
"""

import argparse
import pathlib

import matplotlib
import torch

import nnsight_go
from nnsight_go import LanguageModel

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLEAN = "The Eiffel Tower is in the city of"
OTHER = "The Colosseum is in the city of"


def show_next_tokens(model: LanguageModel, prompt: str, k: int = 5) -> None:
    """Prints the k most likely next tokens of a prompt."""
    with model.trace(prompt):
        probabilities = model.lm_head.output[0, -1].softmax(-1).save()
    values, ids = probabilities.topk(k)
    print(f"\n{prompt!r} continues with")
    for p, i in zip(values.tolist(), ids.tolist(), strict=True):
        bar = "#" * round(40 * p)
        print(f"  {model.tokenizer.decode([i])!r:>12}  {p:6.1%}  {bar}")


def answer(model: LanguageModel, logits: torch.Tensor) -> str:
    return repr(model.tokenizer.decode([int(logits.argmax())]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nnsight-go/landmarks")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/demo"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    model = LanguageModel(args.model, device_map="auto", dispatch=True)
    layers = len(model.transformer.h)
    print(f"{args.model}: {layers} layers, engine {nnsight_go.__version__}")

    # 1. Look: the next-token table.
    show_next_tokens(model, CLEAN)

    # 2. Change: zero what one layer's MLP adds to the residual stream.
    with model.trace(CLEAN):
        model.transformer.h[0].mlp.output[:] = 0
        knocked_out = model.lm_head.output[0, -1].save()
    print(f"\nwith the first MLP silenced the answer is {answer(model, knocked_out)}")

    # 3. Transplant: put the hidden state of one prompt into another, in one forward pass.
    middle = layers // 2
    clean_ids, other_ids = model.tokenizer.encode(CLEAN), model.tokenizer.encode(OTHER)
    with model.trace() as tracer:
        with tracer.invoke(CLEAN):
            state = model.transformer.h[middle].output[0][:, -1, :]
            clean = model.lm_head.output[0, -1].save()
        with tracer.invoke(OTHER):
            other = model.lm_head.output[0, -1].save()
        with tracer.invoke(OTHER):
            model.transformer.h[middle].output[0][:, -1, :] = state
            patched = model.lm_head.output[0, -1].save()
    print(f"\n{OTHER!r} -> {answer(model, other)}")
    print(f"the same with layer {middle}'s last state of the other prompt -> {answer(model, patched)}")

    # 4. Map: patch every layer and position of the clean run into the other prompt, all in one trace.
    paris, rome = int(clean.argmax()), int(other.argmax())
    positions = range(1, min(len(clean_ids), len(other_ids)) + 1)  # counted from the end, where the prompts agree
    restored = {}
    with model.trace() as tracer:
        with tracer.invoke(CLEAN):
            states = [model.transformer.h[layer].output[0] for layer in range(layers)]
        for layer in range(layers):
            for back in positions:
                with tracer.invoke(OTHER):
                    model.transformer.h[layer].output[0][:, -back, :] = states[layer][:, -back, :]
                    logits = model.lm_head.output[0, -1]
                    restored[layer, back] = (logits[paris] - logits[rome]).save()
    worst = float(other[paris] - other[rome])
    best = float(clean[paris] - clean[rome])
    grid = torch.tensor([[float(restored[layer, back]) for back in reversed(positions)] for layer in range(layers)])
    grid = (grid - worst) / (best - worst)

    tokens = [model.tokenizer.decode([i]) for i in other_ids][-len(positions) :]
    figure, axes = plt.subplots(figsize=(1 + 0.8 * len(positions), 1 + 0.55 * layers), layout="constrained")
    image = axes.imshow(grid, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", origin="lower")
    axes.set_xticks(range(len(tokens)), [repr(t)[1:-1] for t in tokens], rotation=45, ha="right")
    axes.set_yticks(range(layers), range(layers))
    axes.set_xlabel(f"position patched in {OTHER!r}")
    axes.set_ylabel("layer")
    clean_name, other_name = answer(model, clean), answer(model, other)
    axes.set_title(f"How far one hidden state turns {other_name} into {clean_name}")
    figure.colorbar(image, label="logit difference restored")
    path = args.out / "patching.png"
    figure.savefig(path, dpi=150)
    print(f"\n{layers * len(positions)} patches in one trace; heatmap: {path.resolve()}")


if __name__ == "__main__":
    main()
