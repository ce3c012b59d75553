"""Edits that traces bring along: they mean their lines, ahead of the trace's own."""

from __future__ import annotations

import base64
import inspect
import pathlib
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch

import nnsight_go
from nnsight_go import GraphError, InputError, LanguageModel, ModulePathError, OpError, _ffi
from references import Pair, close, edits, in_place, main

pytestmark = pytest.mark.usefixtures("nothing_stays")


def logits_of(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    with model.trace(ids):
        out = model.lm_head.output.save()
    return out


# ---- which model has them ----


def test_an_edited_view_leaves_the_model_alone(either: Pair) -> None:
    ids, model = either.ids(), either.model
    with model.edit() as edited:
        either.layers[1].output[0][:, -1] = 0
    assert edited is not model and model.edits == () and len(edited.edits) == 1
    want = either.run(ids, edits({f"{either.blocks}.1.output": in_place(lambda x: x[:, -1].zero_())}))
    close(logits_of(edited, ids), main(want, "lm_head"))
    close(logits_of(model, ids), main(either.run(ids), "lm_head"))
    assert edited.lm_head.weight is model.lm_head.weight, "a view shares the weights"
    assert edited.config == model.config
    assert repr(edited) == repr(model)


def test_edits_in_place(gpt2_pair: Pair) -> None:
    model = LanguageModel(gpt2_pair.directory, tokenizer=False)
    ids = gpt2_pair.ids()
    with model.edit(inplace=True) as edited:
        model.transformer.h[1].output[0][:, -1] = 0
    assert edited is model and len(model.edits) == 1
    want = gpt2_pair.run(ids, edits({"transformer.h.1.output": in_place(lambda x: x[:, -1].zero_())}))
    close(logits_of(model, ids), main(want, "lm_head"))
    with model.edit() as more:
        more.transformer.h[0].output[0][:] *= 2
    model.clear_edits()
    assert model.edits == () and len(more.edits) == 2, "a view keeps what it had"
    close(logits_of(model, ids), main(gpt2_pair.run(ids), "lm_head"))
    model.close()


def test_edits_of_edits(either: Pair) -> None:
    """They are made in the order in which they were added."""
    ids, model, layer = either.ids(), either.model, either.layers[1]
    with model.edit() as first:
        layer.output[0][:] = layer.output[0] * 2
    with first.edit() as second:
        layer.output[0][:] = layer.output[0] + 1
    with model.edit() as other:
        layer.output[0][:] = layer.output[0] + 1
    turned = other.with_edits(*first.edits)
    assert [len(m.edits) for m in (model, first, second, turned)] == [0, 1, 2, 2]
    place = f"{either.blocks}.1.output"
    for edited, change in (
        (first, lambda x: x * 2),
        (second, lambda x: x * 2 + 1),
        (turned, lambda x: (x + 1) * 2),
        (model.with_edits(*second.edits, *first.edits), lambda x: (x * 2 + 1) * 2),
    ):
        close(logits_of(edited, ids), main(either.run(ids, edits({place: change})), "lm_head"))


def test_a_block_that_raises_adds_no_edit(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    before = _ffi.counters()
    with pytest.raises(KeyError), model.edit(inplace=True):
        model.transformer.h[1].output[0][:] = torch.randn(48)
        raise KeyError
    assert model.edits == () and _ffi.counters() == before
    with pytest.raises(InputError, match="inside a trace"), model.trace([1]), model.edit():
        pass
    with pytest.raises(InputError, match="inside another one"), model.edit(), model.trace([1]):
        pass
    close(logits_of(model, [1, 2]), main(gpt2_pair.run([1, 2]), "lm_head"))


# ---- what they do ----


def test_the_invoke_sees_the_edited_value(either: Pair) -> None:
    prompts = [either.ids(n, seed=n) for n in (5, 3, 6)]
    vector = torch.randn(either.width)
    with either.model.edit() as edited:
        either.layers[0].mlp.output = either.layers[0].mlp.output * 0.5
        either.layers[1].output[0][:, -1] = vector
    vector_then = vector.clone()
    vector.zero_()  # the edit has its own
    seen, logits = [], []
    with edited.trace() as tracer:
        for i, ids in enumerate(prompts):
            with tracer.invoke(ids):
                hidden = edited.get(either.blocks)[1].output[0]
                seen.append(hidden.clone().save())
                if i == 1:
                    assert torch.allclose(hidden[:, -1].cpu(), vector_then)
                    hidden[:, 0] = hidden[:, -1]
                logits.append(edited.lm_head.output.save())
        with tracer.invoke(prompts[0]):
            edited.lm_head.output.save()

    for i, ids in enumerate(prompts):

        def change(x: torch.Tensor, i: int = i) -> None:
            x[:, -1] = vector_then
            if i == 1:
                x[:, 0] = x[:, -1]

        want = either.run(
            ids,
            edits({f"{either.blocks}.0.mlp.output": lambda x: x * 0.5, f"{either.blocks}.1.output": in_place(change)}),
        )
        close(logits[i], main(want, "lm_head"))
        if i != 1:
            close(seen[i], main(want, f"{either.blocks}.1"))


def test_the_whole_batch_shows_edits_and_brings_none(gpt2_pair: Pair) -> None:
    prompts = [gpt2_pair.ids(4, seed=n) for n in range(3)]
    with gpt2_pair.model.edit() as edited:
        edited.transformer.h[1].output[0][:] += 1
    with edited.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                pass
        with tracer.invoke():
            hidden = edited.transformer.h[1].output[0].save()
            logits = edited.lm_head.output.save()
    want = gpt2_pair.run(prompts, edits({"transformer.h.1.output": lambda x: x + 1}))
    close(hidden, main(want, "transformer.h.1"))
    close(logits, main(want, "lm_head"))


def test_a_later_edit_of_the_trace_may_stand_before_the_edits_places(gpt2_pair: Pair) -> None:
    """The position of an invoke is its own: an edit of a late layer does not make early ones be out of order."""
    with gpt2_pair.model.edit() as edited:
        edited.transformer.h[2].output[0][:] *= 2
    with edited.trace(gpt2_pair.ids()):
        edited.transformer.h[0].output[0][:, -1] = 0
        logits = edited.lm_head.output.save()
    want = gpt2_pair.run(
        gpt2_pair.ids(),
        edits(
            {
                "transformer.h.0.output": in_place(lambda x: x[:, -1].zero_()),
                "transformer.h.2.output": lambda x: x * 2,
            }
        ),
    )
    close(logits, main(want, "lm_head"))


@pytest.mark.parametrize("others", [0, 2])
def test_an_edit_and_its_invoke_share_no_tensors(gpt2_pair: Pair, others: int) -> None:
    """What one of them has read keeps its numbers when the other changes it later, alone or beside other invokes."""
    model, ids = gpt2_pair.model, gpt2_pair.ids()
    with model.edit() as edited:
        early = model.transformer.h[0].output[0]
        model.transformer.h[1].input[:, 0] = 0  # the same tensor in GPT-2
        model.transformer.h[2].output[0] = early
    with edited.trace() as tracer:
        with tracer.invoke(ids):
            own = model.transformer.h[0].output[0].save()
            own[:, -1] = 0
            logits = model.lm_head.output.save()
            between = model.transformer.h[1].ln_1.input.save()
        for n in range(others):
            with tracer.invoke(gpt2_pair.ids(3 + n)):
                model.lm_head.output.save()
    plain = main(gpt2_pair.run(ids), "transformer.h.0")
    zero = plain.clone()
    zero[:, -1] = 0
    close(own, zero)
    zero = zero.clone()
    zero[:, 0] = 0
    close(between, zero)
    close(logits, main(gpt2_pair.run(ids, edits({"transformer.h.2.output": lambda x: plain})), "lm_head"))


def test_skip_and_module_calls_in_an_edit(either: Pair) -> None:
    ids, norm = either.ids(), either.model.get(either.final)
    with either.model.edit() as edited:
        state = either.layers[0].output[0]
        either.layers[1].skip(norm(state))
    kept = [(p, p.detach().clone()) for p in either.layers[1].parameters()]
    want = either.run(
        ids, edits({f"{either.blocks}.1.output": lambda x: norm(main(either.run(ids), f"{either.blocks}.0"))})
    )
    try:
        with torch.no_grad():
            for p, _ in kept:
                p.fill_(float("nan"))
        got = logits_of(edited, ids)
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)
    close(got, main(want, "lm_head"))


class Autoencoder(torch.nn.Module):
    """Sparse features of a residual stream, and back."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.encode, self.decode = torch.nn.Linear(width, features), torch.nn.Linear(features, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(torch.relu(self.encode(x - self.decode.bias)))


@pytest.mark.parametrize("features", [10, 1000])
def test_modules_of_the_user(gpt2_pair: Pair, features: int, tmp_path: pathlib.Path) -> None:
    """The edit keeps their parameters as they were, large or small."""
    torch.manual_seed(5)
    sae, ids = Autoencoder(48, features), gpt2_pair.ids()
    with gpt2_pair.model.edit() as edited:
        edited.transformer.h[1].output[0][:] = sae(edited.transformer.h[1].output[0])
    with torch.no_grad():
        want = gpt2_pair.run(ids, edits({"transformer.h.1.output": sae}))
        edited.edits[0].save(tmp_path / "sae.edit")
        for p in sae.parameters():
            p.zero_()
    close(logits_of(edited, ids), main(want, "lm_head"))
    again = gpt2_pair.model.with_edits(nnsight_go.load_edit(tmp_path / "sae.edit"))
    close(logits_of(again, ids), main(want, "lm_head"))


def test_a_tensor_that_changes_while_an_edit_is_recorded(gpt2_pair: Pair) -> None:
    large = torch.zeros(400, 48)
    with pytest.raises(InputError, match="changed in place"), gpt2_pair.model.edit() as edited:
        edited.transformer.h[1].output[0][:] += large[:1]
        edited.transformer.h[1].output[0][:, -1] = large.sum(0)
        edited.transformer.h[2].output[0][:] = edited.transformer.h[2].output[0] @ large.mT @ large
        large.add_(1)
    assert gpt2_pair.model.edits == ()


def test_grad_mode_and_eight_threads(gpt2_pair: Pair) -> None:
    import concurrent.futures

    views = []
    for n in range(8):
        with gpt2_pair.model.edit() as edited, torch.no_grad():
            edited.transformer.h[1].output[0][:] *= n
        views.append(edited)

    def work(n: int) -> torch.Tensor:
        for _ in range(5):
            out = logits_of(views[n], gpt2_pair.ids(3 + n))
        return out

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    for n, got in enumerate(found):
        want = gpt2_pair.run(gpt2_pair.ids(3 + n), edits({"transformer.h.1.output": lambda x, n=n: x * n}))
        close(got, main(want, "lm_head"))


# ---- sizes ----


def refused(model: LanguageModel, line: Callable[[torch.Tensor], Any]) -> InputError:
    with pytest.raises(InputError) as caught, model.edit():
        line(model.get("transformer.h.1").output[0])
    assert caught.value.file == __file__ and caught.value.line == line.__code__.co_firstlineno
    return caught.value


def test_sizes_of_the_input_are_refused(gpt2_pair: Pair) -> None:
    for line in (
        lambda h: h.shape[0],
        lambda h: h.shape[1] - 1,
        lambda h: h.size(1),
        lambda h: h.size()[1],
        lambda h: h[:, : h.shape[1] // 2],
        lambda h: list(h.shape),
        lambda h: h.view(*h.shape[:-1], 3, -1),
        lambda h: h.shape == (1, 7, 48),
        lambda h: h.numel(),
        lambda h: h.shape.numel(),
        lambda h: len(h),
        lambda h: h.stride(),
        lambda h: list(h),
        lambda h: h.unbind(1),
        lambda h: torch.randn_like(h),
        lambda h: torch.nn.functional.dropout(h, 0.5),
    ):
        assert "depends on the input" in refused(gpt2_pair.model, line).message, inspect.getsource(line)
    with pytest.raises(TypeError, match="not InputSizes"), gpt2_pair.model.edit() as edited:
        edited.transformer.h[1].output[0].expand(edited.transformer.h[1].output[0].shape)
    with pytest.raises(TypeError, match="not InputSizes"), gpt2_pair.model.edit() as edited:
        torch.zeros(edited.transformer.h[1].output[0].shape)


def test_sizes_that_are_the_models_are_known(gpt2_pair: Pair, either: Pair) -> None:
    model, seen = gpt2_pair.model, []
    with model.edit():
        h = model.transformer.h[1].output[0]
        seen += [h.shape[-1], h.size(-1), h.shape[2:], len(h.shape), h.ndim, h.dim(), h.dtype, h.device.type]
        seen += [h[0, 0].shape, h[:, -1].shape[1], h.is_floating_point(), h[0, :2].numel(), len(h.chunk(3, -1))]
        seen += [repr(h), repr(h.shape), f"{h[:, -1]}"]
    assert seen == [
        48, 48, (48,), 3, 3, 3, torch.float32, "cpu", (48,), 48, True, 96, 3,
        "<Proxy shape=[?, ?, 48], float32, from transformer.h.1.output[0]>", "[?, ?, 48]",
        "<Proxy shape=[?, 48], float32, from transformer.h.1.output[0][...]>",
    ]  # fmt: skip
    assert type(seen[2]) is type(seen[8]) is torch.Size


def test_values_are_refused(gpt2_pair: Pair) -> None:
    for line in (
        lambda h: h.sum().item(),
        lambda h: bool(h.sum() > 0),
        lambda h: h.tolist(),
        lambda h: h.numpy(),
        lambda h: f"{h.sum():.2f}",
        lambda h: torch.zeros(3).add_(h.sum()),
    ):
        assert "needs a value" in refused(gpt2_pair.model, line).message
    for line in (lambda h: h.save(), lambda h: [h].save(), lambda h: nnsight_go.save(h)):
        assert "keeps none" in refused(gpt2_pair.model, line).message


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_inputs_of_any_length(gpt2_pair: Pair, tokens: int) -> None:
    with gpt2_pair.model.edit() as edited:
        h = edited.transformer.h[1].output[0]
        h[:, -1] = h.mean(1)
        edited.transformer.h[2].attn.output[0][..., : h.shape[-1] // 2] = 0
    rows = [gpt2_pair.ids(tokens, seed=n) for n in range(2)]

    def mean(x: torch.Tensor) -> None:
        x[:, -1] = x.mean(1)

    change = edits(
        {
            "transformer.h.1.output": in_place(mean),
            "transformer.h.2.attn.output": in_place(lambda x: x[..., :24].zero_()),
        }
    )
    close(logits_of(edited, rows), main(gpt2_pair.run(rows, change), "lm_head"))  # type: ignore[arg-type]


@pytest.mark.parametrize("invokes", [1, 2, 3])
def test_an_edit_that_changes_sizes_in_each_of_several_invokes(either: Pair, invokes: int) -> None:
    with either.model.edit() as edited:
        edited.lm_head.input = edited.lm_head.input[:, -2:]
    found = []
    with edited.trace() as tracer:
        for i in range(invokes):
            with tracer.invoke(either.ids(3 + i, seed=i)):
                found.append(edited.lm_head.output.save())
    for i, logits in enumerate(found):
        close(logits, main(either.run(either.ids(3 + i, seed=i)), "lm_head")[:, -2:])


def test_an_edit_that_changes_sizes(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    """Sizes behind it are those that the values have."""
    ids, other = gpt2_pair.ids(6), gpt2_pair.ids(4, seed=2)
    with gpt2_pair.model.edit() as edited:
        edited.transformer.h[1].output[0] = edited.transformer.h[1].output[0][:, -2:]
    edited.edits[0].save(tmp_path / "edit")
    again = gpt2_pair.model.with_edits(nnsight_go.load_edit(tmp_path / "edit"))
    for model in (edited, again):
        with model.trace() as tracer:
            logits, said = [], []
            for prompt in (ids, other):
                with tracer.invoke(prompt):
                    logits.append(model.lm_head.output.save())
                    said.append(logits[-1].shape)
        for prompt, got, shape in zip((ids, other), logits, said, strict=True):
            # transformers cannot do it: the same by the blocks that follow
            with torch.no_grad():
                state = main(gpt2_pair.run(prompt), "transformer.h.1")[:, -2:]
                top = gpt2_pair.hf.transformer
                want = gpt2_pair.hf.lm_head(top.ln_f(top.h[2](state)))
            assert shape == got.shape == (1, 2, 61)
            close(got, want)
        with pytest.raises(OpError, match="known once it is computed"), model.scan(ids):
            model.lm_head.output.save()


# ---- errors ----


def test_a_line_that_is_wrong_is_named_in_each_trace(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.edit() as edited:
        at = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        edited.transformer.h[1].output[0][:] = edited.transformer.h[1].output[0] @ torch.zeros(3, 3)
    for _ in range(2):
        with pytest.raises(OpError, match="cannot be multiplied") as caught, edited.trace(gpt2_pair.ids()):
            edited.lm_head.output.save()
        assert (caught.value.file, caught.value.line, caught.value.invoke) == (__file__, at, 0)
    close(logits_of(gpt2_pair.model, [1, 2]), main(gpt2_pair.run([1, 2]), "lm_head"))


def test_values_of_an_edit_stay_in_it(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.edit() as edited:
        h = edited.transformer.h[1].output[0]
        h[:] *= 2
    with pytest.raises(nnsight_go.NotSavedError, match="an edit keeps no values"):
        h + 1
    with pytest.raises(nnsight_go.NotSavedError), edited.trace([1, 2]):
        h + 1


def test_an_edit_of_modules_that_another_model_lacks(gpt2_pair: Pair, llama_pair: Pair, tmp_path: pathlib.Path) -> None:
    with gpt2_pair.model.edit() as edited:
        edited.transformer.h[1].output[0][:] *= 2
    edited.edits[0].save(tmp_path / "edit")
    model = llama_pair.model.with_edits(nnsight_go.load_edit(tmp_path / "edit"))
    with pytest.raises(ModulePathError, match=r"transformer\.h\.1"):
        logits_of(model, [1, 2, 3])


# ---- files and printing ----


def test_an_edit_is_read_as_it_was_written(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    shift = torch.randn(48)
    with gpt2_pair.model.edit() as edited:
        h = edited.transformer.h[1].output[0]
        h[:, -1] = h[:, 0] + shift
    (edit,) = edited.edits
    path = tmp_path / "shift.edit"
    edit.save(path)
    again = nnsight_go.load_edit(path)
    assert str(again) == str(edit) and repr(again) == repr(edit) == "<Edit of 5 operations>"
    assert again.mermaid() == edit.mermaid()
    assert safetensors.torch.load_file(path)["0"].equal(shift)
    assert b"pickle" not in path.read_bytes()
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(path.read_bytes())
    ids = gpt2_pair.ids()
    assert torch.equal(logits_of(gpt2_pair.model.with_edits(again), ids), logits_of(edited, ids))
    again.save(tmp_path / "again.edit")
    assert str(nnsight_go.load_edit(tmp_path / "again.edit")) == str(edit)


def test_an_edit_prints(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.edit() as edited:
        first = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        h = edited.transformer.h[1].output[0]
        h[:, -1] = 0
    name = pathlib.Path(__file__).name
    assert str(edited.edits[0]) == (
        "an edit\n"
        f"  %0 = read transformer.h.1.output[0]  # {name}:{first}\n"
        f"  %1: %0[:, -1] = 0                    # {name}:{first + 1}\n"
    )
    assert edited.edits[0].mermaid() == (
        'flowchart TD\n  subgraph i0["an edit"]\n    n0(["%0 = read transformer.h.1.output[0]"])\n'
        '    n1["%1: %0[:, -1] = 0"]\n  end\n  n0 --> n1\n'
    )


def saved(pair: Pair, path: pathlib.Path) -> bytes:
    with pair.model.edit() as edited:
        edited.transformer.h[1].output[0][:, -1] = torch.arange(48.0)
    edited.edits[0].save(path)
    return path.read_bytes()


def test_spoilt_files(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "edit"
    good = saved(gpt2_pair, path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    graph = base64.b64decode(metadata["graph"])

    def refuses(data: bytes) -> None:
        path.write_bytes(data)
        with pytest.raises(GraphError) as caught:
            nnsight_go.load_edit(path)
        assert caught.value.file == __file__

    for data in (
        b"",
        b"junk",
        good[:7],
        good[:20],
        good[: len(good) // 2],
        good[:-1],
        good[8:],
        pickle.dumps({"a": 1}),
    ):
        refuses(data)
    for change in (
        {"nnsight_go": "graph"},
        {"nnsight_go": ""},
        {"nnsight_go": None},
        {"graph": None},
        {"graph": ""},
        {"graph": "not base64!"},
        {"graph": base64.b64encode(b"junk").decode()},
        {"graph": base64.b64encode(graph[:-3]).decode()},
        {"graph": base64.b64encode(graph + b"x").decode()},
        {"facts": None},
        {"facts": "{"},
        {"facts": '{"kept": [99]}'},
        {"facts": '{"kept": [0]}'},
        {"facts": '{"kept": "x"}'},
        {"facts": '{"resizes": 3}'},
    ):
        entries = {k: v for k, v in (metadata | change).items() if v is not None}
        refuses(safetensors.torch.save(tensors, entries))
    refuses(safetensors.torch.save({"other": tensors["0"]}, metadata))
    with gpt2_pair.model.trace([1, 2]) as tracer:
        gpt2_pair.model.lm_head.output.save()
    tracer.graph.save(path)
    with pytest.raises(GraphError, match="holds no edit"):
        nnsight_go.load_edit(path)
    entries = safetensors.safe_open(path, "pt").metadata() | {"nnsight_go": "edit"}
    refuses(safetensors.torch.save({}, entries))
    with pytest.raises(OSError):
        nnsight_go.load_edit(tmp_path / "nothing")
    with pytest.raises((OSError, GraphError)):
        nnsight_go.load_edit(tmp_path)


def test_spoilt_graphs_fail_as_graphs(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    """Random damage is found when the file is read, or when a trace brings the edit along; or it is no damage."""
    path = tmp_path / "edit"
    saved(gpt2_pair, path)
    tensors = safetensors.torch.load_file(path)
    metadata = safetensors.safe_open(path, "pt").metadata()
    graph = base64.b64decode(metadata["graph"])
    rng, found = random.Random(0), {"load": 0, "trace": 0, "fine": 0}
    for _ in range(400):
        data = bytearray(graph)
        for _ in range(rng.choice([1, 1, 2, 5])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        given = tensors if rng.random() < 0.9 else {}
        path.write_bytes(safetensors.torch.save(given, metadata | {"graph": base64.b64encode(data).decode()}))
        try:
            edit = nnsight_go.load_edit(path)
        except GraphError:
            found["load"] += 1
            continue
        try:
            logits_of(gpt2_pair.model.with_edits(edit), [1, 2, 3])
            found["fine"] += 1
        except nnsight_go.NnsightError as error:
            assert not isinstance(error, nnsight_go.errors.InternalError), error
            found["trace"] += 1
    assert found["load"] > 50 and found["trace"] > 5, found
    close(logits_of(gpt2_pair.model, [1, 2]), main(gpt2_pair.run([1, 2]), "lm_head"))
