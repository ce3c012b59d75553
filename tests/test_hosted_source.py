"""``.source`` of wrapped modules: the torch calls that a forward makes itself, read and changed in its middle."""

from __future__ import annotations

import gc
import math
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

import zoo
from nnsight_go import InputError, ModulePathError, NNsight, OutOfOrderError, _ffi
from nnsight_go.operations import named
from test_hosted import at_once, close, flat
from zoo import ZOO


class Block(nn.Module):
    """An MLP beside a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.down(self.act(self.up(x))) * 0.5
        return torch.tanh(x + h) + 1


class Attention(nn.Module):
    """Attention as it is written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = (y.view(b, s, 2, 4).transpose(1, 2) for y in self.qkv(x).split(8, -1))
        pattern = F.softmax(q @ k.transpose(-1, -2) / math.sqrt(4), -1)
        return self.out((pattern @ v).transpose(1, 2).reshape(b, s, 8))

    def by_hand(self, x: torch.Tensor, change: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The pattern, and what comes of a changed one."""
        b, s, _ = x.shape
        q, k, v = (y.view(b, s, 2, 4).transpose(1, 2) for y in self.qkv(x).split(8, -1))
        pattern = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        return pattern, self.out((change(pattern) @ v).transpose(1, 2).reshape(b, s, 8))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.attention = Block(), Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x) - self.block(x + 1)
        return self.attention(torch.cat([y, y], -1)).sum(0)


@pytest.fixture
def block() -> tuple[Block, NNsight, torch.Tensor]:
    torch.manual_seed(0)
    module = Block()
    return module, NNsight(module), torch.randn(3, 4)


Made = tuple[Block, NNsight, torch.Tensor]


def nothing_is_left(module: nn.Module) -> None:
    assert not _get_current_function_mode_stack()
    for m in module.modules():
        assert not (m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called)


# ---- which there are ----


def test_the_calls_of_a_module_and_not_of_those_inside(block: Made) -> None:
    module, model, x = block
    with model.trace(x):
        assert list(model.source) == ["mul_0", "add_0", "tanh_0", "add_1"]
        assert len(model.source) == 4 and dir(model.source) == sorted(model.source)
        assert repr(model.source) == (
            "model (Block) calls\n"
            "  mul_0   [3, 4] float32\n"
            "  add_0   [3, 4] float32\n"
            "  tanh_0  [3, 4] float32\n"
            "  add_1   [3, 4] float32"
        )
        assert list(model.up.source) == ["linear_0"] and list(model.act.source) == ["gelu_0"]
        assert repr(model.up.source.linear_0) == "model.up.source.linear_0: [3, 8] float32"
        assert model.get("up.source.linear_0").path == "up.source.linear_0"
        middle = model.source.add_0.output.save()
    close(middle, x + module.down(F.gelu(module.up(x))) * 0.5)
    nothing_is_left(module)


def test_names_of_functions() -> None:
    names = [
        "add",
        "add_",
        "__add__",
        "__radd__",
        "__iadd__",
        "relu_",
        "__matmul__",
        "__rsub__",
        "__rpow__",
        "__iand__",
    ]
    assert [named(name) for name in names] == "add add add add add relu matmul sub pow and".split()
    assert [named(name) for name in ("add.Tensor", "<lambda>", "radians", "index_add")] == [
        "add", "call", "radians", "index_add",
    ]  # fmt: skip


def test_wrong_names(block: Made) -> None:
    _, model, x = block
    with pytest.raises(ModulePathError, match="model calls no operator 'ad_0'") as error, model.trace(x):
        _ = model.source.ad_0
    assert (error.value.hint or "").startswith("Nearest: add_0")
    with pytest.raises(ModulePathError, match="model.up calls no operator 'q'") as error, model.trace(x):
        _ = model.up.source.q
    assert error.value.hint == "It calls linear_0."
    with pytest.raises(ModulePathError, match="no input"), model.trace(x):
        _ = model.up.source.linear_0.input
    nothing_is_left(model._module)


def test_outside_of_a_trace(block: Made) -> None:
    _, model, x = block
    with pytest.raises(InputError, match="model.source is known of an input") as error:
        print(model.source)
    assert "model.scan(x)" in (error.value.hint or "")
    with model.scan(x):
        shape = model.source.add_0.output.shape
    assert shape == (3, 4)
    assert list(model.source) == ["mul_0", "add_0", "tanh_0", "add_1"]
    assert list(model.up.source) == ["linear_0"]
    with pytest.raises(InputError, match="has a value only inside a trace"):
        _ = model.source.add_0.output


# ---- values ----


@pytest.mark.parametrize("how", ["straight", "out of order", "value"])
@pytest.mark.parametrize("edit", ["in place", "whole"])
def test_edits(block: Made, edit: str, how: str) -> None:
    module, model, x = block
    with model.trace(x):
        add = model.source.add_0.output
        before = add.clone().save()
        if how == "value":
            assert float(add.detach().sum()) < 1e3
        if edit == "in place":
            add[:, 0] = 5
        else:
            model.source.add_0.output = add * 2
        out, hidden = model.output.save(), model.source.tanh_0.output
        if how == "out of order":
            hidden = hidden + model.up.output.sum()
        hidden = hidden.save()
    h = x + module.down(F.gelu(module.up(x))) * 0.5
    close(before, h)
    h = torch.cat([torch.full((3, 1), 5.0), h[:, 1:]], 1) if edit == "in place" else h * 2
    close(out, torch.tanh(h) + 1)
    close(hidden, torch.tanh(h) + (module.up(x).sum() if how == "out of order" else 0))
    close(model(x), torch.tanh(x + module.down(F.gelu(module.up(x))) * 0.5) + 1)
    nothing_is_left(module)


@pytest.mark.parametrize("value", [False, True])
def test_a_pattern_of_attention(value: bool) -> None:
    torch.manual_seed(0)
    module, x = Attention(), torch.randn(2, 5, 8)
    model = NNsight(module)

    def silent(pattern: torch.Tensor) -> torch.Tensor:
        pattern = pattern.clone()
        pattern[:, 1] = 0
        return pattern

    want, changed = module.by_hand(x, silent)
    with torch.no_grad(), model.trace(x):
        pattern = model.source.softmax_0.output
        if value:
            assert abs(float(pattern.sum()) - 2 * 2 * 5) < 1e-4
        kept = pattern.clone().save()
        pattern[:, 1] = 0
        out = model.output.save()
    close(kept, want)
    close(out, changed)
    with model.trace(x):
        q, _, v = model.source.split_0.output
        shape = q.shape
        model.source.split_0.output[2] = v * 0
        scores, out = model.source.div_0.output.save(), model.output.save()
    assert shape == (2, 5, 8)
    close(scores.softmax(-1), want)
    close(out, module.out.bias.expand(2, 5, 8))


def test_a_module_that_is_called_twice() -> None:
    torch.manual_seed(0)
    module, x = Two(), torch.randn(2, 3, 4)
    model = NNsight(module)
    with model.trace(x):
        assert list(model.source) == ["add_0", "sub_0", "cat_0", "sum_0"]
        source = model.block.source
        first = source.add_0.output.save()
        model.block.next()
        assert list(model.block.source) == list(source)
        second = source.add_0.output
        kept = second.clone().save()
        second[:] = 0
        out = model.source.sub_0.output.save()
    inner = module.block
    close(first, x + inner.down(F.gelu(inner.up(x))) * 0.5)
    close(kept, x + 1 + inner.down(F.gelu(inner.up(x + 1))) * 0.5)
    close(out, inner(x) - 1)
    with pytest.raises(ModulePathError, match="calls no operator 'add_0'"), model.trace(x):
        model.block.next(2).source.add_0.output.save()


def test_one_module_by_two_names() -> None:
    module, args, kwargs = ZOO["structured"]()
    model = NNsight(module)
    with model.trace(*args, **kwargs) as tracer:
        first = model.again.source.linear_0.output.save()
        second = model.tied.next().source.linear_0.output.save()
        cache = tracer.cache(modules=model.source.add_0)
        out = model.output.save()
    close(module.tied(first), second)
    close(cache["model.source.add_0"].output, out.logits)


@pytest.mark.parametrize("named_before", [True, False])
def test_a_value_in_the_middle(block: Made, named_before: bool) -> None:
    module, model, x = block
    with model.trace(x):
        if named_before:
            add = model.source.add_0.output
            if float(add.detach().abs().sum()) > 0:
                model.source.tanh_0.output *= 0
            later = model.source.add_1.output.save()
        else:
            assert float(model.up.output.detach().abs().sum()) > 0
            with pytest.raises(InputError, match="for the first time after a value was needed") as error:
                _ = model.source.add_0
            later = model.output.save()
    close(later, torch.ones(3, 4) if named_before else module(x))
    if not named_before:
        assert "Name it before" in (error.value.hint or "")
        model._hosted.layout(((x,), {}))
        with model.trace(x):
            _ = model.source
    with model.trace(x):  # a model whose operations were asked for shows them in every pass that waits
        assert float(model.up.output.detach().abs().sum()) > 0
        late = model.source.add_0.output.save()
    close(late, x + module.down(F.gelu(module.up(x))) * 0.5)
    nothing_is_left(module)


def test_the_order_of_operations_and_modules(block: Made) -> None:
    _, model, x = block
    with pytest.raises(OutOfOrderError, match="source.add_0.output has already run"), model.trace(x):
        model.source.tanh_0.output.save()
        model.source.add_0.output = x
    with pytest.raises(OutOfOrderError, match="up.output has already run"), model.trace(x):
        model.up.output.save()  # an access point that is named before any operation is
        model.source.mul_0.output.save()
        model.up.output = x.repeat(1, 2)
    with model.trace(x):
        late = model.source.tanh_0.output
        early = model.source.add_0.output
        both = (late - early.tanh()).save()
    close(both, torch.zeros(3, 4))


def test_lines_at_modules_are_no_calls_of_theirs(block: Made) -> None:
    module, model, x = block
    with model.trace(x):
        model.inputs[0][0][:] *= 1
        model.up.output = model.up.output + 1  # an addition that is not the module's
        model.down.output += model.down.output.sum() * 2
        add = model.source.add_0.output.save()
        out = model.output.save()
    inner = module.down(F.gelu(module.up(x) + 1))
    inner = inner + inner.sum() * 2
    close(add, x + inner * 0.5)
    close(out, torch.tanh(x + inner * 0.5) + 1)


def test_gradients(block: Made) -> None:
    module, model, x = block
    with model.trace(x):
        add, up = model.source.add_0.output, model.up.source.linear_0.output
        with (model.output**2).sum().backward():
            grads = up.grad.save(), add.grad.save()
    up = module.up(x)
    add = x + module.down(F.gelu(up)) * 0.5
    wants = torch.autograd.grad(((torch.tanh(add) + 1) ** 2).sum(), (up, add))
    for got, want in zip(grads, wants, strict=True):
        close(got, want)
    module.zero_grad()


def test_invokes(block: Made) -> None:
    module, model, x = block
    y = torch.randn(2, 4)
    with model.trace() as tracer:
        with tracer.invoke(x):
            state = model.up.output  # known before operations are asked for
        with tracer.invoke(x):
            middle = model.source.add_0.output
        with tracer.invoke(y):
            model.source.add_0.output[:] = middle[:2]
            out = model.output.save()
            state = state.save()
    add = x + module.down(F.gelu(module.up(x))) * 0.5
    close(out, torch.tanh(add[:2]) + 1)
    close(state, module.up(x))
    model = NNsight(ZOO["recurrent"]()[0].cell)  # a cell whose sizes are free
    recurrent = NNsight(ZOO["recurrent"]()[0])
    with pytest.raises(InputError, match="others than for the invokes before it"), recurrent.trace() as tracer:
        for length in (2, 3):
            with tracer.invoke(torch.randn(1, length, 4)):
                recurrent.out.source.linear_0.output.save()


def test_the_cache_and_stop(block: Made) -> None:
    module, model, x = block
    ran = []
    with model.trace(x) as tracer:
        cache = tracer.cache(modules=[model.source.add_0, "up.source.linear_0"])
    close(cache["model.up.source.linear_0"].output, module.up(x).detach())
    assert set(cache) == {"model.source.add_0", "model.up.source.linear_0"}
    handle = module.register_forward_hook(lambda *_: ran.append(1))
    with model.trace(x) as tracer:
        model.source.add_0.output.save()
        tracer.stop()
    assert not ran
    handle.remove()
    nothing_is_left(module)


def test_a_call_that_changes_its_tensor() -> None:
    class Changing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 1
            x += 2
            x.relu_()
            return x.T.T

    model, x = NNsight(Changing()), torch.tensor([[-3.0, 1.0]])
    with model.trace(x):
        assert list(model.source) == ["mul_0", "add_0", "relu_0"]
        added = model.source.add_0.output
        seen = added.clone().save()
        added *= -1
        out = model.output.save()
    assert seen.tolist() == [[-1.0, 3.0]] and out.tolist() == [[1.0, 0.0]]


# ---- forwards that are odd ----


def test_errors_that_the_forward_catches() -> None:
    class Bad(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            (x - 1).missing  # noqa: B018
            return x

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad = Bad()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                x = self.bad(x)
            except AttributeError:
                x = x + 2
            return x * 3

    model, x = NNsight(Careful()), torch.ones(2)
    for value in (False, True):
        with model.trace(x):
            assert list(model.source) == ["add_0", "mul_0"] and list(model.bad.source) == ["sub_0"]
            if value:
                assert float(model.source.add_0.output.sum()) == 6
            model.source.add_0.output *= 2
            out = model.output.save()
        assert out.tolist() == [18, 18]
    nothing_is_left(model._module)


def test_a_forward_that_raises() -> None:
    class Broken(nn.Module):
        broken = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            if self.broken:
                raise ValueError("the module's own error")
            return y * 2

    model, x = NNsight(nn.Sequential(Broken())), torch.ones(2)
    with model.trace(x):
        model[0].source.add_0.output.save()
    model._module[0].broken = True
    for value in (False, True):
        with pytest.raises(ValueError, match="the module's own error"), model.trace(x):
            y = model[0].source.add_0.output.save()
            if value:
                float(y.sum())
        nothing_is_left(model._module)
    model._module[0].broken = False
    with model.trace(x):
        y = model[0].source.mul_0.output.save()
    assert y.tolist() == [4, 4]


def test_a_call_that_does_not_happen_this_time() -> None:
    class Fickle(nn.Module):
        more = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 + 1 if self.more else x * 2

    model, x = NNsight(Fickle()), torch.ones(2)
    with model.trace(x):
        model.source.add_0.output.save()
    model._module.more = False
    with pytest.raises(InputError, match="source.add_0 was not called in this forward pass"), model.trace(x):
        model.source.add_0.output.save()
    with model.trace(x):
        assert list(model.source) == ["mul_0"]


def test_a_pass_that_goes_another_way() -> None:
    model, right = NNsight(zoo.Moody()), 0
    x = torch.randn(1, 4)
    for _ in range(30):
        try:
            with model.trace(x):
                out = model.out.source.linear_0.output.save()
        except InputError as e:
            assert "goes another way" in str(e) or "in this forward pass" in str(e)
            continue
        assert out.shape == (1, 2)
        right += 1
    assert right > 0


def test_scripted_and_compiled_modules() -> None:
    module, args, _ = ZOO["scripted"]()
    model = NNsight(module)
    with model.trace(*args):
        assert not len(model[1].source) and list(model[2].source) == ["linear_0"]
        model[1].output[:, 0] = 0
        out = model[2].source.linear_0.output.save()
    hidden = module[1](module[0](*args))
    hidden[:, 0] = 0
    close(out, module[2](hidden))

    for in_place in (False, True):
        torch.manual_seed(0)
        compiled, x = nn.Sequential(nn.Linear(3, 3), Block4(), nn.Linear(3, 2)), torch.randn(2, 3)
        want = compiled(x)
        if in_place:
            compiled[1].compile(backend="eager")
        else:
            compiled[1] = torch.compile(compiled[1], backend="eager")
        close(compiled(x), want)
        model = NNsight(compiled)
        for value in (False, True):
            with warnings.catch_warnings(), model.trace(x):
                warnings.simplefilter("ignore")
                first = model[0].source.linear_0.output
                if value:
                    float(first.detach().sum())
                first *= 1
                out = model[2].source.linear_0.output.save()
            close(out, want)
        close(compiled(x), want)


class Block4(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x)) + x


def test_a_transform_inside() -> None:
    class Mapped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.vmap(lambda row: row.sin() * 2)(x) + 1

    model, x = NNsight(Mapped()), torch.randn(2, 3)
    with model.trace(x):
        assert list(model.source) == ["add_0"]
        out = model.source.add_0.output.save()
    close(out, x.sin() * 2 + 1)


# ---- many modules ----


@pytest.mark.parametrize("how", ["at once", "after a value"])
@pytest.mark.parametrize("name", ZOO)
def test_every_operation(name: str, how: str) -> None:
    module, args, kwargs = ZOO[name]()
    model = NNsight(module)

    def read(value: bool) -> dict[str, list[Any]]:
        torch.manual_seed(1)
        found = {}
        with torch.no_grad(), model.trace(*args, **kwargs):
            for path, m in model.named_modules():
                if (model._hosted.paths[path], 1) not in model._hosted.points:
                    continue
                for op in m.source:
                    leaves = flat(getattr(m.source, op).output)
                    assert leaves
                    found[f"{path}.{op}"] = [(tuple(x.shape), x.dtype) for x in leaves], [x.save() for x in leaves]
            if value:
                _, first = next(iter(found.values()))
                float(first[0].float().sum())
        return found

    before = {key: value.clone() for key, value in module.state_dict().items()}
    one = read(how == "after a value")
    if module.training:
        module.load_state_dict(before)  # statistics have gone on
    other = read(False)
    assert one.keys() == other.keys() and one
    for key, (told, values) in one.items():
        assert told == [(tuple(x.shape), x.dtype) for x in values], key
        for x, y in zip(values, other[key][1], strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)
    nothing_is_left(module)


def test_traces_that_ask_for_none_know_nothing_of_them() -> None:
    module, args, _ = ZOO["mlp"]()
    model = NNsight(module)
    seen = []

    def hook(m: Any, a: Any, y: Any) -> None:
        seen.append((len(_get_current_function_mode_stack()), len(m._forward_hooks)))

    handle = module[0].register_forward_hook(hook)
    with model.trace(*args):
        model.output.save()
    seen.clear()
    with model.trace(*args):
        model[1].output[:] = 0
        model.output.save()
    assert seen == [(0, 1)]
    layout = model._hosted.layout((args, {}))
    assert not layout.operations and not model._hosted._insides
    handle.remove()


def test_memory_and_threads() -> None:
    module, args, _ = ZOO["mlp"]()
    model = NNsight(module)

    def work(factor: float) -> None:
        for k in range(20):
            with model.trace(*args):
                relu = model[1].source.relu_0.output
                if k % 5 == 0:
                    float(relu.detach().sum())
                model[1].source.relu_0.output = relu * factor
                out = model.output.save()
            close(out, module[2](torch.relu(module[0](*args)) * factor))

    at_once(work, range(4))
    gc.collect()
    before, running = _ffi.counters(), threading.active_count()
    at_once(work, range(4))
    gc.collect()
    assert _ffi.counters() == before and threading.active_count() == running
    nothing_is_left(module)
