"""Invokes of a wrapped module that share a forward pass: each is as if it were alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_go import InputError, NNsight
from nnsight_go.hosting import mapped
from test_hosted import _proxies, _with_first, at, close, flat
from zoo import ZOO


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Counted:
    """Counts the passes of a module while it is entered."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self.passes = module, 0

    def __enter__(self) -> Counted:
        def count(*_: Any) -> None:
            self.passes += 1

        self._handle = self._module.register_forward_hook(count)
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle.remove()


def like(x: torch.Tensor) -> torch.Tensor:
    """Another input of the same kind."""
    return torch.randn_like(x) if x.is_floating_point() else x[:, torch.randperm(x.shape[1])]


@pytest.mark.parametrize("name", ZOO)
def test_an_edit_in_one_of_three(name: str) -> None:
    module, args, kwargs = ZOO[name]()
    if name == "dropping":
        pytest.skip("its rows know of each other: test_random_numbers_and_statistics_are_as_without_a_trace")
    model = NNsight(module)
    inputs = [(args, kwargs), mapped((args, kwargs), like), mapped((args, kwargs), like)]
    seen: list[str] = []
    handles = [
        m.register_forward_hook(lambda m, a, y, p=path: seen.append(p))
        for path, m in module.named_modules()
        if path and not isinstance(m, torch.jit.ScriptModule)
    ]
    torch.manual_seed(0)
    module(*args, **kwargs)
    for handle in handles:
        handle.remove()
    path = seen[len(seen) // 2] if seen else ""

    def wanted(i: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        inner: list[torch.Tensor] = []

        def hook(m: Any, a: Any, y: Any) -> Any:
            if inner:
                return None
            out = _with_first(y, flat(y)[0] * 1.5) if i == 1 else y
            inner.extend(t.clone() for t in flat(out))
            return out

        handle = module.get_submodule(path).register_forward_hook(hook)
        try:
            return inner, flat(module(*inputs[i][0], **inputs[i][1]))
        finally:
            handle.remove()

    torch.manual_seed(1)
    reference = [wanted(i) for i in range(3)]
    torch.manual_seed(1)
    got = []
    with model.trace() as tracer:
        for i, (a, k) in enumerate(inputs):
            with tracer.invoke(*a, **k):
                inner = at(model, path).output
                if i == 1:
                    _proxies(inner)[0][:] *= 1.5
                got.append([[p.save() for p in _proxies(inner)], [p.save() for p in _proxies(model.output)]])
    for (inner, out), (want_inner, want_out) in zip(got, reference, strict=True):
        for a, b in zip([*inner, *out], [*want_inner, *want_out], strict=True):
            close(a, b)


def test_a_sweep_is_one_pass() -> None:
    module = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
    model, inputs = NNsight(module), [torch.randn(1 + i % 2, 8) for i in range(40)]
    outs = []

    def sweep() -> None:
        outs.clear()
        with model.trace() as tracer:
            for i, x in enumerate(inputs):
                with tracer.invoke(x):
                    model[1].output[:, i % 8] = 0
                    model[2].output = model[2].output + i
                    outs.append(model.output.save())

    sweep()
    with Counted(module) as counted:
        sweep()
    assert counted.passes == 1
    for i, (x, out) in enumerate(zip(inputs, outs, strict=True)):
        h = module[1](module[0](x))
        h[:, i % 8] = 0
        close(out, module[3](module[2](h) + i))


class Mean(nn.Module):
    """Rows that know of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.linear(x)
        return self.out(h - h.mean(0, keepdim=True))


def test_what_knows_its_neighbours() -> None:
    module = Mean()
    model, a, b = NNsight(module), torch.randn(3, 4), torch.randn(3, 4)
    with Counted(module) as counted:
        for times in range(2):
            with model.trace() as tracer:
                with tracer.invoke(a):
                    one = model.output.save()
                with tracer.invoke(b):
                    two = model.output.save()
            close(one, module.out(module.linear(a) - module.linear(a).mean(0, keepdim=True)))
            close(two, module.out(module.linear(b) - module.linear(b).mean(0, keepdim=True)))
            if times == 0:
                counted.passes = 0
    assert counted.passes == 2  # and not looked at again


def test_random_numbers_and_statistics_are_as_without_a_trace() -> None:
    module, (x,), _ = ZOO["dropping"]()
    model, plain = NNsight(module), copy.deepcopy(module)
    torch.manual_seed(3)
    with model.trace() as tracer:
        with tracer.invoke(x):
            one = model.output.save()
        with tracer.invoke(x + 1):
            two = model.output.save()
    torch.manual_seed(3)
    close(one, plain(x))
    close(two, plain(x + 1))
    for got, want in zip(module.buffers(), plain.buffers(), strict=True):
        close(got.float(), want.float())


def test_where_rows_lie() -> None:
    """Tokens flattened into one axis, and rows on the second one."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.turned = nn.Linear(4, 4), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.turned(self.inner(x.flatten(0, 1)).view_as(x).transpose(0, 1)).sum(-1).T

    module = Flat()
    model, inputs = NNsight(module), [torch.randn(n, 5, 4) for n in (1, 2, 3)]

    def look() -> list[Any]:
        got = []
        with model.trace() as tracer:
            for x in inputs:
                with tracer.invoke(x):
                    model.inner.output[:, 0] = 7
                    got.append((model.inner.output.save(), model.turned.output.save(), model.output.save()))
        return got

    look()
    with Counted(module) as counted:
        got = look()
    assert counted.passes == 1
    for x, (inner, turned, out) in zip(inputs, got, strict=True):
        want = module.inner(x.flatten(0, 1))
        want[:, 0] = 7
        close(inner, want)
        close(turned, want.view_as(x).transpose(0, 1))
        close(out, want.view_as(x).sum(-1))


def test_rows_on_a_declared_axis() -> None:
    module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0).eval()
    model, inputs = NNsight(module, batch_dim=1), [torch.randn(5, n, 8) for n in (1, 2)]
    with Counted(module) as counted, model.trace() as tracer:
        outs = []
        for x in inputs:
            with tracer.invoke(x):
                model.linear1.output[..., 0] = 3
                outs.append(model.linear1.output.save())
                outs.append(model.output.save())
    assert counted.passes <= 3  # one, and what a new kind of input is tried out with
    handle = module.linear1.register_forward_hook(
        lambda m, a, y: torch.cat([torch.full_like(y[..., :1], 3), y[..., 1:]], -1)
    )
    for x, inner, out in zip(inputs, outs[::2], outs[1::2], strict=True):
        close(out, module(x))
        assert inner.shape == (5, x.shape[1], 16)
    handle.remove()


def test_a_replacement_of_other_sizes_has_a_pass_of_its_own() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model, x = NNsight(module), torch.randn(2, 4)
    with model.trace() as tracer:
        with tracer.invoke(x):
            model[0].output = torch.cat([model[0].output, model[0].output])
            double = model.output.save()
        with tracer.invoke(x + 1):
            model[1].output[:] += 1
            other = model.output.save()
    close(double, torch.cat([module(x)] * 2))
    close(other, module[2](module[1](module[0](x + 1)) + 1))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.out = nn.Embedding(6, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        h = x + self.positions(torch.arange(x.shape[1]))  # of all rows
        return self.out(mask @ h)


def test_what_rows_share() -> None:
    module, mask = Masked(), torch.randn(6, 6).tril()
    model, inputs = NNsight(module), [torch.randn(2, 6, 4), torch.randn(1, 6, 4)]
    for _ in range(2):
        with Counted(module) as counted, model.trace() as tracer:
            got = []
            for x in inputs:
                with tracer.invoke(x, mask=mask):
                    got.append((model.positions.output.save(), model.output.save()))
    assert counted.passes == 1
    for x, (positions, out) in zip(inputs, got, strict=True):
        close(positions, module.positions.weight)
        close(out, module(x, mask))
    with model.trace() as tracer:  # what one changes of it is not the others'
        with tracer.invoke(inputs[0], mask=mask):
            model.positions.output[:] = 0
            one = model.output.save()
        with tracer.invoke(inputs[1], mask=mask):
            two = model.output.save()
    close(one, module.out(mask @ inputs[0]))
    close(two, module(inputs[1], mask))


def test_autograd_keeps_them_apart() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model, x = NNsight(module), torch.randn(1, 4)
    with torch.enable_grad():
        with model.trace() as tracer:
            with tracer.invoke(x):
                one = model.output.save()
            with tracer.invoke(x * 2):
                two = model.output.save()
        one.sum().backward()
        two.sum().backward()  # of a graph of its own
    assert module[0].weight.grad is not None


# ---- an invoke without an input ----


def _layers() -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])


