"""``stop``, ``barrier``, ``scan``, ``skip``, ``session`` and ``result``: what they do, and what they refuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

import nnsight_go
from nnsight_go import InputError, LanguageModel, NotSavedError, OpError, OutOfOrderError, _ffi
from nnsight_go.envoy import Envoy
from references import Pair, close, edits, in_place, main

pytestmark = pytest.mark.usefixtures("nothing_stays")


def line() -> int:
    """The number of the line that calls it."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno


# ---- stop ----


def test_stop_leaves_the_block(either: Pair) -> None:
    ids, reached = either.ids(), []
    with either.model.trace(ids) as tracer:
        hidden = either.layers[1].output[0].save()
        lost = either.layers[1].output[0] * 2
        reached.append(1)
        tracer.stop()
        reached.append(2)
    assert reached == [1]
    close(hidden, main(either.run(ids), f"{either.blocks}.1"))
    with pytest.raises(NotSavedError):
        print(lost + 1)


def test_stop_ends_the_invoke_it_stands_in(either: Pair) -> None:
    first, second, third = (either.ids(n, seed=n) for n in (5, 3, 6))
    got: dict[str, torch.Tensor] = {}
    with either.model.trace() as tracer:
        with tracer.invoke(first):
            either.layers[0].output[0][:, -1] = 0
            got["first"] = either.model.lm_head.output.save()
        with tracer.invoke(second):
            value = either.layers[1].output[0].save()
            assert value.norm().item() > 0
            tracer.stop()
            got["never"] = either.model.lm_head.output.save()
        with tracer.invoke(third):
            either.layers[1].output[0][:, 0] = value[:, -1]
            got["third"] = either.model.lm_head.output.save()
    assert set(got) == {"first", "third"}
    state = main(either.run(second), f"{either.blocks}.1")
    close(value, state)
    zero = edits({f"{either.blocks}.0.output": in_place(lambda x: x[:, -1].zero_())})
    close(got["first"], main(either.run(first, zero), "lm_head"))
    patch = edits({f"{either.blocks}.1.output": in_place(lambda x: x[:, 0].copy_(state[:, -1]))})
    close(got["third"], main(either.run(third, patch), "lm_head"))


def test_stop_between_invokes_leaves_the_trace(gpt2_pair: Pair) -> None:
    got = []
    with gpt2_pair.model.trace() as tracer:
        with tracer.invoke(gpt2_pair.ids()):
            got.append(gpt2_pair.model.lm_head.output.save())
        tracer.stop()
        with tracer.invoke(gpt2_pair.ids()):
            got.append(gpt2_pair.model.lm_head.output.save())
    assert len(got) == 1
    close(got[0], main(gpt2_pair.run(gpt2_pair.ids()), "lm_head"))


def test_stop_in_functions_and_handlers(gpt2_pair: Pair) -> None:
    """It goes through loops, functions, generators and ``except Exception``; ``finally`` runs on its way."""
    seen: list[Any] = []

    def inner(tracer: Any, norm: float) -> None:
        try:
            if norm > 0:
                tracer.stop()
        except Exception:
            seen.append("caught")
        finally:
            seen.append("finally")

    def search(tracer: Any) -> None:
        for i, block in enumerate(gpt2_pair.layers):
            seen.append(block.output[0].save())
            if i == 1:
                inner(tracer, block.output[0].norm().item())

    with gpt2_pair.model.trace(gpt2_pair.ids()) as tracer:
        search(tracer)
        seen.append("behind")
    assert len(seen) == 3 and seen[2] == "finally"
    for i in (0, 1):
        close(seen[i], main(gpt2_pair.run(gpt2_pair.ids()), f"{gpt2_pair.blocks}.{i}"))


def test_stop_at_once_runs_nothing(gpt2_pair: Pair, runs: list[int]) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()) as tracer:
        tracer.stop()
    assert runs == []


def test_stop_outside_of_its_block_is_an_error(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()) as tracer:
        pass
    with pytest.raises(InputError, match="inside its block"):
        tracer.stop()
    with (
        pytest.raises(InputError, match="inside its block"),
        gpt2_pair.model.trace(gpt2_pair.ids()),
    ):
        tracer.stop()


