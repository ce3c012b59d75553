"""Wrapped modules: traces of them are what plain hooks would see and do."""

from __future__ import annotations

import copy
import gc
import os
import pathlib
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from nnsight_go import InputError, ModulePathError, NNsight, NnsightError, OpError, OutOfOrderError, _ffi
from nnsight_go.hosting import structure, tensors
from references import at_once
from zoo import ZOO

Change = Callable[[torch.Tensor], torch.Tensor]


def flat(value: Any) -> list[torch.Tensor]:
    """The tensors of a structured value, in order."""
    found = tensors(structure(value), value)
    assert found is not None
    return [x for x in found if x is not None]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-4, atol=1e-4)


def plain(module: nn.Module, args: Any, kwargs: Any, change: dict[str, Change] | None = None) -> dict[str, Any]:
    """What hooks see of a forward pass: by path, the outputs of each call; some outputs are changed."""
    seen: dict[str, Any] = {}
    handles = []
    for path, m in module.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            continue  # which takes no hooks by that way

        def hook(m: Any, a: Any, output: Any, path: str = path) -> Any:
            if change and path in change and path not in seen:
                first = flat(output)[0]
                new = change[path](first)
                output = _with_first(output, new)
            # a copy, since whoever called the module may change what it gave
            seen.setdefault(path, []).append(output if isinstance(output, torch.Tensor) else copy.copy(output))
            return output

        handles.append(m.register_forward_hook(hook))
    try:
        module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _with_first(value: Any, new: torch.Tensor) -> Any:
    from nnsight_go.hosting import replaced

    def name(v: Any, at: str = "") -> str | None:
        if isinstance(v, torch.Tensor):
            return at
        items = v.items() if hasattr(v, "items") else enumerate(v) if isinstance(v, tuple | list) else vars(v).items()
        for k, x in items:
            key = v._fields[k] if hasattr(v, "_fields") else k
            found = (
                name(x, f"{at}.{key}" if at else str(key))
                if not isinstance(x, int | str | float | type(None))
                else None
            )
            if found is not None:
                return found
        return None

    key = name(value)
    assert key is not None
    return replaced(value, {key: new})


def at(model: NNsight, path: str) -> Any:
    return model.get(path) if path else model


def first_of(value: Any) -> tuple[Any, Callable[[Any, Any], None]]:
    """The first tensor of what a trace gives, and how it is assigned where it lies in a structure."""
    return next(iter(_proxies(value))), lambda v, new: None


