"""Several inputs in one trace: each as if it ran alone, and values from one to the next."""

from __future__ import annotations

import pytest
import torch

from nnsight_go import InputError
from references import Pair, close, edits, in_place, main, tensor_of

pytestmark = pytest.mark.usefixtures("nothing_stays")


def test_two_prompts(either: Pair) -> None:
    a, b = either.ids(7), either.ids(4, seed=2)
    with either.model.trace() as tracer:
        with tracer.invoke(a):
            first = either.model.lm_head.output.save()
        with tracer.invoke(b):
            second = either.model.lm_head.output.save()
    close(first, main(either.run(a), "lm_head"))
    close(second, main(either.run(b), "lm_head"))


def test_an_edit_in_one_invoke_is_not_seen_by_others(either: Pair) -> None:
    lengths = (3, 7, 1, 5)
    prompts = [either.ids(n, seed=n) for n in lengths]
    path = f"{either.blocks}.1.output"
    got = []
    with either.model.trace() as tracer:
        for i, ids in enumerate(prompts):
            with tracer.invoke(ids):
                if i == 1:
                    either.layers[1].output[0][:, -1] = 0
                if i == 2:
                    either.layers[1].output[0] = either.layers[1].output[0] * 3
                if i == 3:
                    either.layers[2].input = torch.ones(1, 5, either.width)
                got.append(either.model.lm_head.output.save())
    wants = [
        None,
        edits({path: in_place(lambda x: x[:, -1].zero_())}),
        edits({path: lambda x: x * 3}),
        edits({f"{either.blocks}.2.input": torch.ones_like}),
    ]
    for ids, edit, logits in zip(prompts, wants, got, strict=True):
        close(logits, main(either.run(ids, edit), "lm_head"))


def test_shapes_and_strides_are_those_of_the_prompt_alone(either: Pair) -> None:
    names = [f"{either.blocks}.1", f"{either.blocks}.1.mlp", "lm_head", f"{either.blocks}.1.{either.attention}"]
    ids = either.ids(4)
    with either.model.trace(ids):
        alone = [tensor_of(either, name).save() for name in names]
    with either.model.trace() as tracer:
        with tracer.invoke(either.ids(7)):
            either.model.lm_head.output.save()
        with tracer.invoke(ids):
            beside = [tensor_of(either, name).save() for name in names]
            shapes = [x.shape for x in beside]
    for a, b, shape in zip(alone, beside, shapes, strict=True):
        assert a.shape == b.shape == shape
        assert [n for n, size in zip(a.stride(), a.shape, strict=True) if size > 1] == [
            n for n, size in zip(b.stride(), b.shape, strict=True) if size > 1
        ]
        close(b, a, tolerance=1e-5)


def test_a_value_goes_to_the_same_layer_of_a_later_invoke(either: Pair) -> None:
    a, b = either.ids(7), either.ids(4, seed=2)
    path = f"{either.blocks}.1"
    with either.model.trace() as tracer:
        with tracer.invoke(a):
            state = either.layers[1].output[0][:, -1, :]
        with tracer.invoke(b):
            either.layers[1].output[0][:, -1, :] = state
            out = either.model.lm_head.output.save()
    vector = main(either.run(a), path)[:, -1]
    want = either.run(b, edits({f"{path}.output": in_place(lambda x: x[:, -1].copy_(vector))}))
    close(out, main(want, "lm_head"))


@pytest.mark.parametrize(("source", "target"), [(0, 2), (2, 0), (1, 1), (2, 1)])
def test_values_go_up_and_down(either: Pair, source: int, target: int) -> None:
    """From a layer of one invoke to an earlier or later layer of the next."""
    a, b = either.ids(6), either.ids(6, seed=2)
    with either.model.trace() as tracer:
        with tracer.invoke(a):
            state = either.layers[source].output[0]
            clean = either.model.lm_head.output.save()
        with tracer.invoke(b):
            either.layers[target].output[0] = state * 2
            out = either.model.lm_head.output.save()
    value = main(either.run(a), f"{either.blocks}.{source}") * 2
    want = either.run(b, edits({f"{either.blocks}.{target}.output": lambda x: value}))
    close(clean, main(either.run(a), "lm_head"))
    close(out, main(want, "lm_head"))


