"""``tracer.cache()``: what modules took and gave, as hooks on transformers' model see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnsight_go import InputError, LanguageModel, ModulePathError
from nnsight_go.cache import Cache
from references import Pair, Seen, close, edits, in_place, main, tensors

pytestmark = pytest.mark.usefixtures("nothing_stays")


def holds(cache: Cache, seen: Seen, invoke: int | None = None, inputs: bool = False) -> int:
    """Fails unless every entry is what hooks saw; gives how many tensors were compared."""
    compared = 0
    for key, found in cache.items():
        path = key.removeprefix("model").removeprefix(".")
        entry = found if invoke is None else found[invoke]
        sides = [("output", tensors(entry.output))]
        if inputs:
            args, kwargs = entry.inputs
            sides.append(("input", tensors(args, "args") | tensors(kwargs, "kwargs")))
        for port, mine in sides:
            theirs = seen.get((path, port), {})
            for name in mine.keys() & theirs.keys():
                close(mine[name], theirs[name])
                compared += 1
            if theirs:
                assert mine.keys() & theirs.keys(), (path, port, mine.keys(), theirs.keys())
    return compared


def test_everything_that_runs(either: Pair) -> None:
    ids = either.ids()
    with either.model.trace(ids) as tracer:
        cache = tracer.cache(include_inputs=True)
    points = either.model._native.points
    assert set(cache) == {
        "model." + m.path if m.path else "model" for m in either.model.modules() if (m.path, 1) in points
    }
    assert holds(cache, either.run(ids), inputs=True) > 60
    assert all(type(t) is torch.Tensor for e in cache.values() for t in tensors((e.output, e.inputs)).values())


def test_entries_are_values_after_all_edits(either: Pair) -> None:
    ids, path = either.ids(), f"{either.blocks}.1"
    with either.model.trace(ids) as tracer:
        cache = tracer.cache(include_inputs=True)
        either.layers[0].mlp.output = either.layers[0].mlp.output * 0.5
        hidden = either.layers[1].output[0]
        if hidden.norm().item() > 0:
            hidden[:, -1] = 0
        either.layers[2].input = either.layers[2].input + 1
    edit = edits(
        {
            f"{either.blocks}.0.mlp.output": lambda x: x * 0.5,
            f"{path}.output": in_place(lambda x: x[:, -1].zero_()),
            f"{either.blocks}.2.input": lambda x: x + 1,
        }
    )
    assert holds(cache, either.run(ids, edit), inputs=True) > 60
    assert bool((cache[f"model.{path}"].output[0][:, -1] == 0).all())


def test_paths_attributes_and_indices(gpt2_pair: Pair) -> None:
    ids, seen = gpt2_pair.ids(), gpt2_pair.run(gpt2_pair.ids())
    with gpt2_pair.model.trace(ids) as tracer:
        cache = tracer.cache(include_inputs=True)
        assert len(cache) == 0, "it is filled when the trace ends"
    h = cache.model.transformer.h
    for i in range(3):
        close(cache[f"model.transformer.h.{i}"].output[0], main(seen, f"transformer.h.{i}"))
        assert h[i].output[0] is cache[f"model.transformer.h.{i}"].output[0]
        assert h[i - 3].output[0] is h[i].output[0]
        assert h[i].mlp.c_fc.input is cache[f"model.transformer.h.{i}.mlp.c_fc"].input
        close(h[i].mlp.inputs[0][0], main(seen, f"transformer.h.{i}.mlp", "input"))
    assert cache.model.output.logits is cache["model"].output["logits"]
    assert [view.output[0] is h[i].output[0] for i, view in enumerate(h)] == [True] * 3
    assert h.keys() == [key for key in cache if key.startswith("model.transformer.h.")]
    assert h[1].attn.c_proj.keys() == ["model.transformer.h.1.attn.c_proj"]
    assert list(cache.keys()) == list(cache) and "model.lm_head" in cache
    for wrong in (
        lambda: cache["model.transformer.h.7"],
        lambda: cache.model.nothing,
        lambda: h[3],
        lambda: h[-4],
        lambda: h.output,
        lambda: h[0].nothing,
    ):
        with pytest.raises(ModulePathError, match="the cache has no"):
            wrong()
    with pytest.raises(KeyError):
        cache["model.transformer.h.7"]
    assert repr(h[0]).startswith("<model.transformer.h.0: ")
    assert not hasattr(cache, "__wrapped__")
    assert len(h) == 3


def test_some_modules(either: Pair) -> None:
    path = f"{either.blocks}.0.mlp"
    layer = either.layers[2]
    with either.model.trace(either.ids()) as tracer:
        cache = tracer.cache(modules=[path, layer, "model.lm_head", either.model])
        one = tracer.cache(modules=layer)
    assert list(cache) == [f"model.{path}", f"model.{layer.path}", "model.lm_head", "model"]
    assert list(one) == [f"model.{layer.path}"]
    assert holds(cache, either.run(either.ids())) == 4
    assert cache[f"model.{path}"].inputs is None and cache[f"model.{path}"].input is None
    other = LanguageModel(either.directory)
    for wrong in (["nothing"], [f"{either.blocks}.9"], [either.blocks], [3], [either.layers], [other.lm_head], [None]):
        with pytest.raises((ModulePathError, InputError)), either.model.trace(either.ids()) as tracer:
            tracer.cache(modules=wrong)  # type: ignore[arg-type]
    other.close()


def test_renamed_modules(gpt2_pair: Pair) -> None:
    model = LanguageModel(gpt2_pair.directory, rename={"transformer.h": "layers", "mlp": "feed"})
    with model.trace(gpt2_pair.ids()) as tracer:
        cache = tracer.cache(modules=["layers.0.feed", model.layers[1]])
    assert list(cache) == ["model.transformer.h.0.mlp", "model.transformer.h.1"]
    assert cache.model.layers[0].feed.output is cache["model.transformer.h.0.mlp"].output
    assert cache["model.layers.1"] is cache["model.transformer.h.1"]
    model.close()


def test_options(gpt2_pair: Pair) -> None:
    model, seen = gpt2_pair.model, gpt2_pair.run(gpt2_pair.ids())
    with model.trace(gpt2_pair.ids()) as tracer:
        half = tracer.cache(modules=["lm_head", "transformer.wte"], dtype=torch.float16, include_inputs=True)
        inputs = tracer.cache(modules=["lm_head"], include_output=False, include_inputs=True)
        nothing = tracer.cache(modules=["lm_head"], include_output=False)
        attached = tracer.cache(modules="lm_head", detach=False)
        there = tracer.cache(modules=["lm_head"], device="cpu")
    assert half["model.lm_head"].output.dtype == half["model.lm_head"].input.dtype == torch.float16
    close(half["model.lm_head"].output.float(), main(seen, "lm_head"), tolerance=1e-2)
    assert half["model.transformer.wte"].input.dtype == torch.int64, "token ids are no numbers to be rounded"
    assert inputs["model.lm_head"].output is None
    close(inputs["model.lm_head"].input, main(seen, "lm_head", "input"))
    assert nothing["model.lm_head"].output is None and nothing["model.lm_head"].inputs is None
    close(attached["model.lm_head"].output, main(seen, "lm_head"))
    close(there["model.lm_head"].output, main(seen, "lm_head"))
    with pytest.raises(TypeError), model.trace(gpt2_pair.ids()) as tracer:
        tracer.cache(everything=True)  # type: ignore[call-arg]


def test_sizes_alone(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()) as tracer:
        meta = tracer.cache(modules=["lm_head"], device=torch.device("meta"))
    assert meta["model.lm_head"].output.is_meta and meta["model.lm_head"].output.shape == (1, 7, 61)


def test_several_invokes(either: Pair) -> None:
    prompts = [either.ids(n, seed=n) for n in (5, 3, 6)]
    zero = edits({f"{either.blocks}.1.output": torch.zeros_like})
    with either.model.trace() as tracer:
        cache = tracer.cache(include_inputs=True)
        with tracer.invoke(prompts[0]):
            own = tracer.cache(modules=[either.layers[1]])
        with tracer.invoke(prompts[1]):
            either.layers[1].output[0][:] = 0
        with tracer.invoke(prompts[2]):
            assert either.layers[1].output[0].norm().item() > 0
            either.layers[1].output[0] = torch.zeros_like(either.layers[1].output[0])
        later = tracer.cache(modules=["lm_head"])
    seen = [either.run(ids, zero if i else None) for i, ids in enumerate(prompts)]
    for i, one in enumerate(seen):
        assert holds(cache, one, invoke=i, inputs=True) > 60
    assert all(isinstance(found, list) and len(found) == 3 for found in cache.values())
    assert holds(own, seen[0]) == 1
    assert len(later) == 0, "no invoke came after it"
    view: Any = cache
    for part in ["model", *either.blocks.split(".")]:
        view = getattr(view, part)
    outputs = view[1].output
    assert [out[0].shape[1] for out in outputs] == [5, 3, 6]
    assert view[1][2].output[0] is outputs[2][0] and view[1][-1].input is view[1].input[2]
    assert [entry.output[0] is out[0] for entry, out in zip(view[1], outputs, strict=True)] == [True] * 3


def test_the_invokes_that_follow(gpt2_pair: Pair) -> None:
    prompts = [gpt2_pair.ids(n, seed=n) for n in (5, 3, 6)]
    with gpt2_pair.model.trace() as tracer:
        with tracer.invoke(prompts[0]):
            pass
        with tracer.invoke():
            pass
        two = tracer.cache(modules=["lm_head"])
        with tracer.invoke(prompts[1]):
            pass
        one = tracer.cache(modules=["lm_head"])
        with tracer.invoke(prompts[2]):
            pass
    assert [e.output.shape[1] for e in two["model.lm_head"]] == [3, 6]
    assert one["model.lm_head"].output.shape[1] == 6


def test_the_whole_batch(gpt2_pair: Pair) -> None:
    prompts = [gpt2_pair.ids(4, seed=n) for n in range(2)]
    with gpt2_pair.model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                pass
        with tracer.invoke():
            cache = tracer.cache(modules=["lm_head"])
    close(cache["model.lm_head"].output, main(gpt2_pair.run(prompts), "lm_head"))


def test_a_cache_moves_no_position(gpt2_pair: Pair) -> None:
    """After it, modules can be written to as before; and earlier values are not asked for anew."""
    model, ids = gpt2_pair.model, gpt2_pair.ids()
    with model.trace(ids) as tracer:
        cache = tracer.cache()
        model.transformer.h[0].output[0][:, 0] = 1
        cache_too = tracer.cache(modules=[model.lm_head])
        model.transformer.h[1].output[0][:, 0] = 2
        model.transformer.h[2].skip(model.transformer.h[1].output[0])
    seen = gpt2_pair.run(
        ids,
        edits(
            {
                "transformer.h.0.output": in_place(lambda x: x[:, 0].fill_(1)),
                "transformer.h.1.output": in_place(lambda x: x[:, 0].fill_(2)),
                "transformer.h.2.output": lambda x: cache["model.transformer.h.1"].output[0],
            }
        ),
    )
    close(cache_too["model.lm_head"].output, main(seen, "lm_head"))
    inside = [key for key in cache if key.startswith("model.transformer.h.2.")]
    assert inside == [], "nothing of a module that was skipped has a value"
    assert holds(cache, seen) > 25


def test_a_module_inside_a_skipped_one(gpt2_pair: Pair) -> None:
    prompts = [gpt2_pair.ids(4, seed=n) for n in range(2)]
    with gpt2_pair.model.trace() as tracer:
        cache = tracer.cache(modules=["transformer.h.1", "transformer.h.1.mlp"])
        with tracer.invoke(prompts[0]):
            gpt2_pair.layers[1].skip(gpt2_pair.layers[1].input)
        with tracer.invoke(prompts[1]):
            pass
    outer, inner = cache["model.transformer.h.1"], cache["model.transformer.h.1.mlp"]
    assert len(outer) == 2
    assert inner[0] is None, "it has no value there"
    close(inner[1].output, main(gpt2_pair.run(prompts[1]), "transformer.h.1.mlp"))


def test_a_block_that_raises_fills_nothing(gpt2_pair: Pair) -> None:
    caches: list[Any] = []
    with pytest.raises(KeyError), gpt2_pair.model.trace(gpt2_pair.ids()) as tracer:
        caches.append(tracer.cache())
        raise KeyError
    assert len(caches[0]) == 0
    with pytest.raises(ModulePathError, match="It is filled when its trace ends"):
        caches[0]["model.lm_head"]


def test_a_cache_of_an_edited_model(either: Pair) -> None:
    prompts = [either.ids(n, seed=n) for n in (5, 3)]
    with either.model.edit() as edited:
        either.layers[1].output[0][:, -1] = 0
    with edited.trace(prompts[0]) as tracer:
        alone = tracer.cache()
    with edited.trace() as tracer:
        both = tracer.cache()
        for ids in prompts:
            with tracer.invoke(ids):
                edited.lm_head.output.save()
    edit = edits({f"{either.blocks}.1.output": in_place(lambda x: x[:, -1].zero_())})
    assert holds(alone, either.run(prompts[0], edit)) > 30
    for i, ids in enumerate(prompts):
        assert holds(both, either.run(ids, edit), invoke=i) > 30


def test_a_cache_in_a_session_and_in_a_scan(gpt2_pair: Pair) -> None:
    model, ids = gpt2_pair.model, gpt2_pair.ids()
    with model.session():
        with model.trace(ids) as tracer:
            first = tracer.cache(modules=["transformer.h.1"])
        with model.trace(ids) as tracer:
            second = tracer.cache(modules=["transformer.h.1"])
            model.transformer.h[1].output[0][:] = first["model.transformer.h.1"].output[0] * 2
    close(second["model.transformer.h.1"].output[0], first["model.transformer.h.1"].output[0] * 2)
    with model.scan(ids) as tracer:
        cache = tracer.cache()
    assert all(t.is_meta for e in cache.values() for t in tensors(e.output).values())
    assert cache["model.lm_head"].output.shape == (1, 7, 61)