@pytest.mark.parametrize("grad", [False, True])
def test_the_whole_batch(grad: bool) -> None:
    module, a, b = _layers(), torch.randn(2, 8), torch.randn(3, 8)
    model = NNsight(module)
    got: dict[str, torch.Tensor] = {}

    def look() -> None:
        with torch.set_grad_enabled(grad), model.trace() as tracer:
            with tracer.invoke(a):
                model[0].output[:, 0] = 7
                got["first"] = model[1].output.save()
            with tracer.invoke(b):
                model[1].output = model[1].output * 2
                got["second"] = model[1].output.save()
            with tracer.invoke():
                assert model[1].output.shape == (5, 8)
                got["before"] = model[1].output.clone().save()
                model[1].output[1:3] = 0  # the last row of one and the first of the other
                got["after"] = model[1].output.save()
                got["out"] = model.output.save()

    look()
    with Counted(module) as counted:
        look()
    assert counted.passes == 1
    h = module[0](a).detach()
    h[:, 0] = 7
    first, second = module[1](h), module[1](module[0](b)) * 2
    close(got["first"], first)
    close(got["second"], second)
    want = torch.cat([first, second]).detach()
    close(got["before"], want)
    want[1:3] = 0
    close(got["after"], want)
    close(got["out"], module[3](module[2](want)))
    assert got["out"].requires_grad == grad


