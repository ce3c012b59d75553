"""Values inside the block: Python gets real numbers where it needs them, and nothing runs where it does not."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from references import Pair, close, edits, in_place, main

pytestmark = pytest.mark.usefixtures("nothing_stays")


def hidden(pair: Pair, index: int = 1) -> torch.Tensor:
    return main(pair.run(pair.ids()), f"{pair.blocks}.{index}")


# ---- what runs nothing ----


def facts(x: torch.Tensor) -> dict[str, Any]:
    return {
        "shape": x.shape,
        "size": (x.size(), x.size(0), x.size(-1)),
        "dtype": x.dtype,
        "ndim": (x.ndim, x.dim(), len(x)),
        "numel": x.numel(),
        "device": (x.device, x.is_cuda, x.get_device()),
        "stride": (x.stride(), x.is_contiguous()),
        "kind": (x.is_floating_point(), x.is_complex(), torch.is_tensor(x), isinstance(x, torch.Tensor)),
        "element": x.element_size(),
        "layout": (x.layout, x.is_sparse),
    }


OF_KNOWN_SIZE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda x: x,
    "slice": lambda x: x[:, -1],
    "stepped": lambda x: x[:, ::2, 3:-1],
    "transposed": lambda x: x.transpose(1, 2),
    "permuted": lambda x: x.permute(2, 0, 1),
    "softmax": lambda x: x.softmax(-1),
    "comparison": lambda x: x > 0,
    "argmax": lambda x: x.argmax(-1),
    "topk": lambda x: x.topk(3).indices,
    "double": lambda x: x.double() @ x.double().mT,
    "half": lambda x: x.half(),
    "stack": lambda x: torch.stack([x, x * 2], 1),
    "expand": lambda x: x[:, :1].expand(-1, 4, -1),
    "einsum": lambda x: torch.einsum("btd,bsd->bts", x, x),
    "mean": lambda x: x.mean((0, 1)),
    "integers": lambda x: (x * 10).long() % 3,
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    "one_hot of known classes": lambda x: torch.nn.functional.one_hot(x.argmax(-1), 64),
    "lists": lambda x: x[:, [0, 2]],
    "new axis": lambda x: x[None, ..., 0],
}


@pytest.mark.parametrize("name", OF_KNOWN_SIZE)
def test_facts_run_nothing(either: Pair, runs: list[int], name: str) -> None:
    operation = OF_KNOWN_SIZE[name]
    with either.model.trace(either.ids()):
        got = facts(operation(either.layers[1].output[0]))
        assert not runs
    assert got == facts(operation(hidden(either)))


def test_facts_of_logits_and_ids(either: Pair, runs: list[int]) -> None:
    with either.model.trace([either.ids(), either.ids(seed=2)]):
        assert either.model.lm_head.output.shape == (2, 7, either.hf.config.vocab_size)
        assert either.model.input.dtype == torch.int64
        assert repr(either.model.lm_head.output) == (
            f"<Proxy shape=[2, 7, {either.hf.config.vocab_size}], float32, from lm_head.output>"
        )
    assert not runs


def test_facts_after_changes_in_place(either: Pair, runs: list[int]) -> None:
    def work(x: torch.Tensor) -> list[Any]:
        y = x.clone()
        y.unsqueeze_(0)
        z = x.clone().transpose_(1, 2)
        w = x.clone().squeeze_(0)
        return [y.shape, z.shape, z.stride(), w.shape, len(w)]

    with either.model.trace(either.ids()):
        got = work(either.layers[1].output[0])
        assert not runs
    assert got == work(hidden(either))


def test_showing_runs_nothing(either: Pair, runs: list[int]) -> None:
    with either.model.trace(either.ids()), contextlib.redirect_stdout(io.StringIO()) as out:
        x = either.layers[1].output[0]
        y = x[:, -1].softmax(-1)
        print(x)
        print(f"{y}", [y], {"y": y})
        str(either.layers[1].output), repr(either.model.output)
        wrong = x @ x
        repr(wrong)
    assert not runs
    text = out.getvalue()
    assert f"shape=[1, 7, {either.width}], float32, from {either.blocks}.1.output[0]" in text
    assert "softmax" in text and "tensor(" not in text


def test_identity_and_containers_run_nothing(either: Pair, runs: list[int]) -> None:
    with either.model.trace(either.ids()):
        x = either.layers[1].output[0]
        assert x is not None and id(x) and hash(x) and {x: 1}[x] == 1
        assert x != "text" and x != None  # noqa: E711
        assert either.layers[1].output[0] is x
    assert not runs


# ---- what runs as far as it must ----

VALUES: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.mean().item(),
    "tolist": lambda x: x[0, :2, :3].tolist(),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x[0, -1].argmax()),
    "bool": lambda x: bool((x > 0).any()),
    "not": lambda x: not x.isnan().any(),
    "format": lambda x: f"{x.mean():.3f} {x.sum():8.2f}",
    "numpy": lambda x: x.numpy().sum(),
    "asarray": lambda x: np.asarray(x).mean(),
    "numpy of a part": lambda x: x.detach().cpu()[0].numpy()[1, 2],
    "numpy function": lambda x: np.linalg.norm(x[0]),
    "index": lambda x: [10, 20, 30][(x[0, 0].argmax() % 3)],
    "range": lambda x: list(range(x.argmax() % 4)),
    "comparison": lambda x: (x[0, 0, 0] < x[0, 0, 1], x.max() >= x.min())[1] and 1,
    "sorted": lambda x: sorted(x[0, 0, :5].tolist()),
    "max of a list": lambda x: float(max(x[0, 0, :6])),
    "sum of a list": lambda x: float(sum(x[0, 0, :6])),
    "math": lambda x: math.sqrt(x.abs().sum()),
    "loop": lambda x: [round(float(row.norm()), 4) for row in x[0]],
    "mask shape": lambda x: x[x > 0].shape,
    "mask sum": lambda x: float(x[x > 0].sum()),
    "nonzero": lambda x: x.nonzero().shape,
    "nonzero as tuple": lambda x: [part.shape for part in (x > 0.2).nonzero(as_tuple=True)],
    "where": lambda x: [part.shape for part in torch.where(x > 0.2)],
    "unique": lambda x: (x * 3).round().unique().tolist(),
    "unique counts": lambda x: [part.tolist() for part in (x * 2).long().unique(return_counts=True)],
    "masked_select": lambda x: torch.masked_select(x, x < 0).numel(),
    "bincount": lambda x: (x * 2).long().abs().flatten().bincount().shape,
    "one_hot": lambda x: torch.nn.functional.one_hot(x.argmax(-1)).shape,
    "allclose": lambda x: (torch.allclose(x, x + 1e-9), torch.equal(x, x), torch.equal(x, x * 2)),
    "in": lambda x: 1e9 in x,
    "all of python": lambda x: all(row.norm() > 0 for row in x[0]),
    "complex": lambda x: complex(x[0, 0, 0]).imag,
    "round trip": lambda x: float(torch.tensor(x[0, 0].tolist()).sum()),
    "new tensor": lambda x: float(torch.tensor([x[0, 0, 0], 2.0]).sum()),
    "histogram": lambda x: torch.histc(x, 5, -2, 2).tolist(),
    "split by value": lambda x: [part.shape for part in x.split([2, x.shape[1] - 2], 1)],
    "repeat_interleave": lambda x: x[0, 0, :3].repeat_interleave(torch.tensor([1, 2, 3])).shape,
}


def same(got: Any, want: Any) -> bool:
    if isinstance(want, float | np.floating):
        return bool(got == pytest.approx(want, rel=1e-3, abs=1e-4))
    if isinstance(want, list | tuple):
        return type(got) is type(want) and len(got) == len(want) and all(map(same, got, want))
    return bool(got == want)


@pytest.mark.parametrize("name", VALUES)
def test_values(either: Pair, runs: list[int], name: str) -> None:
    use = VALUES[name]
    with either.model.trace(either.ids()):
        x = either.layers[1].output[0]
        got = use(x)
        forced = len(runs)
        out = either.model.lm_head.output.save()
        x.save()
    want = use(hidden(either))
    if name == "format":
        assert [float(part) for part in got.split()] == pytest.approx([float(p) for p in want.split()], abs=0.011)
    else:
        assert same(got, want), (got, want)
    assert forced == 0 if name == "split by value" else forced > 0
    close(x, hidden(either))
    close(out, main(either.run(either.ids()), "lm_head"))


def test_the_same_value_at_the_same_place_runs_once(either: Pair, runs: list[int]) -> None:
    with either.model.trace(either.ids()):
        mean = either.layers[1].output[0].mean()
        assert float(mean) == mean.item() == mean.tolist()
    assert len(runs) == 1


def test_only_what_is_needed_runs(gpt2_pair: Pair) -> None:
    """A value of layer 0 never runs the head: a broken line there shows it."""
    with pytest.raises(RuntimeError, match="test_values.py"), gpt2_pair.model.trace(gpt2_pair.ids()):
        x = gpt2_pair.layers[0].output[0]
        broken = gpt2_pair.layers[1].output[0] + torch.ones(5)
        assert float(x.mean()) == pytest.approx(float(hidden(gpt2_pair, 0).mean()), abs=1e-5)
        broken.save()


def test_control_flow_on_values(either: Pair) -> None:
    def work(x: torch.Tensor) -> None:
        steps = 0
        while x[:, -1].norm() > 2 and steps < 20:
            x[:, -1] *= 0.8
            steps += 1
        if x.mean() > 0:
            x[:, 0] = 1
        elif x.mean() > -5:
            x[:, 0] = -1
        for i, row in enumerate(x[0]):
            if row.sum() > 0:
                x[0, i] -= row.mean()

    want = either.run(either.ids(), edits({f"{either.blocks}.1.output": in_place(work)}))
    with either.model.trace(either.ids()):
        work(either.layers[1].output[0])
        out = either.model.lm_head.output.save()
    close(out, main(want, "lm_head"))


def test_a_forced_value_sees_the_edits_above_it_and_not_those_below(either: Pair) -> None:
    with either.model.trace(either.ids()):
        x = either.layers[1].output[0]
        before = float(x.abs().sum())
        x[:] *= 2
        between = float(x.abs().sum())
        later = float(either.layers[2].output[0].abs().sum())
        x = either.layers[0].output[0]
        earlier = float(x.abs().sum())
    doubled = edits({f"{either.blocks}.1.output": lambda x: x * 2})
    want = float(hidden(either).abs().sum())
    assert before == pytest.approx(want, rel=1e-4) and between == pytest.approx(2 * want, rel=1e-4)
    assert later == pytest.approx(
        float(main(either.run(either.ids(), doubled), f"{either.blocks}.2").abs().sum()), rel=1e-4
    )
    assert earlier == pytest.approx(float(hidden(either, 0).abs().sum()), rel=1e-4)


def test_forced_values_and_saved_ones_agree(either: Pair) -> None:
    with either.model.trace(either.ids()):
        x = either.layers[1].output[0]
        noisy = x + torch.randn_like(x)
        seen = noisy.tolist()
        noisy.save()
    assert noisy.tolist() == seen


def test_what_was_handed_over_is_a_value_of_its_own(either: Pair) -> None:
    with either.model.trace(either.ids()):
        x = either.layers[1].output[0]
        array = x.numpy()
        array[:] = 0  # changes what was handed over, not the model
        x.save()
        out = either.model.lm_head.output.save()
    close(x, hidden(either))
    close(out, main(either.run(either.ids()), "lm_head"))


def test_writing_a_value_into_a_tensor_from_outside(either: Pair, runs: list[int]) -> None:
    store = torch.zeros(3, either.width)
    with either.model.trace(either.ids()):
        for i, layer in enumerate(either.layers):
            store[i] = layer.output[0][0, -1]
        assert len(runs) == 3
        store[0] += 1
    for i in range(3):
        close(store[i].clone(), hidden(either, i)[0, -1] + (1 if i == 0 else 0))


def test_numbers_of_a_block_stay_after_it(either: Pair) -> None:
    found: dict[str, float] = {}
    norms: list[float] = []
    with either.model.trace(either.ids()):
        for i, layer in enumerate(either.layers):
            norms.append(layer.output[0].norm().item())
            found[f"h{i}"] = norms[-1]
    assert norms == pytest.approx([float(hidden(either, i).norm()) for i in range(3)], rel=1e-4)
    assert list(found.values()) == norms


def test_values_in_invokes(either: Pair) -> None:
    """A value forced in one invoke is that of its prompt alone, whatever else is in the trace."""
    got = []
    with either.model.trace() as tracer:
        for n in (3, 6, 1):
            with tracer.invoke(either.ids(n, seed=n)):
                got.append(float(either.layers[2].output[0].sum()))
                either.layers[2].output[0][:] = 0
    want = [float(main(either.run(either.ids(n, seed=n)), f"{either.blocks}.2").sum()) for n in (3, 6, 1)]
    assert got == pytest.approx(want, rel=1e-3, abs=1e-3)


# ---- tensors from outside ----


def outside(pair: Pair, big: bool) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(1, 700 if big else 7, pair.width)  # 134 or 1 KB


def test_a_small_tensor_is_copied_where_a_line_uses_it(either: Pair) -> None:
    x = outside(either, big=False)
    want = x.clone()
    with either.model.trace(either.ids()):
        either.layers[1].output[0] = x
        x.zero_()
        again = (either.layers[1].output[0] + x).save()
    close(again, want)
    assert not x.any()


def test_a_large_tensor_must_not_change(either: Pair) -> None:
    x = outside(either, big=True)
    assert x.numel() * x.element_size() > 64 * 1024
    with either.model.trace(either.ids()):
        total = (either.layers[1].output[0].sum() + x).save()
    close(total, hidden(either).sum() + x)
    said = r"changed in place(.|\n)*test_values.py(.|\n)*clone"
    with pytest.raises(ValueError, match=said), either.model.trace(either.ids()):
        total = (either.layers[1].output[0].sum() + x).save()
        x.zero_()


def test_numpy_arrays_and_numbers_of_numpy(either: Pair) -> None:
    array = np.linspace(-1, 1, either.width, dtype=np.float32)
    with either.model.trace(either.ids()):
        x = either.layers[1].output[0]
        scaled = (x * np.float32(0.5)).save()
        shifted = (x + torch.from_numpy(array)).save()
    close(scaled, hidden(either) * 0.5)
    close(shifted, hidden(either) + torch.from_numpy(array))


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def test_the_default_dtype_is_pythons(either: Pair, default_dtype: None) -> None:
    torch.set_default_dtype(torch.float64)
    with either.model.trace(either.ids()):
        x = (either.layers[1].output[0].argmax(-1) / 3).save()
        y = torch.zeros(3) + either.layers[1].output[0].sum()
        y.save()
    assert x.dtype == torch.float64 and y.dtype == torch.float64