def test_a_chain_of_invokes_from_the_last_layer_to_the_first(either: Pair) -> None:
    """Each needs the end of the one before it: as many passes as there are links."""
    prompts = [either.ids(5, seed=n) for n in range(4)]
    outs: list[torch.Tensor] = []
    with either.model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                if outs:
                    either.layers[0].output[0][:, 0] = outs[-1]
                outs.append(either.layers[2].output[0][:, -1].save())
    vector = None
    for ids, got in zip(prompts, outs, strict=True):
        change = in_place(lambda x, v=vector: x[:, 0].copy_(v)) if vector is not None else None
        want = either.run(ids, edits({f"{either.blocks}.0.output": change}) if change else None)
        vector = main(want, f"{either.blocks}.2")[:, -1]
        close(got, vector)


def test_a_late_patch_nobody_looks_at(either: Pair) -> None:
    """An early write that needs a late value of another invoke, and whose effect nobody asks for."""
    with either.model.trace() as tracer:
        with tracer.invoke(either.ids(5)):
            late = either.layers[2].output[0].save()
        with tracer.invoke(either.ids(3, seed=2)):
            either.layers[0].output[0].add_(late[:, -1:])
    close(late, main(either.run(either.ids(5)), f"{either.blocks}.2"))


def test_lines_between_invokes_belong_to_the_one_before(either: Pair) -> None:
    a, b = either.ids(6), either.ids(6, seed=2)
    with either.model.trace() as tracer:
        with tracer.invoke(a):
            x = either.layers[1].output[0]
        doubled = (x * 2).save()
        with tracer.invoke(b):
            y = either.layers[1].output[0]
        both = torch.stack([x, y]).mean().save()
    wants = [main(either.run(ids), f"{either.blocks}.1") for ids in (a, b)]
    close(doubled, wants[0] * 2)
    close(both, torch.stack(wants).mean())


def test_an_invoke_without_input_sees_the_whole_batch(either: Pair) -> None:
    a, b = either.ids(5), either.ids(5, seed=2)
    with either.model.trace() as tracer:
        with tracer.invoke(a):
            pass
        with tracer.invoke(b):
            pass
        with tracer.invoke():
            shape = either.layers[1].output[0].shape
            either.layers[1].output[0][1] *= 2
            everything = either.model.lm_head.output.save()
    assert shape == (2, 5, either.width)
    close(everything[:1], main(either.run(a), "lm_head"))
    doubled = edits({f"{either.blocks}.1.output": lambda x: x * 2})
    close(everything[1:], main(either.run(b, doubled), "lm_head"))


def test_the_whole_batch_of_different_lengths_is_padded_on_the_left(either: Pair) -> None:
    a, b = either.ids(6), either.ids(2, seed=2)
    with either.model.trace() as tracer:
        with tracer.invoke(a):
            first = either.model.lm_head.output.save()
        with tracer.invoke(b):
            second = either.model.lm_head.output.save()
        with tracer.invoke():
            last = either.model.lm_head.output[:, -1].save()
            everything = either.model.lm_head.output.save()
    assert everything.shape[:2] == (2, 6)
    close(last, torch.cat([first[:, -1], second[:, -1]]))
    close(everything[1:, -2:], main(either.run(b), "lm_head"))


def test_rows_of_one_invoke(either: Pair) -> None:
    rows = [either.ids(4, seed=1), either.ids(4, seed=2)]
    with either.model.trace(rows):
        either.layers[1].output[0][0] = 0
        out = either.model.lm_head.output.save()
    want = either.run(rows, edits({f"{either.blocks}.1.output": in_place(lambda x: x[0].zero_())}))
    close(out, main(want, "lm_head"))


