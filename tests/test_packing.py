"""Each distinct token computed once, and only those that are looked at: equal to running each invoke alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch

from nnsight_go import InputError, NNsight, OutOfOrderError
from references import Pair, close, edits, main, tensor_of

pytestmark = pytest.mark.usefixtures("nothing_stays")

Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Change:
    """One line: the tokens of a slice of the positions become a part or a multiple of themselves, or are replaced."""

    path: str
    where: slice | int
    how: str  # "scale", "zero", "whole", "clone"
    factor: float

    def on(self, x: torch.Tensor) -> torch.Tensor:
        """What becomes of a tensor [rows, tokens, ...]."""
        out = x.clone()
        if self.how == "whole":
            return out * self.factor
        out[:, self.where] = out[:, self.where] * (0 if self.how == "zero" else self.factor)
        return out


def write(pair: Pair, change: Change) -> None:
    """The line, as a user writes it."""
    envoy, x = pair.model.get(change.path), tensor_of(pair, change.path)
    if change.how == "scale":
        x[:, change.where] *= change.factor
    elif change.how == "zero":
        x[:, change.where] = 0
    else:
        new = x * change.factor
        if change.how == "clone":
            new = x.clone()
            new[:, change.where] = new[:, change.where] * change.factor
        envoy.output = (new, *envoy.output[1:]) if isinstance(envoy.output, tuple) else new


def sites(pair: Pair) -> list[str]:
    """Paths of modules in the order in which they run, once a layer."""
    inner = ["mlp", ""] if pair.blocks == "transformer.h" else ["self_attn.v_proj", "mlp", ""]
    return [f"{pair.blocks}.{i}.{name}".rstrip(".") for i in range(len(pair.layers)) for name in inner]


def random_changes(pair: Pair, tokens: int, draw: random.Random) -> list[Change]:
    found = []
    for path in sites(pair):
        if draw.random() < 0.25:
            at = draw.randrange(tokens)
            where = draw.choice([at, at - tokens, slice(at, None), slice(None, at + 1)])
            found.append(
                Change(path, where, draw.choice(["scale", "zero", "whole", "clone"]), draw.choice([-1.5, 0.5, 3]))
            )
    return found


LOOKS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x,
    lambda x: x[:, -1],
    lambda x: x[0, -1],
    lambda x: x[..., -1, :],
    lambda x: x[:, -1:, :3],
    lambda x: x[:, 0],
    lambda x: x[0],
    lambda x: x.softmax(-1)[:, -1],
    lambda x: x[:, -1].argmax(-1).float(),
]


@pytest.mark.parametrize("seed", range(25))
def test_invokes_that_are_alike(either: Pair, seed: int) -> None:
    draw = random.Random(seed)
    prompts: list[list[int]] = []
    for _ in range(draw.choice([1, 2, 3, 6])):
        known = (
            draw.choice(prompts) if prompts and draw.random() < 0.8 else either.ids(draw.choice([1, 5, 9]), seed=seed)
        )
        kept = draw.choice([len(known), draw.randrange(1, len(known) + 1)])
        more = either.ids(draw.choice([1, 3]), seed=draw.randrange(100)) if draw.random() < 0.4 else []
        prompts.append(known[:kept] + more)
    if draw.random() < 0.5:  # equally long, so that rows are not padded
        n = min(map(len, prompts))
        prompts = [p[:n] for p in prompts]
    changes = [random_changes(either, len(p), draw) if draw.random() < 0.8 else [] for p in prompts]
    path = draw.choice(sites(either))
    looks = [draw.choice(LOOKS) for _ in prompts]
    logits, states = [], []
    with either.model.trace() as tracer:
        for ids, lines, look in zip(prompts, changes, looks, strict=True):
            with tracer.invoke(ids):
                for change in lines:
                    if sites(either).index(change.path) > sites(either).index(path) and len(states) <= len(logits):
                        states.append(look(tensor_of(either, path)).save())
                    write(either, change)
                if len(states) <= len(logits):
                    states.append(look(tensor_of(either, path)).save())
                logits.append(look(either.model.lm_head.output).save())
    for ids, lines, look, got, state in zip(prompts, changes, looks, logits, states, strict=True):
        by_path: dict[str, Edit] = {f"{c.path}.output": c.on for c in lines}
        seen = either.run(ids, edits(by_path))
        close(got, look(main(seen, "lm_head")))
        close(state, look(main(seen, path)))


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("rows", [1, 3])
def test_some_tokens_of_a_prompt(either: Pair, look: Callable[[torch.Tensor], torch.Tensor], rows: int) -> None:
    ids = [either.ids(8) for _ in range(rows)]
    ids[-1] = ids[-1][:4] + [1] * 4
    middle = f"{either.blocks}.1"
    with either.model.trace(ids):
        state = look(tensor_of(either, middle)).save()
        logits = look(either.model.lm_head.output).save()
        lens = look(either.model.lm_head(tensor_of(either, middle))).save()
    seen = either.run(ids)
    close(state, look(main(seen, middle)))
    close(logits, look(main(seen, "lm_head")))
    close(lens, look(either.hf.lm_head(main(seen, middle))))


@pytest.mark.parametrize("mask", [[[1, 1, 1, 1], [0, 0, 1, 1]], [[1, 1, 1, 1], [1, 0, 1, 1]]])
def test_padded_rows_of_one_invoke(either: Pair, mask: list[list[int]]) -> None:
    ids = torch.tensor([either.ids(4)] * 2)
    with either.model.trace(ids, attention_mask=torch.tensor(mask)):
        last = either.model.lm_head.output[:, -1].save()
    with torch.no_grad():
        position = (torch.tensor(mask).cumsum(-1) - 1).clamp_min(0)
        want = either.hf(input_ids=ids, attention_mask=torch.tensor(mask), position_ids=position).logits
    close(last, want[:, -1])


def test_a_replacement_of_other_sizes(gpt2_pair: Pair) -> None:
    either = gpt2_pair  # Llama's position embeddings would not fit
    ids = either.ids(6)
    short = either.ids(3)
    with either.model.trace(short):
        embedded = tensor_of(either, f"{either.blocks}.0").save()
    with either.model.trace() as tracer:
        with tracer.invoke(ids):
            either.model.get(f"{either.blocks}.1").input = embedded
            one = either.model.lm_head.output[:, -1].save()
        with tracer.invoke(ids):
            other = either.model.lm_head.output[:, -1].save()
    with either.model.trace(ids):
        either.model.get(f"{either.blocks}.1").input = embedded
        alone = either.model.lm_head.output.save()
    assert alone.shape[1] == 3
    close(one, alone[:, -1])
    close(other, main(either.run(ids), "lm_head")[:, -1])


def test_results_of_equal_tokens_do_not_share_memory(either: Pair) -> None:
    ids = either.ids(5)
    with either.model.trace() as tracer:
        saved = []
        for _ in range(3):
            with tracer.invoke(ids):
                saved.append(either.model.lm_head.output[:, -1].save())
    want = saved[1].clone()
    saved[0].zero_()
    close(saved[1], want)
    close(saved[2], want)


def sweep(pair: Pair, ids: list[int]) -> tuple[list[torch.Tensor], str]:
    """One token of one block's hidden states doubled in each invoke; the last logits, and what was computed."""
    saved = []
    with pair.model.trace() as tracer:
        for layer in range(len(pair.layers)):
            for position in range(len(ids)):
                with tracer.invoke(ids):
                    pair.layers[layer].output[0][:, position] *= 2
                    saved.append(pair.model.lm_head.output[:, -1].save())
    return saved, tracer.explain()


