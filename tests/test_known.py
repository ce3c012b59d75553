"""Blocks that say what they said before: equal to those that are recorded, whatever happens in them."""

from __future__ import annotations

import copy
import gc
import random
import threading
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_go import InputError, NNsight, NnsightError, NotSavedError, OpError, _ffi, known
from nnsight_go.known import Memo
from nnsight_go.proxy import Proxy
from nnsight_go.wrapping import HostedTracer
from references import at_once

WIDTH = 6


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)]).eval()


@pytest.fixture
def model() -> NNsight:
    return NNsight(network())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function with a model of which nothing is remembered."""

    def call(run: Callable[..., Any], net: nn.Module, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(known, "learn", lambda *_: None)
            return run(NNsight(net), *args)

    return call


def memos(model: NNsight) -> list[Memo]:
    return [m for m in model._hosted.known.values() if isinstance(m, Memo)]


def some(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


# ---- what is remembered ----


def nothing(model: NNsight, x: torch.Tensor) -> list[torch.Tensor]:
    with model.trace(x):
        pass
    return []


def one(model: NNsight, x: torch.Tensor) -> list[torch.Tensor]:
    with model.trace(x):
        out = model[1].output.save()
    return [out]


def several(model: NNsight, x: torch.Tensor) -> list[torch.Tensor]:
    kept = []
    with model.trace(x):
        for layer in (2, 0, 1, 1):
            kept.append(model[layer].output.save())
        kept.append(model[3][0].output.save().save())
    return kept


def edit(model: NNsight, x: torch.Tensor) -> list[torch.Tensor]:
    with model.trace(x):
        model[1].output[:, 1:3] = 0.5
        model[1].output[..., -1] = -0.0
        out = model.output.save()
    return [out]


def edit_and_save(model: NNsight, x: torch.Tensor) -> list[torch.Tensor]:
    with model.trace(x):
        hidden = model[1].output
        hidden[:] = 2
        kept = hidden.save()
        out = model.output.save()
    return [kept, out]


@pytest.mark.parametrize("run", [nothing, one, several, edit, edit_and_save])
def test_in_a_loop(run: Callable[..., Any], model: NNsight, recorded: Callable[..., Any]) -> None:
    before = _ffi.counters()
    kept = []
    for i in range(6):
        x = some(i)
        found = run(model, x)
        kept.append((found, recorded(run, model._module, x)))
        assert len(memos(model)) == 1, "it is remembered, and stays so"
    for found, want in kept:
        assert len(found) == len(want)
        for a, b in zip(found, want, strict=True):
            assert type(a) is torch.Tensor and torch.equal(a, b) and not vars(a)
            assert a.requires_grad == b.requires_grad
    assert not any(m._forward_hooks for m in model._module.modules())
    assert _ffi.counters() == before
    assert torch.overrides._get_current_function_mode_stack() == []


def test_gradients_flow_and_modes_are_told_apart(model: NNsight) -> None:
    for i in range(8):
        with torch.set_grad_enabled(i % 4 < 2):
            (out,) = one(model, some(i))
        assert out.requires_grad == (i % 4 < 2)
    with torch.inference_mode():
        assert one(model, some(0))[0].is_inference()


def test_kinds_of_input(model: NNsight) -> None:
    for i in range(12):
        x = some(i, rows=1 + i % 3)
        assert one(model, x)[0].shape == (1 + i % 3, WIDTH)
    assert torch.equal(one(model, some(0))[0], model._module[:2](some(0)))
    for rows in (2, 3):
        for _ in range(2):
            one(model, some(0, rows))
        (memo,) = memos(model)
        assert memo.layout is model._hosted.latest, "it is of the kind that comes now"


def test_training_is_looked_at(recorded: Callable[..., Any]) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) if self.training else x + 1

    def run(model: NNsight, x: torch.Tensor) -> torch.Tensor:
        with model.trace(x):
            out = model.inner.output.save()
        return out

    model = NNsight(Sometimes())
    for i in range(4):
        assert torch.equal(run(model, some(i)), model._module.inner(some(i)))
    model.eval()
    with pytest.raises(AttributeError, match="not called"):
        run(model, some(0))
    model.train()
    run(model, some(0))


def test_autocast_and_the_default_dtype(model: NNsight) -> None:
    for _ in range(4):
        assert one(model, some(0))[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert one(model, some(0))[0].dtype == model._module[:2](some(0)).dtype
    for _ in range(4):
        edit(model, some(0))
    x, want = some(0), edit(model, some(0))[0]
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(edit(model, x)[0], want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_edited_models_are_others(model: NNsight) -> None:
    for i in range(4):
        one(model, some(i))
    with model.edit(some(0)) as edited:
        edited[0].output[:] = 0
    zero = model._module[1](torch.zeros(1, WIDTH))
    for i in range(4):
        assert torch.equal(one(edited, some(i))[0], zero)
        assert not torch.equal(one(model, some(i))[0], zero)


def test_in_a_session(model: NNsight) -> None:
    for i in range(4):
        one(model, some(i))
    with model.session():
        (first,) = one(model, some(0))
        (second,) = one(model, first)
    assert torch.equal(second, model._module[:2](model._module[:2](some(0))))


# ---- what else may happen ----


def act(model: NNsight, tracer: Any, what: tuple[Any, ...], values: list[Any], kept: list[Any]) -> None:
    """One line of a random block. What was read is in ``values``, what is to be compared in ``kept``."""
    match what:
        case "read", layer:
            values.append(model[layer].output)
        case "inner", layer:
            values.append(model[layer][0].output)
        case ("whole",):
            values.append(model.output)
        case "save", which if values:
            kept.append(values[which % len(values)].save())
        case "store", which, column, value if values:
            values[which % len(values)][:, column] = value
        case "shape", which if values:
            kept.append(list(values[which % len(values)].shape))
        case "add", which if values:
            kept.append((values[which % len(values)] + 1).save())
        case "item", which if values:
            kept.append(round(values[which % len(values)].sum().item(), 4))
        case "input", layer:
            kept.append(model[layer].input.save())
        case ("list",):
            kept.append(list(values).save())
        case ("stop",):
            tracer.stop()
        case ("fail",):
            raise ValueError("the user's own")
        case ("nest",):
            with model.trace(some(0)):
                pass
        case "module", layer:
            kept.append(model[layer](some(1)))
        case "replace", layer if values:
            model[layer].output = values[0] * 2
        case "repr", which if values:
            kept.append(repr(values[which % len(values)]).partition(" from")[0])
        case "odd", which if values:
            values[which % len(values)][:, 99] = 0
        case ("mode",):
            with torch.no_grad():
                values.append(model[2].output)
        case ("graph",):
            kept.append(len(str(tracer.graph).splitlines()))


NUMBERS = [0, 1.5, True, -0.0, float("nan")]
FACTS = "shape add item input module replace repr odd".split()
DEEDS = "list stop fail nest mode graph".split()

Draw = Callable[[random.Random], tuple[Any, ...]]

LINES: list[Draw] = [
    *[lambda draw: ("read", draw.randrange(4))] * 4,
    *[lambda draw: ("save", draw.randrange(4))] * 4,
    *[lambda draw: ("store", draw.randrange(4), draw.randrange(-2, 3), draw.choice(NUMBERS))] * 2,
    lambda draw: ("inner", draw.randrange(4)),
    lambda draw: ("whole",),
]
OTHERS: list[Draw] = [
    *LINES,
    *[lambda draw, name=name: (name, draw.randrange(4)) for name in FACTS],
    *[lambda draw, name=name: (name,) for name in DEEDS],
]


def block(model: NNsight, x: torch.Tensor, lines: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    values: list[Any] = []
    kept: list[Any] = []
    error: BaseException | None = None
    try:
        with model.trace(x) as tracer:
            for line in lines:
                act(model, tracer, line, values, kept)
    except Exception as e:
        error = e
    after = []
    for value in values:
        try:
            after.append(value.sum())
        except Exception as e:
            after.append((type(e), str(e)))
    told = error and (type(error), str(error), [(f.name, f.lineno) for f in traceback.extract_tb(error.__traceback__)])
    return told, [*flat(kept), *after] if error is None else after


def flat(kept: list[Any]) -> list[Any]:
    return [y for x in kept for y in (x if isinstance(x, list) else [x])]


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return type(one) is type(other) and torch.allclose(one, other, equal_nan=True)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("seed", range(150))
def test_random_blocks(seed: int, model: NNsight, recorded: Callable[..., Any]) -> None:
    """One is said until it is remembered, then another one at the same place, with something else in it."""
    draw = random.Random(seed)
    lines = [draw.choice(LINES)(draw) for _ in range(draw.randrange(7))]
    for i in range(3):
        want, found = recorded(block, model._module, some(i), lines), block(model, some(i), lines)
        assert want[0] == found[0] and len(want[1]) == len(found[1]) and all(map(alike, want[1], found[1])), lines
    for i in range(4):
        others = list(lines)
        for _ in range(draw.randrange(3)):
            at = draw.randrange(len(others) + 1)
            others[at : at + draw.randrange(2)] = [draw.choice(OTHERS)(draw)]
        want, found = recorded(block, model._module, some(i), others), block(model, some(i), others)
        assert want[0] == found[0], (lines, others)
        assert len(want[1]) == len(found[1]) and all(map(alike, want[1], found[1])), (lines, others, want, found)
        assert torch.overrides._get_current_function_mode_stack() == []
    assert not any(m._forward_hooks for m in model._module.modules())


def test_random_blocks_are_remembered() -> None:
    """The test above is about something."""
    found = 0
    for seed in range(50):
        draw, model = random.Random(seed), NNsight(network())
        lines = [draw.choice(LINES)(draw) for _ in range(draw.randrange(7))]
        for i in range(3):
            block(model, some(i), lines)
        found += len(memos(model))
    assert found > 20


def test_the_trace_can_be_looked_at(model: NNsight, recorded: Callable[..., Any]) -> None:
    def run(model: NNsight, look: Callable[[Any], Any] | None, during: bool) -> Any:
        with model.trace(some(0)) as tracer:
            model[0].output[:, 0] = 1
            if during and look:
                found = look(tracer)
            out = model.output.save()
        return (found if during else look(tracer)) if look else None, out

    for during in (False, True):
        looks: list[Callable[[Any], Any]] = [lambda t: str(t.graph), lambda t: t.graph.mermaid()]
        for look in [*looks, *([lambda t: str(type(t.result))] if during else [])]:
            for _ in range(3):
                run(model, None, during)
            assert memos(model)
            (want, a), (found, b) = recorded(run, model._module, look, during), run(model, look, during)
            assert (want == found or during) and torch.equal(a, b)
            model._hosted.known.clear()


def test_a_graph_runs_again(model: NNsight) -> None:
    def run(x: torch.Tensor) -> Any:
        with model.trace(x) as tracer:
            model[0].output[:, 0] = 1
            model.output.save()
        return tracer

    for i in range(3):
        tracer = run(some(i))
    assert memos(model)
    (out,) = tracer.graph.run(model, some(5))
    assert torch.equal(out, run(some(5)).graph.run(model)[0])


def test_errors(model: NNsight, recorded: Callable[..., Any]) -> None:
    """Of the module, of an operation, of values that were not saved: as ever."""

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fails, self.calls = nn.Linear(WIDTH, WIDTH), False, True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.fails:
                raise RuntimeError("the module's own")
            return self.inner(x) if self.calls else x

    def run(model: NNsight) -> list[Any]:
        try:
            with model.trace(some(0)):
                lost = model.inner.output
                lost[:, 0] = 0
                out = model.inner.output.save()
        except Exception as e:
            frames = [(f.name, f.lineno) for f in traceback.extract_tb(e.__traceback__)]
            error: Any = (type(e), str(e), frames)
        else:
            error = out.sum().item()
        try:
            lost.sum()
        except NotSavedError as e:
            return [error, str(e)]
        return [error]

    net = Picky()
    model, other = NNsight(net), NNsight(net)

    def want() -> list[Any]:
        return recorded(lambda _: run(other), net)

    for _ in range(3):
        assert run(model) == want()
    assert memos(model) and not memos(other)
    net.fails = True
    assert run(model) == want() and run(model)[0][0] is RuntimeError
    net.fails, net.calls = False, False
    found = run(model)
    assert found == want() and found[0][0] is InputError
    assert not memos(model), "another pass may go another way"
    net.calls = True
    for _ in range(3):
        assert run(model) == want()
    assert memos(model)


def test_an_operation_fails(model: NNsight) -> None:
    def run(x: torch.Tensor, column: int) -> torch.Tensor:
        with model.trace(x):
            model[0].output[:, column] = 1
            out = model.output.save()
        return out

    for _ in range(4):
        with pytest.raises(OpError, match="out of bounds") as e:
            run(some(0), 99)
        assert "[:, column] = 1" in str(e.value)
        run(some(0), 1)


def test_looks_from_inside_of_the_pass(model: NNsight, recorded: Callable[..., Any]) -> None:
    """A hook of the user's sees the trace as it is when its block has ended."""

    def run(model: NNsight, look: Callable[[Any, Any, Any], Any] | None) -> list[Any]:
        seen = []
        with model.trace(some(0)) as tracer:
            lost = model[0].output
            kept = model[1].output.save()

        def hook(*_: Any) -> None:
            try:
                seen.append(look and look(model, again, lost_again))
            except Exception as e:
                seen.append((type(e), str(e).partition("your line")[0]))

        with model.trace(some(0)) as again:
            lost_again = model[0].output
            kept = model[1].output.save()
            handle = model._module[0].register_forward_hook(hook) if look else None
        if handle:
            handle.remove()
        for value in (lost, lost_again):
            try:
                value.sum()
            except Exception as e:
                seen.append((type(e), str(e)))
        assert type(kept) is torch.Tensor
        return [seen, kept, str(again.graph), str(tracer.graph)]

    looks: list[Any] = [
        lambda model, tracer, lost: lost.shape,
        lambda model, tracer, lost: repr(lost),
        lambda model, tracer, lost: len(tracer.graph.recording.nodes),
        lambda model, tracer, lost: model[0].output,
        lambda model, tracer, lost: NNsight(network()).trace(some(0)).__enter__(),
    ]
    for look in looks:
        for _ in range(3):
            run(model, None)
        want, found = recorded(run, model._module, look), run(model, look)
        assert want[0] == found[0] and torch.equal(want[1], found[1]) and want[2:] == found[2:]
        model._hosted.known.clear()