def test_a_forced_value_decides_about_the_next_invoke(either: Pair) -> None:
    with either.model.trace() as tracer:
        with tracer.invoke(either.ids(4)):
            best = either.model.lm_head.output[0, -1].argmax()
        with tracer.invoke([*either.ids(4), int(best)]):
            out = either.model.lm_head.output.save()
    token = int(main(either.run(either.ids(4)), "lm_head")[0, -1].argmax())
    close(out, main(either.run([*either.ids(4), token]), "lm_head"))


@pytest.mark.parametrize("beside", [False, True])
def test_a_replacement_of_another_size(either: Pair, beside: bool) -> None:
    a, b = either.ids(6), either.ids(3, seed=2)
    path = f"{either.blocks}.2.mlp.output"
    head = either.run(a, edits({"lm_head.input": lambda x: x[:, -2:]}))
    inside = either.run(b, edits({path: lambda x: x[:, -1:]}))
    outs = []
    with either.model.trace() as tracer:
        with tracer.invoke(a):
            either.model.lm_head.input = either.model.lm_head.input[:, -2:]
            outs.append(either.model.lm_head.output.save())
        if beside:
            with tracer.invoke(b):
                either.layers[2].mlp.output = either.layers[2].mlp.output[:, -1:]
                outs.append(either.model.lm_head.output.save())
            with tracer.invoke(a):
                outs.append(either.model.lm_head.output.save())
    wants = [head, inside, either.run(a)]
    for got, want in zip(outs, wants, strict=beside):
        close(got, main(want, "lm_head"))


def test_what_invokes_may_not(gpt2_pair: Pair) -> None:
    model, ids = gpt2_pair.model, gpt2_pair.ids()
    with pytest.raises(InputError, match="outside of every invoke"), model.trace():
        gpt2_pair.layers[1].output  # noqa: B018
    with (
        pytest.raises(InputError, match="cannot begin inside another one"),
        model.trace() as tracer,
        tracer.invoke(ids),
        tracer.invoke(ids),
    ):
        pass
    with pytest.raises(InputError, match="has an input already"), model.trace(ids) as tracer, tracer.invoke(ids):
        pass
    with pytest.raises(InputError, match="there is none yet"), model.trace() as tracer, tracer.invoke():
        pass
    with pytest.raises(InputError, match="cannot begin inside another"), model.trace(ids), model.trace(ids):
        pass
    with pytest.raises(InputError, match="already used"), model.trace() as tracer:
        with tracer.invoke(ids):
            pass
        with tracer.invoke():
            gpt2_pair.layers[1].output[0].shape  # noqa: B018
        with tracer.invoke(ids):
            pass
    with model.trace() as tracer:
        invoke = tracer.invoke(ids)
        with invoke:
            out = model.lm_head.output.save()
        with pytest.raises(InputError, match="entered once"), invoke:
            pass
    close(out, main(gpt2_pair.run(ids), "lm_head"))
    with pytest.raises(InputError, match="belong into the block"), invoke:
        pass
    with pytest.raises(InputError, match="runs once"), tracer:
        pass


def test_a_trace_of_invokes_without_lines(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace() as tracer, tracer.invoke(gpt2_pair.ids()):
        pass
    with gpt2_pair.model.trace():
        pass


@pytest.mark.parametrize("prompts", [1, 2])
def test_what_the_whole_batch_changes_in_place_is_not_what_an_invoke_has_read(either: Pair, prompts: int) -> None:
    ids = either.ids(4)
    with either.model.trace() as tracer:
        for _ in range(prompts):
            with tracer.invoke(ids):
                before = either.layers[1].output[0].save()
        with tracer.invoke():
            either.layers[1].output[0][:, -1] = 0
            after = either.layers[1].output[0].save()
            logits = either.model.lm_head.output.save()
    change = edits({f"{either.blocks}.1.output": in_place(lambda x: x[:, -1].zero_())})
    close(before, main(either.run(ids), f"{either.blocks}.1"))
    close(after[:1], main(either.run(ids, change), f"{either.blocks}.1"))
    close(logits[:1], main(either.run(ids, change), "lm_head"))