def test_a_sweep_shares_what_comes_before_each_change(either: Pair) -> None:
    ids = either.ids(6)
    shared, told = sweep(either, ids)
    assert f"{either.blocks}.0: 6\n" in told, told
    either.model.share_tokens = False
    try:
        assert not either.model.share_tokens
        apart, told = sweep(either, ids)
    finally:
        either.model.share_tokens = True
    assert "alone" not in told
    for got, want in zip(shared, apart, strict=True):
        close(got, want)


def test_a_trace_tells_what_it_computes(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    with model.trace(gpt2_pair.ids(5)) as tracer:
        model.transformer.h[0].output[0].save()
    assert tracer.explain().splitlines()[0] == "forward pass 0: 1 row of 5 tokens"
    assert "transformer.h.1" in tracer.explain() and "lm_head" in tracer.explain()
    with model.trace(gpt2_pair.ids(5)) as tracer:
        model.lm_head.output[:, -1].save()
    assert "lm_head: 1\n" in tracer.explain()


def test_a_wrapped_module_has_no_plan_to_tell() -> None:
    net = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with net.trace(torch.ones(1, 2)) as tracer:
        net.output.save()
    with pytest.raises(InputError, match="forward pass is Python's"):
        tracer.explain()


def test_a_value_that_is_assigned_back(either: Pair) -> None:
    ids = either.ids(5)
    with either.model.trace() as tracer:
        with tracer.invoke(ids):
            state = either.layers[1].output[0]
            either.layers[1].output = (state * 2,)
            either.layers[1].output = (state,)
            back = either.model.lm_head.output[:, -1].save()
        for _ in range(4):
            with tracer.invoke(ids):
                either.model.lm_head.output[:, -1].save()
    close(back, main(either.run(ids), "lm_head")[:, -1])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.float()[:, -1],
        lambda x: x.transpose(1, 2)[:, :, -1],
        lambda x: x.unsqueeze(2)[:, -1],
        lambda x: x.expand(-1, -1, -1)[:, -1],
    ],
)
def test_views_of_lines_are_their_invokes_own(either: Pair, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    ids, saved = either.ids(5), []
    with either.model.trace() as tracer:
        for _ in range(3):
            with tracer.invoke(ids):
                saved.append(view(tensor_of(either, f"{either.blocks}.1")).save())
    assert len({x.untyped_storage().data_ptr() for x in saved}) == 3


def test_a_change_that_comes_too_late_is_noticed(either: Pair) -> None:
    with pytest.raises(OutOfOrderError), either.model.trace([either.ids(5)] * 3):
        last = either.layers[0].output[0][:, -1]
        either.model.lm_head.output[:, -1].save()
        last[:] = 0


def test_padding_is_no_token(gpt2_pair: Pair) -> None:
    for more in (0, 7):  # the schedule of the first is kept
        a, b = [5], [5, more]
        with gpt2_pair.model.trace() as tracer:
            with tracer.invoke(a):
                gpt2_pair.model.lm_head.output[:, -1].save()
            with tracer.invoke(b):
                last = gpt2_pair.model.lm_head.output[:, -1].save()
        close(last, main(gpt2_pair.run(b), "lm_head")[:, -1])