def _proxies(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if hasattr(value, "values") else value if isinstance(value, tuple | list) else []
    return [p for item in items for p in _proxies(item)]


@pytest.fixture(params=list(ZOO))
def case(request: pytest.FixtureRequest) -> tuple[NNsight, Any, Any]:
    module, args, kwargs = ZOO[request.param]()
    return NNsight(module), args, kwargs


Case = tuple[NNsight, Any, Any]


def called(case: Case) -> dict[str, Any]:
    """Paths of modules that run, and what they give first."""
    model, args, kwargs = case
    torch.manual_seed(1)
    with torch.random.fork_rng():
        return plain(copy.deepcopy(model._module), args, kwargs)


def test_every_output(case: Case) -> None:
    model, args, kwargs = case
    torch.manual_seed(1)
    want = plain(copy.deepcopy(model._module), args, kwargs)
    torch.manual_seed(1)
    found = {}
    with model.trace(*args, **kwargs):
        for path in want:
            found[path] = [p.save() for p in _proxies(at(model, path).output)]
    assert len(want) >= 2 or len(list(model._module.modules())) <= 2
    for path, outputs in want.items():
        expected = flat(outputs[0])
        assert len(found[path]) == len(expected), path
        for got, one in zip(found[path], expected, strict=True):
            close(got, one)


@pytest.mark.parametrize("how", ["replace", "in place", "after a value"])
def test_edits(case: Case, how: str) -> None:
    model, args, kwargs = case
    paths = [
        p for p, outputs in called(case).items() if p and flat(outputs[0]) and flat(outputs[0])[0].is_floating_point()
    ]
    for path in paths[:: max(len(paths) // 4, 1)]:
        torch.manual_seed(1)
        want = plain(copy.deepcopy(model._module), args, kwargs, {path: lambda x: x * 0.5 + 1})
        torch.manual_seed(1)
        with torch.no_grad() if how == "in place" else torch.enable_grad(), model.trace(*args, **kwargs):
            module = at(model, path)
            value = _proxies(module.output)[0]
            if how == "after a value":
                assert float(value.float().abs().sum()) >= 0
            if how == "in place":
                value *= 0.5
                value += 1
            elif isinstance(module.output, torch.Tensor):
                module.output = value * 0.5 + 1
            else:
                _assign_first(module.output, value * 0.5 + 1)
            out = [p.save() for p in _proxies(model.output)]
        for got, one in zip(out, flat(want[""][0]), strict=True):
            close(got, one)


def _assign_first(value: Any, new: Any) -> None:
    keys = value.keys() if hasattr(value, "keys") else range(len(value))
    for key in keys:
        if isinstance(value[key], torch.Tensor):
            value[key] = new
            return
        if _proxies(value[key]):
            return _assign_first(value[key], new)


def test_the_module_is_as_it_was(case: Case) -> None:
    model, args, kwargs = case
    module = model._module
    before = {k: v.clone() for k, v in module.state_dict().items()} if not module.training else None
    attributes = {path: set(vars(m)) for path, m in module.named_modules()}
    with model.trace(*args, **kwargs):
        for path in called(case):
            [p.save() for p in _proxies(at(model, path).output)]
    for path, m in module.named_modules():
        assert not (m._forward_hooks or m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs), path
        assert set(vars(m)) == attributes[path]
    if before is not None:
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[key]), key
    copy.deepcopy(module)
    if "Inner" not in repr(module) and "Tagger" not in repr(module) and "Recursive" not in repr(module):
        pickle.loads(pickle.dumps(module))


def test_gradients(case: Case) -> None:
    model, args, kwargs = case
    paths = [p for p, outs in called(case).items() if p and flat(outs[0]) and flat(outs[0])[0].requires_grad]
    path = paths[len(paths) // 2] if paths else ""
    reference = copy.deepcopy(model._module)
    torch.manual_seed(1)
    seen = plain(reference, args, kwargs)
    loss = next(x for x in flat(seen[""][0]) if x.requires_grad)
    theirs = flat(seen[path][0])[0]
    want = torch.autograd.grad(loss.float().tanh().sum(), theirs, allow_unused=True)[0]
    if want is None:
        pytest.skip("the loss does not depend on it")
    torch.manual_seed(1)
    with model.trace(*args, **kwargs):
        value = _proxies(at(model, path).output)[0]
        index = next(i for i, x in enumerate(flat(seen[""][0])) if x.requires_grad)
        with _proxies(model.output)[index].float().tanh().sum().backward():
            grad = value.grad.save()
    close(grad, want)
    model._module.zero_grad()


def test_training_is_as_without_a_trace() -> None:
    module, args, kwargs = ZOO["dropping"]()
    traced = copy.deepcopy(module)
    for step in range(3):
        torch.manual_seed(step)
        want = module(*args, **kwargs)
        torch.manual_seed(step)
        with NNsight(traced).trace(*args, **kwargs) as tracer:
            out = tracer.result.save()
        close(out, want)
    for a, b in zip(module.state_dict().values(), traced.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert int(module[1].num_batches_tracked) == 3


# ---- calls ----


def test_a_module_that_is_called_several_times() -> None:
    module, args, kwargs = ZOO["recurrent"]()
    model = NNsight(module)
    want = plain(module, args, kwargs)
    with model.trace(*args):
        states = [model.cell.output.save()]
        for _ in range(3):
            states.append(model.cell.next().output.save())
    for got, one in zip(states, want["cell"], strict=True):
        close(got, one)
    with model.trace(*args):
        model.cell.next(2).output[:] = 0
        out = model.output.save()
    calls = iter(range(4))
    handle = module.cell.register_forward_hook(lambda m, a, y: y * 0 if next(calls) == 2 else y)
    close(out, module(*args))
    handle.remove()
    with (
        pytest.raises(ModulePathError, match="is called 4 times in this forward pass, so it has no call 4"),
        model.trace(*args),
    ):
        model.cell.next(4).output.save()


def test_one_module_by_two_names() -> None:
    module, args, kwargs = ZOO["structured"]()
    model = NNsight(module)
    want = plain(module, args, kwargs)
    with model.trace(*args, **kwargs):
        first = model.tied.output.save()
        second = model.again.next().output.save()
    close(first, want["tied"][0])
    close(second, want["tied"][1])


def test_inputs_by_position_and_by_name() -> None:
    module, args, kwargs = ZOO["structured"]()
    model = NNsight(module)
    with model.trace(*args, **kwargs):
        (x,), named = model.inner.inputs
        x, scale, flag = x.save(), named["scale"].save(), named["flag"]
        model.inner.inputs[1]["scale"] = scale * 10
        first = model.inner.output.first.save()
        out = model.output.save()
    assert torch.equal(x, args[0]) and scale.tolist() == [2.0] and flag is True
    close(first, module.inner.linear(x) * 20)
    assert out.count == 2 and out.missing is None and torch.equal(out.states[0], first)


def test_modules_that_do_not_run() -> None:
    module = zoo.Moody()
    module.unused = nn.Linear(2, 2)
    model = NNsight(module)
    with (
        pytest.raises(ModulePathError, match="model.unused is not called in this forward pass"),
        model.trace(torch.randn(1, 4)),
    ):
        model.unused.output.save()


def test_a_pass_that_goes_another_way() -> None:
    model = NNsight(zoo.Moody())
    x = torch.randn(1, 4)
    right = 0
    for _ in range(30):
        before = model._module.coin.getstate()
        try:
            with model.trace(x):
                out = model.a.output.save()
        except (InputError, ModulePathError) as e:
            assert "not called in this forward pass" in str(e)
            continue
        close(out, model._module.a(x))
        right += 1
        assert model._module.coin.getstate() != before
    assert 0 < right < 30


# ---- several inputs ----


def test_invokes(case: Case) -> None:
    model, args, kwargs = case
    outs, alone = [], []
    torch.manual_seed(1)
    with model.trace() as tracer:
        for _ in range(2):
            with tracer.invoke(*args, **kwargs):
                outs.append([p.save() for p in _proxies(model.output)])
    torch.manual_seed(1)
    reference = copy.deepcopy(model._module)
    reference.load_state_dict(model._module.state_dict())
    if model._module.training:
        return  # statistics have gone on: test_training_is_as_without_a_trace
    for _ in range(2):
        alone.append(flat(reference(*args, **kwargs)))
    for got, want in zip(outs, alone, strict=True):
        for a, b in zip(got, want, strict=True):
            close(a, b)


def test_values_go_from_invoke_to_invoke() -> None:
    module, _, _ = ZOO["mlp"]()
    model, x, y = NNsight(module), torch.randn(2, 6), torch.randn(2, 6)
    with model.trace() as tracer:
        with tracer.invoke(x):
            state = model[1].output
        with tracer.invoke(y):
            model[1].output = state
            patched = model.output.save()
        with tracer.invoke(y):
            assert float(model[1].output.sum()) == float(torch.relu(module[0](y)).sum())
            same = model.output.save()
    close(patched, module(x))
    close(same, module(y))


# ---- values in the middle ----


def test_values_on_demand() -> None:
    module, args, _ = ZOO["mlp"]()
    model = NNsight(module)
    passes = []
    with model.trace(*args):
        model.output.save()  # a kind of input that is new is tried out on fake tensors
    handle = module.register_forward_hook(lambda *_: passes.append(threading.current_thread()))
    with model.trace(*args):
        hidden = model[1].output
        if hidden.sum() > 0:
            hidden *= 2
        largest = int(hidden.argmax())
        again = float(model[2].output.sum())
        out = model.output.save()
    want = module[2](torch.relu(module[0](*args)) * 2)
    close(out, want)
    assert largest >= 0 and abs(again - float(want.sum())) < 1e-4
    assert len(passes) == 1 and passes[0] is not threading.current_thread()
    with model.trace(*args):
        model.output.save()
    assert passes[1] is threading.current_thread(), "a trace that needs no value stays on its thread"
    handle.remove()


def test_the_pass_has_the_callers_state() -> None:
    seen = []

    class Curious(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
            return y

    model = NNsight(Curious())
    for around in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        seen.clear()
        with around(), model.trace(torch.randn(1, 2)):
            float(model.linear.output.sum())
            now = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
            model.output.save()
        assert seen[-1] == now


def test_a_block_that_raises_ends_the_pass() -> None:
    module, args, _ = ZOO["mlp"]()
    model = NNsight(module)
    before, threads = _ffi.counters(), threading.active_count()
    for _ in range(3):
        with pytest.raises(KeyError), model.trace(*args):
            float(model[1].output.sum())
            raise KeyError
    assert threading.active_count() == threads
    assert not module[1]._forward_hooks
    gc.collect()
    assert _ffi.counters()["tensors"] == before["tensors"]
    with model.trace(*args):
        out = model.output.save()
    close(out, module(*args))


def test_stop() -> None:
    module, args, _ = ZOO["mlp"]()
    model, ran = NNsight(module), []
    with model.trace(*args):
        model.output.save()  # a kind of input that is new is tried out on fake tensors
    handle = module[2].register_forward_hook(lambda *_: ran.append(1))
    for value in (False, True):
        with model.trace(*args) as tracer:
            hidden = model[1].output.save()
            if value:
                float(hidden.sum())
            tracer.stop()
        close(hidden, torch.relu(module[0](*args)))
        assert not ran
    with model.trace(*args):
        model[1].output.save()
    assert ran == [1], "a pass runs to its end"
    with model.trace(*args):
        pass
    assert ran == [1, 1]
    handle.remove()


# ---- what goes wrong ----


def test_a_forward_that_raises() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.linear(x)
            raise ValueError("the module's own error")

    model = NNsight(Broken())
    for value in (False, True):
        with pytest.raises(ValueError, match="the module's own error") as raised, model.trace(torch.randn(1, 2)):
            y = model.linear.output.save()
            if value:
                float(y.sum())
                model.linear.output.save()
        assert any(entry.name == "forward" for entry in raised.traceback)
    with (
        pytest.raises(RuntimeError, match="mat1 and mat2 shapes"),
        NNsight(nn.Linear(3, 2)).trace(torch.randn(1, 2)) as t,
    ):
        t.result.save()


def test_an_operation_that_fails_names_its_line() -> None:
    module, args, _ = ZOO["mlp"]()
    model = NNsight(module)
    with pytest.raises(NnsightError) as raised, model.trace(*args):
        (model[1].output @ torch.zeros(3, 3)).save()
    assert "your line" in str(raised.value) and "torch.zeros(3, 3)" in str(raised.value)


def test_mistakes() -> None:
    module, args, kwargs = ZOO["structured"]()
    model = NNsight(module)
    with pytest.raises(InputError, match="wraps a torch.nn.Module, not a str"):
        NNsight("gpt2")  # type: ignore[arg-type]
    with pytest.raises(ModulePathError, match="has no 'innr'"):
        _ = model.innr
    with pytest.raises(InputError, match="has a value only inside a trace"):
        _ = model.inner.output
    with pytest.raises(InputError, match="cannot become"), model.trace(*args, **kwargs):
        model.inner.output = 3
    with pytest.raises(OutOfOrderError), model.trace(*args, **kwargs):
        model.output.save()
        model.inner.linear.output = torch.zeros(3, 4)


@pytest.mark.parametrize("name", ZOO)
def test_a_scan_tells_the_sizes_of_a_trace_and_runs_nothing(name: str) -> None:
    module, args, kwargs = ZOO[name]()
    model, ran = NNsight(module), []
    layout = model._hosted.layout((args, kwargs))
    paths = [p for p in model._hosted.modules if (p, 1) in layout.points][-3:]
    hook = module.register_forward_hook(lambda *_: ran.append(1))
    with model.scan(*args, **kwargs):
        scanned = [flat_proxies(model.get(p).output) for p in paths]
    assert not ran
    hook.remove()
    with model.trace(*args, **kwargs):
        traced = [flat_proxies(model.get(p).output) for p in paths]
    told = [[(x.shape, x.dtype) for x in xs] for xs in scanned]
    assert told == [[(x.shape, x.dtype) for x in xs] for xs in traced]
    assert all(x.device.type == "meta" for xs in scanned for x in xs)


def flat_proxies(value: Any) -> list[torch.Tensor]:
    """The tensors of a value of a trace, saved."""
    return [x.save() for x in flat(value)]


def test_a_scan_of_a_module_without_data_and_of_what_does_not_fit() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to("meta")
    model = NNsight(module)
    with model.scan(torch.rand(3, 4)):
        wide = (model[1].output @ torch.zeros(8, 5)).save()
        model[1].output[:, 0] = 0
        out = model.output.save()
    assert (wide.shape, out.shape, out.device.type) == ((3, 5), (3, 2), "meta")
    with pytest.raises(OpError) as raised, model.scan(torch.rand(3, 4)):
        _ = model[1].output @ torch.zeros(3, 3)
    assert "model[1].output @ torch.zeros(3, 3)" in str(raised.value)
    with pytest.raises(InputError, match="knows only shapes"), model.scan(torch.rand(3, 4)):
        float(model.output.sum())
    with model.scan() as scanner:
        for rows in (1, 2):
            with scanner.invoke(torch.rand(rows, 4)):
                last = model.output.save()
    assert last.shape == (2, 2)


def test_second_names() -> None:
    module, args, kwargs = ZOO["vae"]()
    path = "decoder.0"
    model = NNsight(module, rename={path: "chosen", "mean": ["mu", "average"]})
    assert model.chosen is model.get(path) and model.mu is model.mean is model.average
    with model.trace(*args, **kwargs):
        one, other = model.mu.output.save(), model.chosen.output.save()
    assert one.shape == (4, 2) and other.shape == (4, 8)
    with pytest.raises(InputError, match="no module of this model is named 'nothing'"):
        NNsight(module, rename={"nothing": "x"})
    with pytest.raises(InputError, match="it is taken"):
        NNsight(module, rename={path: "output"})


def test_an_output_that_changes_its_structure() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = Shape(), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            return self.out(y if isinstance(y, torch.Tensor) else y[0])

    class Shape(nn.Module):
        pairs = False

        def forward(self, x: torch.Tensor) -> Any:
            return (x, x) if self.pairs else x

    model = NNsight(Fickle())
    x = torch.randn(1, 2)
    with model.trace(x):
        model.inner.output.save()
    model._module.inner.pairs = True
    with pytest.raises(InputError, match="another structure than before: a tuple of 2"), model.trace(x):
        model.inner.output.save()
    with model.trace(x):
        assert len(model.inner.output) == 2


def test_a_tensor_that_is_not_there_this_time() -> None:
    class Maybe(nn.Module):
        there = True

        def forward(self, x: torch.Tensor) -> Any:
            return x + 1, x * 2 if self.there else None

    model, x = NNsight(nn.Sequential(Maybe())), torch.ones(1, 2)
    with model.trace(x):
        kept = [y.save() for y in model[0].output]
    assert kept[1][0, 0] == 2
    model._module[0].there = False
    with (
        pytest.raises(NnsightError, match="1 of the output of 0 is None in this forward pass") as raised,
        model.trace(x),
    ):
        model[0].output[1].save()
    assert "model[0].output[1].save()" in str(raised.value)
    with model.trace(x):
        assert model[0].output[1] is None
        first = model[0].output[0].save()
    close(first, x + 1)


def test_what_is_read_is_what_the_module_gave() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    x = torch.randn(2, 3)
    with NNsight(module).trace(x) as tracer:
        before, after = tracer.model[0].output.save(), tracer.model.output.save()
    want = plain(module, (x,), {})
    close(before, want["0"][0])  # which the next module has changed
    close(after, want[""][0])
    assert before.data_ptr() == after.data_ptr() and after.grad_fn is not None
    after.sum().backward()
    assert module[0].weight.grad is not None


# ---- memory and threads ----


def test_memory_stays_flat() -> None:
    module, args, _ = ZOO["mlp"]()
    model = NNsight(module)

    def once(edit: bool, value: bool) -> None:
        with torch.no_grad(), model.trace(*args):
            hidden = model[1].output
            if edit:
                hidden[:, 0] = 0
            if value:
                float(hidden.sum())
            model.output.save()

    def resident() -> int:
        statm = pathlib.Path("/proc/self/statm")  # Linux has it
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0

    for i in range(1000):
        once(i % 2 == 0, i % 10 == 0)
    gc.collect()
    before, threads, memory = _ffi.counters(), threading.active_count(), resident()
    for i in range(10_000):
        once(i % 2 == 0, i % 100 == 0)
    gc.collect()
    assert _ffi.counters() == before
    assert threading.active_count() == threads
    assert resident() - memory < 8 << 20


def test_modules_are_freed() -> None:
    before = _ffi.counters()["handles"]
    module, args, _ = ZOO["mlp"]()
    model, gone = NNsight(module), weakref.ref(module)
    with model.trace(*args):
        model[1].output.save()
    del module, model
    gc.collect()
    assert gone() is None
    assert _ffi.counters()["handles"] == before


def test_threads_on_modules_of_their_own() -> None:
    def work(seed: int) -> None:
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        model, x = NNsight(module), torch.randn(4, 6)
        for k in range(20):
            with model.trace(x):
                model[1].output = model[1].output * 2
                if k % 5 == 0:
                    float(model[1].output.sum())
                out = model.output.save()
            close(out, module[2](torch.relu(module[0](x)) * 2))

    at_once(work, range(8))


def test_a_block_in_a_loop_does_what_it_says_each_time() -> None:
    """Where each line is done is remembered from trace to trace: nothing else may be."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 4)).eval()
    nn.init.ones_(net[0].weight), nn.init.ones_(net[0].bias)  # dropout shows in what is not zero
    model, x = NNsight(net), torch.rand(2, 4)
    for i, factor, rows in [(0, 1.0, 2), (0, 2, 2), (1, 2.0, 2), (1, True, 3), (0, 0.5, 2), (3, 0.5, 3)]:
        given = torch.rand(rows, 4)
        with model.trace(given):
            model[i].output[:] *= factor
            scaled = model[i].output.save()
            if factor == 2.0:
                model[3].output = scaled + x
            out = model.output.save()
        first = net[: i + 1](given) * factor
        torch.testing.assert_close(scaled, first)
        torch.testing.assert_close(out, first + x if factor == 2.0 else net[i + 1 :](first))
    for training in (True, False, True):
        net.train(training)
        with model.trace(x):
            dropped = model[2].output.save()
        assert (dropped == net[:2](x)).all() != training
    assert len(model._hosted.schedules) < 8
    for other in (x, x.clone()):  # changed where the block ends, so that it is not what its line meant
        with model.trace(x):
            used = (model[0].output + other).save()
            want = net[0](x) + other
            if other is not x:
                other.zero_()
        torch.testing.assert_close(used, want)


def test_threads_on_one_module() -> None:
    module, args, _ = ZOO["mlp"]()
    model = NNsight(module)

    def work(factor: float) -> None:
        for k in range(20):
            with model.trace(*args):
                model[1].output = model[1].output * factor
                if k % 5 == 0:
                    float(model[1].output.sum())
                out = model.output.save()
            close(out, module[2](torch.relu(module[0](*args)) * factor))

    at_once(work, map(float, range(1, 5)))


# ---- what comes with a trace ----


def test_cache() -> None:
    module, args, _ = ZOO["mlp"]()
    model = NNsight(module)
    with model.trace(*args) as tracer:
        cache = tracer.cache(include_inputs=True)
        model[0].output[:] *= 2
    want = plain(module, args, {}, {"0": lambda x: x * 2})
    assert set(cache) == {"model", "model.0", "model.1", "model.2"}
    for path in ("0", "1", "2"):
        close(cache[f"model.{path}"].output, want[path][0])
    assert torch.equal(cache["model.0"].inputs[0][0], args[0])
    with model.trace(*args) as tracer:
        some = tracer.cache(modules=[model[1]])
    assert set(some) == {"model.1"}


def test_session_and_barrier() -> None:
    module, args, _ = ZOO["mlp"]()
    model = NNsight(module)
    with model.session():
        with model.trace(*args):
            state = model[1].output
        with model.trace(*args):
            model[1].output = state * 2
            out = model.output.save()
    close(out, module[2](torch.relu(module[0](*args)) * 2))


def test_calls_without_a_trace() -> None:
    module, args, _ = ZOO["mlp"]()
    model = NNsight(module)
    assert torch.equal(model(*args), module(*args))
    assert torch.equal(model.trace(*args, trace=False), module(*args))
    assert model[0].weight is module[0].weight and model.training and not model.eval().training
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in module.named_parameters()]
    with model.trace(*args):
        lens = model[2](model[1].output).save()
        out = model.output.save()
    close(lens, out)


def test_a_cache_of_all_invokes() -> None:
    module, args, _ = ZOO["mlp"]()
    model, x = NNsight(module), args[0]
    with model.trace() as tracer:
        cache = tracer.cache()
        some = tracer.cache(modules=[model[1], "2"], include_inputs=True)
        with tracer.invoke(x):
            model[0].output[:] = 0
        with tracer.invoke(x * 2):
            pass
    assert list(cache) == ["model", "model.0", "model.1", "model.2"] and list(some) == ["model.1", "model.2"]
    assert not cache["model.0"][0].output.any()
    close(cache["model.2"][1].output, module(x * 2))
    close(some.model[1][1].input, module[0](x * 2))
    with model.trace() as tracer:
        none = tracer.cache()
    assert not none
    with pytest.raises(ModulePathError, match="not called"), NNsight(Loose()).trace() as tracer:
        tracer.cache(modules="unused")
        with tracer.invoke(x):
            pass


class Loose(nn.Module):
    """Has a module that it does not call, and one that it calls by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)
        self.again = self.used

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.used(x))


def test_a_cache_of_a_module_with_two_names() -> None:
    module, x = Loose(), torch.randn(2, 6)
    model = NNsight(module)
    with model.trace(x) as tracer:
        cache = tracer.cache()
        one = tracer.cache(modules=model.again)
    for found in (cache["model.again"], cache.model.again, one["model.used"], one["model.again"], one.model.used):
        close(found.output, module.used(x))
    assert list(cache) == ["model", "model.used"] and list(one) == ["model.used"]


class Sometimes(nn.Module):
    """Gives a second tensor, or none, as it is told."""

    class Inner(nn.Module):
        both = True

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return x, x * 2 if self.both else None

    def __init__(self) -> None:
        super().__init__()
        self.inner = Sometimes.Inner()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x)[0]
        return out


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_what_is_not_there_is_named(forced: bool, used: bool) -> None:
    module, x = Sometimes(), torch.randn(2, 3)
    model = NNsight(module)
    with model.trace(x):
        model.inner.output[1].save()
    module.inner.both = False
    missing = pytest.raises(InputError, match="1 of the output of inner is None in this forward pass")
    with missing as caught, model.trace(x):
        if forced:
            assert model.inner.input.sum() < 1e9
        second = model.inner.output[1]
        (second * 2 if used else second).save()
    assert caught.value.path == "inner" and caught.value.file == __file__


def test_names_with_a_colon() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a:1": nn.Linear(4, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.parts["a:1"](self.parts["a"](self.parts["a"](x))) + 1
            return self.parts["b"](out)  # type: ignore[no-any-return]

    module, x = Named(), torch.randn(3, 4)
    model, a = NNsight(module), module.parts["a"]
    for forced in (False, True):
        with model.trace(x) as tracer:
            if forced:
                assert model.parts["a"].output.sum() < 1e9
            second = model.parts["a"].next().output.save()
            other = model.parts["a:1"].output.clone().save()
            model.parts["a:1"].output[:] = 0
            cache = tracer.cache()
            assert model.source.add_0.output.shape == (3, 4)
            out = model.output.save()
        close(second, a(a(x)))
        close(other, module.parts["a:1"](second))
        close(out, module.parts["b"](torch.ones(3, 4)))
        assert not cache["model.parts.a:1"].output.any()
    with model.edit(x) as edited:
        edited.parts["a:1"].skip(torch.ones(3, 4))
    close(edited.trace(x, trace=False), module.parts["b"](torch.full((3, 4), 2.0)))


def test_compiled_modules_run_as_they_were_written_where_something_in_them_is_named() -> None:
    for kind in ("module.compile()", "torch.compile"):
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())), torch.randn(3, 4)
        want, plain = net[1][0](net[0](x)), net(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "torch.compile":
                net[1] = torch.compile(net[1], backend="eager")
            else:
                net[1].compile(backend="eager")
            net(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = NNsight(net)
            inner = model[1]._orig_mod[0] if kind == "torch.compile" else model[1][0]
            for forced in (False, True):
                with model.trace(x):
                    if forced:
                        assert model[0].output.detach().sum() < 1e9
                    got = inner.output.clone().save()
                    inner.output[:] = 0
                    out = model.output.save()
                close(got, want)
                assert not out.any()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            close(net(x), plain)


def test_an_invoke_is_entered_once() -> None:
    module, args, _ = ZOO["mlp"]()
    with NNsight(module).trace() as tracer:
        invoke = tracer.invoke(*args)
        with invoke:
            pass
        with pytest.raises(InputError, match="an invoke is entered once"):
            invoke.__enter__()


def test_what_an_invoke_means_ends_with_it() -> None:
    module, args, _ = ZOO["mlp"]()
    model = NNsight(module)
    with model.trace() as tracer:
        with pytest.raises(ZeroDivisionError), tracer.invoke(*args):
            assert isinstance(model.output, torch.Tensor)
            raise ZeroDivisionError
        with pytest.raises(InputError, match="outside of every invoke"):
            model.output  # noqa: B018