def test_the_whole_batch_of_one_and_of_those_that_say_nothing() -> None:
    module, a = Mean(), torch.randn(3, 4)
    model = NNsight(module)
    with model.trace() as tracer:
        with tracer.invoke(a):
            model.linear.output[0] = 0
        with tracer.invoke():
            one = model.output.save()
    h = module.linear(a)
    h[0] = 0
    close(one, module.out(h - h.mean(0, keepdim=True)))
    with model.trace() as tracer:  # rows that know of each other may be seen together
        for part in (a[:1], a[1:]):
            with tracer.invoke(part):
                pass
        with tracer.invoke():
            both = model.output.save()
    close(both, module(a))


def test_values_for_the_whole_batch() -> None:
    module, a, b = _layers(), torch.randn(1, 8), torch.randn(1, 8)
    model = NNsight(module)
    with model.trace() as tracer:
        with tracer.invoke(a):
            h = model[1].output
        with tracer.invoke(b):
            model[2].output[:] = h
        with tracer.invoke():
            model[3].output[:] += h
            out = model.output.save()
            cache = tracer.cache(modules=[model[2]])
    assert cache["model.2"].output.shape == (2, 8)
    h = module[1](module[0](a))
    close(out, torch.cat([module[3](module[2](h)), module[3](h)]) + h)
    with model.scan() as tracer:
        for x in (a, b):
            with tracer.invoke(x):
                pass
        with tracer.invoke():
            out = model.output.save()
    assert out.is_meta and out.shape == (2, 8)


def test_what_the_whole_batch_refuses() -> None:
    module, a, b = _layers(), torch.randn(1, 8), torch.randn(2, 8)
    model, mixing = NNsight(module), NNsight(Mean())

    def refused(model: NNsight, why: str, first: Any, second: Any, last: Any, inputs: Any = (a, b)) -> None:
        with pytest.raises(InputError, match=why) as caught, model.trace() as tracer:
            with tracer.invoke(inputs[0]):
                first()
            with tracer.invoke(inputs[1]):
                second()
            with tracer.invoke():
                last()
        assert caught.value.file == __file__

    def nothing() -> None: ...

    read = lambda: model[1].output.save()  # noqa: E731
    refused(model, "differ in more than the number", read, nothing, nothing, (a, torch.randn(2, 3, 8)))
    refused(model, "needs a value", read, nothing, lambda: float(model.output.sum()))
    refused(model, "needed a value", lambda: float(model.output.sum()), nothing, nothing)
    refused(model, "asks for gradients", read, nothing, lambda: model.output.sum().backward())
    refused(model, "leaves a module out", lambda: model[1].skip(model[0].output), nothing, nothing)
    refused(model, "leaves a module out", nothing, nothing, lambda: model[1].skip(model[0].output))

    def longer() -> None:
        model[1].output = torch.cat([model[1].output] * 2)

    refused(model, "other sizes", longer, nothing, nothing)
    reads = lambda: mixing.output.save()  # noqa: E731
    refused(
        mixing, "the model takes or gives is not made of the rows", reads, nothing, nothing, (torch.randn(1, 4),) * 2
    )
    late: list[Any] = []

    def early() -> None:
        model[0].output[:] = late[0]

    refused(model, "before that pass has come", lambda: late.append(model[2].output), early, nothing, (a, a))
    with pytest.raises(InputError, match="behind it"), model.trace() as tracer:
        with tracer.invoke(a):
            pass
        with tracer.invoke():
            pass
        with tracer.invoke(b):
            pass
    with pytest.raises(InputError, match="there is none yet"), model.trace() as tracer, tracer.invoke():
        pass
    with model.edit(a) as edited:
        edited[0].output[:] = 0
    with pytest.raises(InputError, match="brings the edits"), edited.trace() as tracer:
        with tracer.invoke(a):
            pass
        with tracer.invoke():
            pass
    close(model(a), module(a))