def test_what_was_to_be_checked_at_the_end_is_checked_after_a_stop(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.trace(gpt2_pair.ids()) as tracer:
        cache = tracer.cache(modules=["lm_head"])
        tracer.stop()
    close(cache["model.lm_head"].output, main(gpt2_pair.run(gpt2_pair.ids()), "lm_head"))


# ---- barriers ----


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_barrier_changes_nothing(either: Pair, rounds: int) -> None:
    a, b = either.ids(7), either.ids(4, seed=2)
    got = []
    for reached in (0, rounds):
        with either.model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(a):
                state = either.layers[1].output[0]
                for _ in range(reached):
                    barrier()
                first = either.model.lm_head.output.save()
            with tracer.invoke(b):
                for _ in range(reached):
                    barrier()
                either.layers[0].output[0][:, -1] = state[:, -1]
                second = either.model.lm_head.output.save()
        got.append((first, second))
    assert torch.equal(got[0][0], got[1][0]) and torch.equal(got[0][1], got[1][1])


def test_a_barrier_that_not_all_reach(gpt2_pair: Pair) -> None:
    model, ids = gpt2_pair.model, gpt2_pair.ids()
    for n, who in ((2, [0]), (3, [0, 1]), (2, [0, 0]), (2, [0, 1, 1, 1]), (1, []), (2, [])):
        seen = []

        def trace(n: int = n, who: list[int] = who, seen: list[int] = seen) -> None:
            with model.trace() as tracer:
                barrier = tracer.barrier(n); seen.append(line())  # noqa: E702  # fmt: skip
                for i in range(3):
                    with tracer.invoke(ids):
                        for _ in range(who.count(i)):
                            barrier()
                        model.lm_head.output.save()

        if not who:
            trace()  # nobody waits, so nobody waits in vain
            continue
        with pytest.raises(InputError, match=f"this barrier is for {n} invokes") as caught:
            trace()
        assert caught.value.line == seen[0] and caught.value.file == __file__


def test_barriers_that_cannot_be(gpt2_pair: Pair) -> None:
    for n in (0, -1, 1.5, "2", None, True):
        with pytest.raises(InputError, match="a barrier is for a number of invokes"), gpt2_pair.model.trace() as tracer:
            tracer.barrier(n)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="outside of every invoke"), gpt2_pair.model.trace() as tracer:
        barrier = tracer.barrier(2)
        barrier()


def test_embeddings_move_from_one_invoke_to_the_next() -> None:
    model = LanguageModel("nnsight-go/landmarks", dispatch=True)
    for _ in range(2):
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke("The Eiffel Tower is in"):
                embeddings = model.transformer.wte.output
                barrier()
                there = model.lm_head.output[0, -1].argmax(-1).save()
            with tracer.invoke("_ _ _ _ _ _ _"):
                barrier()
                model.transformer.wte.output = embeddings
                moved = model.lm_head.output[0, -1].argmax(-1).save()
            with tracer.invoke("_ _ _ _ _ _ _"):
                alone = model.lm_head.output[0, -1].argmax(-1).save()
        assert int(moved) == int(there) != int(alone)
    model.close()


# ---- scan ----


