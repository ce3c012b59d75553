"""What is saved is real after the block, whatever holds it; what was not saved says so."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle

import pytest
import torch

import nnsight_go
from nnsight_go import InputError, NotSavedError
from references import Pair, close, main

pytestmark = pytest.mark.usefixtures("nothing_stays")


def hidden(pair: Pair, index: int) -> torch.Tensor:
    return main(pair.run(pair.ids()), f"{pair.blocks}.{index}")


def is_real(x: object) -> bool:
    return type(x) is torch.Tensor


@dataclasses.dataclass
class Holder:
    """An object of the user's."""

    value: object


def test_whatever_holds_a_saved_value_holds_the_tensor(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        variable = gpt2_pair.layers[1].output[0].save()
        as_list, as_dict, as_tuple, held = [variable], {"h": variable}, (variable, 1), Holder(variable)
        nested = [{"deep": (variable,)}]
        by_value = variable.value
    for same in (as_list[0], as_dict["h"], as_tuple[0], held.value, nested[0]["deep"][0], by_value):
        assert same is variable
    assert is_real(variable) and isinstance(variable, torch.Tensor)
    close(variable, hidden(gpt2_pair, 1))
    assert variable.value is variable, "value is there for those used to it"


def test_saved_values_are_ordinary_tensors(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        x = gpt2_pair.layers[1].output[0].save()
        y = (x * 2).save()
    assert vars(x) == {}, "nothing of the trace is left on it"
    assert torch.equal(pickle.loads(pickle.dumps(x)), x)
    assert torch.equal(copy.deepcopy(x), x)
    assert torch.equal(x * 2, y)
    assert x.numpy().shape == tuple(x.shape)
    assert "Proxy" not in repr(x)
    x[:] = 0
    assert not x.any() and y.any()


def test_save_on_containers(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        h = [block.output[0] for block in gpt2_pair.layers].save()
        pair = (h[0] + 1, {"x": h[1] * 2, "y": [h[2], 5]}).save()
        whole = gpt2_pair.layers[2].output.save()
        table = {"logits": gpt2_pair.model.lm_head.output, "text": "kept"}.save()
        named = collections.OrderedDict(a=h[0].norm()).save()
    assert all(map(is_real, h)) and len(h) == 3
    for i, value in enumerate(h):
        close(value, hidden(gpt2_pair, i))
    assert is_real(pair[0]) and is_real(pair[1]["x"]) and pair[1]["y"][0] is h[2] and pair[1]["y"][1] == 5
    assert whole[0] is h[2]
    assert is_real(table["logits"]) and table["text"] == "kept"
    assert is_real(named["a"])


def test_save_on_numbers_and_shapes(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        x = gpt2_pair.layers[1].output[0]
        shape, count, flag, mean = x.shape.save(), len(x).save(), True.save(), float(x.mean()).save()  # type: ignore[attr-defined]
        values = x.shape.value, count.value, mean.value  # type: ignore[attr-defined]
    assert shape == (1, len(gpt2_pair.ids()), gpt2_pair.width) and type(shape) is torch.Size
    assert count == 1 and flag is True
    assert mean == pytest.approx(float(hidden(gpt2_pair, 1).mean()), abs=1e-5)
    assert values == (shape, count, mean)


def test_a_container_may_be_filled_after_it_was_saved(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        states = [].save()  # type: ignore[attr-defined]
        norms = nnsight_go.save({})
        inner: list[torch.Tensor] = []
        states.append(inner)
        for i, block in enumerate(gpt2_pair.layers):
            inner.append(block.output[0])
            norms[i] = block.output[0].norm()
    for i in range(3):
        close(inner[i], hidden(gpt2_pair, i))
        close(norms[i], hidden(gpt2_pair, i).norm())


def test_a_container_that_holds_itself(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        ring: list[object] = [gpt2_pair.layers[1].output[0]]
        ring.append(ring)
        nnsight_go.save(ring)
    assert is_real(ring[0]) and ring[1] is ring
    ring.clear()


def test_the_function_gives_what_it_is_given(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        x = gpt2_pair.layers[1].output[0]
        assert nnsight_go.save(x) is x
        assert x.save() is x and x.save() is x, "twice is once"
        outside = torch.ones(3)
        assert outside.save() is outside  # type: ignore[attr-defined]
    assert is_real(x)
    assert bool((outside == 1).all())


def test_a_value_and_its_views_and_results_can_all_be_saved(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        x = gpt2_pair.layers[1].output[0].save()
        values, indices = x.topk(3).save()  # type: ignore[attr-defined]
        parts = x.chunk(2, -1)
        nnsight_go.save(parts)
        statistics = torch.std_mean(x, -1)
        nnsight_go.save(statistics)
    want = hidden(gpt2_pair, 1)
    close(values, want.topk(3).values)
    close(indices, want.topk(3).indices)
    for got, part in zip(parts, want.chunk(2, -1), strict=True):
        close(got, part)
    close(statistics[0], torch.std_mean(want, -1)[0])


def test_using_what_was_not_saved_says_what_to_add(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        x = gpt2_pair.layers[1].output[0]
        y = x * 2
        kept = gpt2_pair.model.lm_head.output.save()
    for use in (
        lambda: x + 1, lambda: 1 + x, lambda: x.shape, lambda: x.mean(), lambda: float(y), lambda: x[0], lambda: len(x),
        lambda: x.save(), lambda: x.value, lambda: bool(x), lambda: x.numpy(), lambda: list(x), lambda: x.device,
        lambda: torch.relu(y), lambda: x.__setitem__(0, 1), lambda: x.add_(1), lambda: torch.stack([x, x]),
        lambda: kept + y, lambda: kept.copy_(y), lambda: x.dtype, lambda: f"{y:.2f}", lambda: pickle.dumps(x),
        lambda: torch.cat([kept, y]), lambda: x.to("cpu"), lambda: copy.deepcopy(x), lambda: x == y,
    ):  # fmt: skip
        with pytest.raises(NotSavedError, match=r"(.|\n)*\.save\(\)"):
            use()
    assert repr(x) == "<Proxy of transformer.h.1.output[0]: it was not saved>"
    assert "mul" in repr(y) and "it was not saved" in str(y), "showing never raises"
    assert is_real(kept)


def test_unsaved_values_of_an_earlier_trace_are_refused_in_the_next(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        x = gpt2_pair.layers[1].output[0]
    with pytest.raises(NotSavedError, match="layers|transformer.h.1.output"), gpt2_pair.model.trace(gpt2_pair.ids()):
        (gpt2_pair.layers[1].output[0] + x).save()
    with pytest.raises(NotSavedError), gpt2_pair.model.trace(gpt2_pair.ids()):
        gpt2_pair.layers[1].output[0] = x


def test_saved_values_are_used_in_the_next_trace(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        x = gpt2_pair.layers[1].output[0].save()
    with gpt2_pair.model.trace(gpt2_pair.ids(seed=3)):
        gpt2_pair.layers[1].output[0] = x
        out = gpt2_pair.model.lm_head.output.save()
    close(out, main(gpt2_pair.run(gpt2_pair.ids()), "lm_head"))


def test_save_outside_of_a_trace(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        pass
    for wrong in (lambda: nnsight_go.save([1]), lambda: [1].save(), lambda: torch.ones(1).save()):  # type: ignore[attr-defined]
        with pytest.raises(InputError, match="outside of one"):
            wrong()


def test_save_and_value_of_other_classes_stay_theirs(gpt2_pair: Pair) -> None:
    class Own(list):  # type: ignore[type-arg]
        value = "mine"

        def save(self) -> str:
            return "mine too"

    with gpt2_pair.model.trace(gpt2_pair.ids()):
        assert Own().save() == "mine too" and Own().value == "mine"


def test_a_trace_without_saves_runs_nothing(gpt2_pair: Pair, runs: list[int]) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()):
        gpt2_pair.layers[1].output[0][:] = 0
    assert not runs