def test_what_changes_between_the_call_and_the_block(model: NNsight) -> None:
    def run(x: torch.Tensor, between: Callable[[], Any] | None = None) -> torch.Tensor:
        tracer = model.trace(x)
        if between:
            between()
        with tracer:
            hidden = model[0].output
            out = model.output.save()
        assert hidden is not None
        return out

    *_, want = [run(some(0)) for _ in range(4)]
    assert memos(model)

    def edit_it() -> None:
        with model.edit(some(0), inplace=True):
            model[0].output[:] = 0

    with model.session():
        assert torch.equal(run(some(0)), want)
    assert torch.equal(run(some(0), edit_it), want), "the edit came later than the trace"
    assert not torch.equal(run(some(0)), want)


def test_the_tracer_is_one(model: NNsight) -> None:
    for _ in range(4):
        with model.trace(some(0)) as tracer:
            out = model.output.save()
        assert isinstance(tracer, HostedTracer) and weakref.ref(tracer)() is tracer and "graph" in dir(tracer)
        assert copy.copy(tracer) is not tracer and out.shape == (1, WIDTH)
    assert not hasattr(Proxy, "_rec")


def test_other_threads_are_told(model: NNsight) -> None:
    said: list[str] = []

    def look(value: Any) -> None:
        try:
            value.shape  # noqa: B018
        except NnsightError as e:
            said.append(str(e))

    for _ in range(4):
        with model.trace(some(0)):
            hidden = model[0].output
            other = threading.Thread(target=look, args=(hidden,))
            other.start()
            other.join()
            model.output.save()
    assert len(said) == 4 and all("belongs to another trace, which is still being recorded" in s for s in said)