def everything(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Saves what every module takes and gives."""
    out: dict[str, torch.Tensor] = {}
    points = model._native.points

    def keep(name: str, x: Any) -> None:
        if isinstance(x, torch.Tensor):
            out[name] = x.save()
        elif isinstance(x, dict):
            for key, item in x.items():
                keep(f"{name}.{key}", item)
        elif isinstance(x, tuple):
            for i, item in enumerate(x):
                keep(f"{name}.{i}", item)

    for module in model.modules():
        if (module.path, 1) in points:
            keep(f"{module.path}.inputs", module.inputs)
            keep(f"{module.path}.output", module.output)
    return out


@pytest.mark.parametrize("rows", [1, 3])
def test_scan_knows_the_sizes_of_everything(either: Pair, rows: int) -> None:
    fresh = LanguageModel(either.directory, tokenizer=False)
    ids = [either.ids(6, seed=i) for i in range(rows)]
    with fresh.scan(ids):
        scanned = everything(fresh)
        used = {name: (x * 2).sum(-1).save() for name, x in scanned.items() if x.dim()}
    assert not fresh.dispatched, "a scan maps no weights"
    with either.model.trace(ids):
        real = everything(either.model)
    assert scanned.keys() == real.keys() and len(real) > 40
    for name, x in scanned.items():
        assert type(x) is torch.Tensor and x.is_meta, name
        assert (x.shape, x.dtype) == (real[name].shape, real[name].dtype), name
    for name, x in used.items():
        assert x.is_meta and x.shape == real[name].shape[:-1], name
    fresh.close()


def test_scan_of_shapes_alone(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.scan(gpt2_pair.ids(5)):
        shape = gpt2_pair.model.transformer.h[0].output[0].shape.save()
        dim = nnsight_go.save(gpt2_pair.model.transformer.h[0].output[0].shape[-1])
    assert shape == (1, 5, 48) and type(shape) is torch.Size and dim == 48


def test_scan_finds_wrong_lines(gpt2_pair: Pair, runs: list[int]) -> None:
    model, seen = gpt2_pair.model, []
    for wrong in (
        lambda h: h @ torch.zeros(3, 3),
        lambda h: h + torch.zeros(47),
        lambda h: h[:, 99],
        lambda h: h.view(5, 5),
        lambda h: torch.cat([h, h[..., :3]], 1),
        lambda h: torch.nn.functional.linear(h, torch.zeros(2, 3)),
    ):

        def scan(wrong: Callable[[torch.Tensor], Any] = wrong) -> None:
            with model.scan(gpt2_pair.ids(5)):
                h = model.transformer.h[0].output[0]
                wrong(h); seen.append(wrong.__code__.co_firstlineno)  # noqa: E702  # fmt: skip
                h.sum()

        with pytest.raises((OpError, IndexError, RuntimeError)) as caught:
            scan()
        assert isinstance(caught.value, OpError), wrong.__code__.co_firstlineno
        assert (caught.value.file, caught.value.line) == (__file__, wrong.__code__.co_firstlineno)
    assert runs == []


def test_scan_has_no_values(gpt2_pair: Pair, runs: list[int]) -> None:
    model = gpt2_pair.model
    for wanting in (
        lambda h: h.sum().item(),
        lambda h: bool(h.sum() > 0),
        lambda h: h.tolist(),
        lambda h: h.numpy(),
        lambda h: f"{h.sum():.2f}",
        lambda h: int(h.argmax()),
    ):
        with pytest.raises(InputError, match=r"scan\(\) knows only shapes") as caught, model.scan(gpt2_pair.ids(5)):
            wanting(model.transformer.h[0].output[0])
        assert caught.value.line == wanting.__code__.co_firstlineno
    with pytest.raises(OpError, match=r"known once it is computed"), model.scan(gpt2_pair.ids(5)):
        h = model.transformer.h[0].output[0]
        h[h > 0].save()
    assert runs == []


def test_scan_with_edits_skip_stop_and_invokes(either: Pair, runs: list[int]) -> None:
    model = either.model
    with model.scan() as tracer:
        with tracer.invoke(either.ids(5)):
            either.layers[0].output[0][:, -1] = 0
            either.layers[1].skip(either.layers[0].output[0] * 2)
            first = model.lm_head.output.save()
            tracer.stop()
            raise AssertionError
        with tracer.invoke(either.ids(3)):
            h = either.layers[1].output[0]
            h += 1
            second = model.lm_head.output[:, -1].save()
            called = model.lm_head(model.get(either.final)(h)).save()
        with tracer.invoke():
            both = model.lm_head.output.save()
            cache = tracer.cache(modules=[either.layers[2]])
    assert (first.shape, second.shape) == ((1, 5, 61), (1, 61))
    assert called.shape == (1, 3, 61) and both.shape == (2, 5, 61)
    assert cache[f"model.{either.blocks}.2"].output[0].shape == (2, 5, either.width)
    assert all(x.is_meta for x in (first, second, called, both))
    assert runs == []


def test_scan_keeps_nothing_else(gpt2_pair: Pair) -> None:
    with gpt2_pair.model.scan(gpt2_pair.ids(5)):
        h = gpt2_pair.model.transformer.h[0].output[0]
    with pytest.raises(NotSavedError):
        h + 1


def test_sizes_after_a_replacement_of_other_sizes(gpt2_pair: Pair) -> None:
    """What a block is told of sizes is what it gets."""
    model = gpt2_pair.model
    with model.trace(gpt2_pair.ids(6)):
        model.transformer.h[0].output[0] = model.transformer.h[0].output[0][:, -2:]
        own = model.transformer.h[0].output[0].shape
        behind = model.transformer.h[2].output[0].shape
        logits = model.lm_head.output
        said = logits.shape
        logits.save()
    assert own == behind == (1, 2, 48)
    assert said == logits.shape == (1, 2, 61)
    with pytest.raises(OpError, match=r"known once it is computed"), model.scan(gpt2_pair.ids(6)):
        model.transformer.h[0].output[0] = model.transformer.h[0].output[0][:, -2:]
        model.lm_head.output.save()


# ---- skip ----


def nan_inside(pair: Pair, layer: int) -> Callable[[], None]:
    """Makes every weight of a block not a number; gives what puts them back."""
    kept = [(p, p.detach().clone()) for p in pair.layers[layer].parameters()]
    with torch.no_grad():
        for p, _ in kept:
            p.fill_(float("nan"))

    def back() -> None:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)

    return back


@pytest.mark.parametrize("form", ["tensor", "tuple", "output"])
def test_skip(either: Pair, form: str) -> None:
    ids = either.ids()
    want = either.run(ids, edits({f"{either.blocks}.1.output": lambda x: main_input(either, ids) * 0.5}))
    back = nan_inside(either, 1)
    try:
        with either.model.trace(ids):
            before = either.layers[0].output
            value = {"tensor": before[0] * 0.5, "tuple": (before[0] * 0.5,), "output": before}[form]
            if form == "output":
                before[0][:] = before[0] * 0.5
            either.layers[1].skip(value)
            given = either.layers[1].output[0].save()
            logits = either.model.lm_head.output.save()
    finally:
        back()
    if form == "output":  # the skipped block's value is the tensor of the block before it
        halved = either.run(ids, edits({f"{either.blocks}.0.output": lambda x: x * 0.5}))
        close(given, main(halved, f"{either.blocks}.0"))
    close(given, main(want, f"{either.blocks}.1"))
    close(logits, main(want, "lm_head"))


def main_input(pair: Pair, ids: list[int]) -> torch.Tensor:
    return main(pair.run(ids), f"{pair.blocks}.0")


def test_skip_in_one_of_several_invokes(either: Pair) -> None:
    prompts = [either.ids(n, seed=n) for n in (5, 3, 6)]
    logits = []
    with either.model.trace() as tracer:
        for i, ids in enumerate(prompts):
            with tracer.invoke(ids):
                if i == 1:
                    either.layers[1].mlp.skip(torch.zeros_like(either.layers[1].mlp.input))
                logits.append(either.model.lm_head.output.save())
    zero = edits({f"{either.blocks}.1.mlp.output": torch.zeros_like})
    for i, (ids, got) in enumerate(zip(prompts, logits, strict=True)):
        close(got, main(either.run(ids, zero if i == 1 else None), "lm_head"))


def test_skip_in_every_invoke_computes_nothing_inside(either: Pair) -> None:
    prompts = [either.ids(5, seed=n) for n in range(2)]
    back, logits = nan_inside(either, 1), []
    try:
        with either.model.trace() as tracer:
            for ids in prompts:
                with tracer.invoke(ids):
                    either.layers[1].skip(either.layers[1].input)
                    logits.append(either.model.lm_head.output.save())
    finally:
        back()
    for ids, got in zip(prompts, logits, strict=True):
        states = main_input(either, ids)
        close(got, main(either.run(ids, edits({f"{either.blocks}.1.output": lambda x, s=states: s})), "lm_head"))


def test_edits_of_a_skipped_module_and_skips_after_a_value(either: Pair) -> None:
    ids = either.ids()
    with either.model.trace(ids):
        before = either.layers[0].output[0]
        assert before.norm().item() > 0
        either.layers[1].skip(before.clone())
        either.layers[1].output[0][:, -1] = 0
        logits = either.model.lm_head.output.save()
    states = main_input(either, ids)

    def change(x: torch.Tensor) -> torch.Tensor:
        out = states.clone()
        out[:, -1] = 0
        return out

    close(logits, main(either.run(ids, edits({f"{either.blocks}.1.output": change})), "lm_head"))


def test_what_is_inside_a_skipped_module_has_no_values(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    block: Envoy = model.transformer.h[1]
    for read in (
        lambda: block.mlp.output,
        lambda: block.attn.c_proj.input,
        lambda: block.ln_1.output.save(),
        lambda: setattr(block.mlp, "output", torch.zeros(1)),
    ):
        with pytest.raises(OutOfOrderError, match="is not computed") as caught, model.trace(gpt2_pair.ids()):
            at = line() + 1
            block.skip(block.input)
            read()
        assert caught.value.other_line == at and caught.value.other_file == __file__
        assert caught.value.line == read.__code__.co_firstlineno


def test_skip_comes_before_the_module_runs(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    block = model.transformer.h[1]
    at = 0
    for before in (
        lambda: block.output[0],
        lambda: block.mlp.input,
        lambda: block.ln_1.output,
        lambda: model.transformer.h[2].input,
        lambda: model.lm_head.output,
    ):
        with pytest.raises(OutOfOrderError, match="has already run") as caught, model.trace(gpt2_pair.ids()):
            h, at = model.transformer.h[0].output[0], line() + 2
            before().save()
            block.skip(h)
        assert caught.value.line == at and caught.value.other_line == before.__code__.co_firstlineno
    with pytest.raises(InputError, match="tuple of 1"), model.trace(gpt2_pair.ids()):
        block.skip((block.input, block.input))
    with pytest.raises(InputError, match="cannot become a int"), model.trace(gpt2_pair.ids()):
        block.mlp.skip(3)


# ---- sessions ----


def test_values_flow_through_a_session(either: Pair) -> None:
    a, b = either.ids(7), either.ids(4, seed=2)
    kept: dict[str, list[torch.Tensor]] = {"all": []}
    with either.model.session():
        with either.model.trace(a):
            state = either.layers[1].output[0][:, -1]
            kept["all"].append(either.layers[0].output[0])
        assert isinstance(state, torch.Tensor), "between its traces values are tensors"
        doubled = state * 2
        with either.model.trace() as tracer:
            with tracer.invoke(b):
                either.layers[1].output[0][:, -1] = doubled
                middle = either.model.lm_head.output
            with tracer.invoke(a):
                either.layers[0].output[0][:] = kept["all"][0] + 1
                last = either.layers[2].output[0]
        with either.model.trace(b):
            either.layers[0].output[0][:, 0] = last[:, -1] + middle.mean()
            out = either.model.lm_head.output.save()
    vector = main(either.run(a), f"{either.blocks}.1")[:, -1] * 2
    want = either.run(b, edits({f"{either.blocks}.1.output": in_place(lambda x: x[:, -1].copy_(vector))}))
    close(middle, main(want, "lm_head"))
    up = either.run(a, edits({f"{either.blocks}.0.output": lambda x: x + 1}))
    close(last, main(up, f"{either.blocks}.2"))
    new = main(up, f"{either.blocks}.2")[:, -1] + main(want, "lm_head").mean()
    want = either.run(b, edits({f"{either.blocks}.0.output": in_place(lambda x: x[:, 0].copy_(new))}))
    close(out, main(want, "lm_head"))


def test_a_session_keeps_no_temporaries(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    with model.session():
        before = _ffi.counters()
        with model.trace(gpt2_pair.ids()):
            kept = model.transformer.h[1].output[0]
            total = sum((block.output[0] * 2 + 1).norm() for block in model.transformer.h)
            for block in model.transformer.h:
                block.mlp.output.exp()
            del block
        after = _ffi.counters()
        assert all(after[key] <= before[key] for key in before), "what nobody holds is not kept"
        assert type(kept) is type(total) is torch.Tensor


def test_a_session_computes_only_what_is_held(gpt2_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = nnsight_go.native.Run.results

    def note(self: Any, adopt: Any) -> Any:
        asked.append(len(adopt or ()))
        return original(self, adopt)

    monkeypatch.setattr(nnsight_go.native.Run, "results", note)
    model = gpt2_pair.model
    with model.session(), model.trace(gpt2_pair.ids()):
        kept = model.transformer.h[1].output[0]
        for block in model.transformer.h:
            block.mlp.output.exp()
        del block
    assert asked == [1]
    close(kept, main(gpt2_pair.run(gpt2_pair.ids()), f"{gpt2_pair.blocks}.1"))


def test_sessions_do_not_nest(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    with pytest.raises(InputError, match="cannot begin inside another one"), model.session(), model.session():
        pass
    with pytest.raises(InputError, match="cannot begin inside a trace"), model.trace(gpt2_pair.ids()), model.session():
        pass
    with model.session():
        pass


@pytest.mark.parametrize("where", ["between", "inside", "engine"])
def test_errors_leave_a_session_clean(gpt2_pair: Pair, where: str) -> None:
    model, ids = gpt2_pair.model, gpt2_pair.ids()
    before = _ffi.counters()
    error = OpError if where == "engine" else KeyError
    with pytest.raises(error), model.session():
        with model.trace(ids):
            state = model.transformer.h[1].output[0]
        with model.trace(ids):
            model.transformer.h[1].output[0][:] = state
            bad = model.transformer.h[1].output[0]
            if where == "inside":
                raise KeyError
            if where == "engine":
                bad = bad @ torch.zeros(2, 2)
        raise KeyError
    assert type(state) is torch.Tensor, "what earlier traces gave stays"
    if where != "between":
        with pytest.raises(NotSavedError):
            bad + 1
    del state, bad
    after = _ffi.counters()
    assert all(after[key] <= before[key] for key in before)
    with model.trace(ids):
        lost = model.transformer.h[1].output[0]
        out = model.lm_head.output.save()
    close(out, main(gpt2_pair.run(ids), "lm_head"))
    with pytest.raises(NotSavedError):
        lost + 1


def test_stop_and_forced_values_in_a_session(gpt2_pair: Pair) -> None:
    model, ids = gpt2_pair.model, gpt2_pair.ids()
    with model.session():
        with model.trace(ids) as tracer:
            state = model.transformer.h[1].output[0]
            assert state.norm().item() > 0
            tracer.stop()
        with model.trace(ids):
            model.transformer.h[0].output[0][:] = state
            norm = model.transformer.h[0].output[0].norm().item()
            out = model.lm_head.output
    hidden = main(gpt2_pair.run(ids), f"{gpt2_pair.blocks}.1")
    assert norm == pytest.approx(float(hidden.norm()), rel=1e-4)
    want = gpt2_pair.run(ids, edits({f"{gpt2_pair.blocks}.0.output": lambda x: hidden}))
    close(out, main(want, "lm_head"))


# ---- result ----


def test_result_is_what_the_model_gives(either: Pair) -> None:
    a, b = either.ids(7), either.ids(4, seed=2)
    with either.model.trace() as tracer:
        with tracer.invoke(a):
            first = tracer.result.logits.save()
        with tracer.invoke(b):
            either.layers[1].output[0][:] = 0
            tracer.result.logits[:, -1] = 5
            second = tracer.result.save()
    close(first, main(either.run(a), "lm_head"))
    want = main(either.run(b, edits({f"{either.blocks}.1.output": torch.zeros_like})), "lm_head").clone()
    want[:, -1] = 5
    close(second.logits, want)
    close(second[0], want)