def test_the_root_with_backward_hooks(model: NNsight, recorded: Callable[..., Any]) -> None:
    """What hooks of the root are given last is what it gives, but for backward hooks."""

    def run(model: NNsight) -> tuple[torch.Tensor, list[torch.Tensor]]:
        seen: list[torch.Tensor] = []
        handle = model._module.register_full_backward_hook(lambda m, given, got: seen.append(got[0]))
        x = some(0).requires_grad_()
        with model.trace(x):
            out = model.output.save()
        out.sum().backward()
        handle.remove()
        assert x.grad is not None
        return x.grad, seen

    for _ in range(4):
        (want, a), (found, b) = recorded(run, model._module), run(model)
        assert torch.equal(want, found) and len(a) == len(b)


def test_threads(model: NNsight) -> None:
    def work(model: NNsight) -> None:
        for i in range(200):
            assert torch.equal(several(model, some(i))[0], model._module[:3](some(i)))

    at_once(work, [NNsight(network()) for _ in range(4)])


def test_nothing_is_kept() -> None:
    gc.collect()
    gc.disable()
    try:
        model = NNsight(network())
        inputs = []
        for i in range(5):
            x = some(i)
            inputs.append(weakref.ref(x))
            one(model, x)
            edit(model, x)
        net = weakref.ref(model._module)
        assert len(memos(model)) == 2
        del x
        assert all(ref() is None for ref in inputs)
        del model
        assert net() is None, "no cycle keeps it"
    finally:
        gc.enable()


def test_places_are_few(model: NNsight) -> None:
    """A place that says something else each time is given up, and so are more places than a few."""
    for i in range(20):
        block(model, some(0), [("read", i % 4), ("save", 0)])
    assert not memos(model)
    for i in range(100):
        scope: dict[str, Any] = {"model": model, "x": some(0)}
        exec(compile("with model.trace(x):\n    out = model[0].output.save()", f"<{i}>", "exec"), scope)
    assert len(model._hosted.known) <= 64
