"""``module.skip(value)`` of wrapped modules: as if their forward had been replaced by one that gives the value."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pathlib
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from nnsight_go import InputError, LanguageModel, ModulePathError, NNsight, OpError, OutOfOrderError, load_edit
from nnsight_go.hosting import replaced, structure, tensors
from zoo import ZOO


@contextlib.contextmanager
def by_hand(module: nn.Module, value: Any, call: int = 0) -> Iterator[None]:
    """A module whose forward gives a value in one of its calls."""
    original, calls = module.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return value if calls == call + 1 else original(*args, **kwargs)

    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]


def flat(value: Any) -> list[torch.Tensor]:
    found = tensors(structure(value), value)
    assert found is not None
    return [x for x in found if x is not None]


def close(got: Any, want: Any) -> None:
    assert len(flat(got)) == len(flat(want))
    for a, b in zip(flat(got), flat(want), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-4)


def outputs(module: nn.Module, args: Any, kwargs: Any) -> dict[str, list[Any]]:
    """What each call of the modules of a forward pass gives, by path."""
    seen: dict[str, list[Any]] = {}
    handles = [
        m.register_forward_hook(lambda m, a, out, path=path: seen.setdefault(path, []).append(out))
        for path, m in module.named_modules()
    ]
    torch.manual_seed(1)
    module(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def changed(value: Any) -> Any:
    """The value with other numbers in it."""
    names = [leaf for leaf in _names(value) if leaf]
    if isinstance(value, torch.Tensor):
        return _other(value)
    found = dict(zip(names, flat(value), strict=True))
    return replaced(value, {name: _other(x) for name, x in found.items()})


def _other(x: torch.Tensor) -> torch.Tensor:
    return x.detach() * 0.5 + 0.25 if x.is_floating_point() else x.detach().clone()


def _names(value: Any) -> list[str]:
    from nnsight_go.hosting import leaves

    tree = structure(value)
    found = tensors(tree, value)
    assert found is not None
    return [leaf.name for leaf, x in zip(leaves(tree), found, strict=True) if x is not None]


def is_clean(module: nn.Module) -> bool:
    """Whether nothing of a trace is left on a module, which can be copied and pickled."""
    copy.deepcopy(module)
    return not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("how", ["straight", "in the middle", "engine"])
@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("vae", "dropping", "scripted")])
def test_every_module_of_many_models(name: str, how: str) -> None:
    module, args, kwargs = ZOO[name]()
    model = NNsight(module)
    found = [(path, seen) for path, seen in outputs(module, args, kwargs).items() if path]
    for path, seen in found[:: 1 + len(found) // 8]:
        value = changed(seen[0])
        with by_hand(module.get_submodule(path), value):
            try:
                want = module(*args, **kwargs)
            except Exception as error:  # it is a sum of others', which are of no use to it
                want = error
        if isinstance(want, Exception):
            continue
        with model.trace(*args, **kwargs):
            if how == "in the middle":
                assert all(float(x.abs().sum()) >= 0 for x in flat(model.get(path).inputs)[:1])
            model.get(path).skip(value)
            given = model.get(path).output.save()
            out = model.output.save()
            if how == "engine":
                args_of, kwargs_of = model.get(path).inputs  # what lies before it
                [x.save() for x in (*args_of, *kwargs_of.values()) if isinstance(x, torch.Tensor)]
        close(out, want)
        close(given, value)
    assert is_clean(module)


class Counting(nn.Module):
    """Counts its calls, and holds a layer that others use as well."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.inner(x) + torch.rand_like(x)


class Several(nn.Module):
    """One layer inside a module that is called three times, and outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.block = Counting(self.shared)
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(x)
        for _ in range(3):
            x = self.block(x)
        return self.out(self.shared(x))


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("call", [0, 1, 2])
def test_one_call_of_several(call: int, forced: bool) -> None:
    module, x, value = Several(), torch.randn(3, 4), torch.randn(3, 4)
    model = NNsight(module)
    with model.trace(x):
        model.output.save()
    module.block.calls = 0
    torch.manual_seed(2)
    seen: list[Any] = []
    hook = module.shared.register_forward_hook(lambda m, a, out: seen.append(out))
    with by_hand(module.block, value, call):
        want = module(x)
    hook.remove()
    assert len(seen) == 4 and module.block.calls == 2
    module.block.calls = 0
    torch.manual_seed(2)
    with model.trace(x):
        shared, found = model.shared, []
        for number in range(5):  # as they are counted when all of them happen
            if number == 1 + call:
                (model.block.next(call) if call else model.block).skip(value)
            else:
                found.append(shared.output.save())
                if forced:
                    assert found[-1].sum() < 1e9
            shared.next()
        out = model.output.save()
    close(found, seen)
    close(out, want)
    assert module.block.calls == 2 and is_clean(module)


def test_nothing_of_it_happens() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), Counting(nn.Linear(4, 4)), nn.Linear(4, 2))
    model, x = NNsight(net.train()), torch.randn(5, 4)
    with model.trace(x):
        model.output.save()
    before, calls = net[1].running_mean.clone(), net[3].calls
    torch.manual_seed(3)
    with model.trace(x):
        h = model[0].output
        for i in (1, 2, 3):
            model[i].skip(h)
        out = model.output.save()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1)) and net[3].calls == calls
    assert torch.equal(net[1].running_mean, before) and net[1].num_batches_tracked == 1  # of the first trace
    close(out, net[4](net[0](x)))


def mlp(depth: int = 4) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth)]
    return nn.Sequential(*blocks), torch.randn(3, 4)


def test_several_invokes_each_with_its_own() -> None:
    net, x = mlp()
    model = NNsight(net)
    y, z = torch.randn(2, 4), torch.randn(2, 4)
    with torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke(x):
                model[1].skip(model[0].output)
                one = model.output.save()
            with tracer.invoke(y):
                model[2].skip(model[2].input * 2)
                two = model.output.save()
            with tracer.invoke(z):
                three = model.output.save()
        close(one, net[3](net[2](net[0](x))))
        close(two, net[3](net[1](net[0](y)) * 2))
        close(three, net(z))
        with model.trace() as tracer:  # a value of one skips a module of the other
            with tracer.invoke(y):
                state = model[1].output
            with tracer.invoke(z):
                model[2].skip(state)
                out = model.output.save()
        close(out, net[3](net[1](net[0](y))))


def test_gradients_flow_through_what_is_given() -> None:
    net, x = mlp()
    model = NNsight(net)
    value = torch.randn(3, 4, requires_grad=True)
    with model.trace(x):
        h = model[0].output
        model[1].skip(h * 3 + value)
        given = model[1].output
        with model.output.sum().backward():
            grad = given.grad.save()
            at = h.grad.save()
    got = [value.grad, net[0][0].weight.grad, net[1][0].weight.grad]
    value.grad = None
    net.zero_grad()
    h2 = net[0](x)
    h2.retain_grad()
    given2 = h2 * 3 + value
    given2.retain_grad()
    net[3](net[2](given2)).sum().backward()
    close(grad, given2.grad)
    close(at, h2.grad)
    close(got[0], value.grad)
    close(got[1], net[0][0].weight.grad)
    assert got[2] is None


def test_changes_behind_it_and_of_what_was_given() -> None:
    net, x = mlp()
    model = NNsight(net)
    for forced in (False, True):
        with model.trace(x):
            h = model[0].output.clone()
            model[1].skip(h)
            if forced:
                assert model[1].output.shape == (3, 4) and model[1].output.sum() < 1e9
            model[1].output[:, 0] = 7
            given = model[1].output.save()
            model[2].input[:, 1] = 5
            out = model.output.save()
        want = net[0](x)
        want[:, 0], want[:, 1] = 7, 5
        close(given, want)
        close(out, net[3](net[2](want)))


def test_it_may_have_other_sizes() -> None:
    net, x = mlp()
    model = NNsight(net)
    with model.trace(x):
        model[1].skip(torch.ones(7, 4))
        assert model[3].output.shape == (7, 4)
        out = model.output.save()
    close(out, net[3](net[2](torch.ones(7, 4))))
    with model.scan(x):
        model[1].skip(model[0].output)
        sizes = model[2].output.save()
    assert sizes.is_meta and sizes.shape == (3, 4)


def test_stop_and_session_and_the_model_itself() -> None:
    net, x = mlp()
    model, ran = NNsight(net), []
    with model.trace(x):
        model.output.save()
    for module in net:
        module.register_forward_hook(lambda m, a, out: ran.append(m))
    with model.trace(x) as tracer:
        model[1].skip(model[0].output)
        given = model[1].output.save()
        tracer.stop()
    close(given, net[0](x))
    assert ran[:1] == [net[0]] and net[2] not in ran
    with model.trace(x):
        model[0].skip(x)
        last = model[1].input.save()
    assert torch.equal(last, x)
    with model.trace(x):
        model.skip(x * 2)
        out = model.output.save()
    assert torch.equal(out, x * 2)
    with model.session():
        with model.trace(x):
            state = model[1].output
        with model.trace(x):
            model[1].skip(state * 2)
            out = model.output.save()
    close(out, net[3](net[2](net[1](net[0](x)) * 2)))


def test_edits_that_skip(tmp_path: pathlib.Path) -> None:
    net, x = mlp()
    model = NNsight(net)
    with model.edit(x) as edited:
        edited[1].skip(edited[0].output * 2)
    want = net[3](net[2](net[0](x) * 2))
    ran: list[Any] = []
    net[1].register_forward_hook(lambda m, a, out: ran.append(out))
    inner = net[1][0].register_forward_pre_hook(lambda m, a: pytest.fail("it runs"))
    edited.edits[0].save(tmp_path / "edit")
    again = model.with_edits(load_edit(tmp_path / "edit"))
    for one in (edited, again):
        with one.trace(x):
            given, out = one[1].output.save(), one.output.save()
        close(out, want)
        close(given, net[0](x) * 2)
        close(one.trace(torch.cat([x, x]), trace=False), torch.cat([want, want]))
        with one.trace(x):  # the trace's own goes before it
            one[1].skip(one[0].output)
            out = one.output.save()
        close(out, net[3](net[2](net[0](x))))
        with pytest.raises(OutOfOrderError, match=r"1\.0.output is not computed: an edit skips model\.1"), one.trace(x):
            one[1][0].output.save()
    inner.remove()
    with model.edit(x) as named:
        named[1][0].output[:] = 0
    with pytest.raises(OutOfOrderError, match="an earlier line skips"), named.trace(x):
        named[1].skip(x)
    with named.edit(x) as both:
        both[1].skip(x)
    with pytest.raises(OutOfOrderError, match="an edit skips"), both.trace(x):
        both.output.save()
    with model.edit(x) as reading:
        reading[2].output[:] = reading[1].output
    with pytest.raises(OutOfOrderError, match="output is not computed"), reading.trace(x):
        reading[1].skip(x)
    close(model.trace(x, trace=False), net(x))


@dataclasses.dataclass
class Result:
    first: torch.Tensor
    rest: list[torch.Tensor]
    count: int
    maybe: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Derived:
    first: torch.Tensor
    second: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "second", self.first * 2)


class Both(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


class Handle:
    """An object that says nothing of itself."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Giving(nn.Module):
    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.make = nn.Linear(4, 4), make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(self.inner(x))


class Around(nn.Module):
    """Gives what the module inside it gives, of whatever kind."""

    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.giving = Giving(make)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.giving(x)
        return x


def given(make: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """What a module that gives such things is made to give."""
    module, x = Around(make), torch.randn(2, 4)
    model = NNsight(module)
    with model.trace(x):
        model.giving.skip(value)
    assert is_clean(module)
    return module.seen


def test_structures() -> None:
    a, b = torch.randn(2, 4), torch.randn(3)
    out = given(lambda x: (x, [x, x]), (a, [b, a]))
    assert type(out) is tuple and type(out[1]) is list and torch.equal(out[1][0], b)
    out = given(lambda x: (x,), a)
    assert type(out) is tuple and torch.equal(out[0], a)
    out = given(lambda x: (x, None, 3), (a, None, 3))
    assert torch.equal(out[0], a) and out[1:] == (None, 3)
    for value in (Both(a, b), {"a": a, "b": b}):
        out = given(lambda x: Both(x, x), value)
        assert type(out) is Both and torch.equal(out.b, b)
    for value in (Result(a, [b], 2), {"first": a, "rest": [b], "maybe": None}, {"first": a, "rest": [b], "count": 2}):
        out = given(lambda x: Result(x, [x], 2), value)
        assert type(out) is Result and torch.equal(out.first, a) and torch.equal(out.rest[0], b)
        assert (out.count, out.maybe) == (2, None)
    for value in (Derived(a), {"first": a, "second": a * 2}):
        out = given(Derived, value)
        assert type(out) is Derived and torch.equal(out.first, a) and torch.equal(out.second, a * 2)
    out = given(lambda x: {"a": x, "more": {"b": x}}, {"a": a, "more": {"b": b}})
    assert type(out) is dict and torch.equal(out["more"]["b"], b)
    out = given(lambda x: {"a": x, "more": {"n": 1, "of": ()}}, {"a": a})
    assert torch.equal(out["a"], a) and out["more"] == {"n": 1, "of": ()}
    assert given(lambda x: None, None) is None
    out = given(lambda x: (x, x), (a, None))  # nobody looks at it
    assert torch.equal(out[0], a) and out[1] is None
    handle = Handle(a)
    out = given(lambda x: (x, Handle(x)), (b, handle))
    assert torch.equal(out[0], b) and out[1] is handle
    out = given(lambda x: {"x": x, "handle": Handle(x)}, {"x": a, "handle": None})
    assert torch.equal(out["x"], a) and out["handle"] is None


def test_values_that_do_not_fit() -> None:
    a = torch.randn(2, 4)
    wrong: list[tuple[Callable[[torch.Tensor], Any], Any, str]] = [
        (lambda x: x, None, "cannot become a NoneType"),
        (lambda x: x, (a,), "cannot become a tuple"),
        (lambda x: (x, x), a, "is a tuple of 2, and cannot become a Tensor"),
        (lambda x: (x, x), (a,), "cannot become a tuple of 1"),
        (lambda x: (x, 3), (a, 4), "is 3 in this model, and cannot become a int"),
        (lambda x: {"a": x, "b": x}, {"a": a}, "has the fields a, b, and cannot become a dict of 1"),
        (lambda x: {"a": x}, {"a": a, "c": a}, "has the fields a, and cannot become"),
        (lambda x: {"a": x, "h": Handle(x)}, {"a": a}, "has the fields a, h"),
        (lambda x: (x, Handle(x)), (a, a), "cannot become a Tensor"),
    ]
    for make, value, message in wrong:
        model = NNsight(Around(make))
        with pytest.raises(InputError, match=message) as caught, model.trace(a):
            model.giving.skip(value)
        assert caught.value.file == __file__ and caught.value.path == "giving"
        assert is_clean(model._module)


def test_what_comes_too_late() -> None:
    net, x = mlp()
    model = NNsight(net)
    with pytest.raises(OutOfOrderError, match="has already run"), model.trace(x):
        model[1].output.save()
        model[1].skip(x)
    with pytest.raises(OutOfOrderError, match="has already run"), model.trace(x):
        model[1][0].output.save()
        model[1].skip(x)
    with pytest.raises(OutOfOrderError, match="has already run"), model.trace(x):
        float(model[2].output.sum())
        model[1].skip(x)
    with pytest.raises(OutOfOrderError, match="has already run"), model.trace(x):
        model[1].skip(x)
        model[1].skip(x)
    with pytest.raises(OutOfOrderError, match="an earlier line skips model.1") as caught, model.trace(x):
        model[1].skip(x)
        model[1][1].output.save()
    assert caught.value.other_line is not None and caught.value.path == "1.1"
    with pytest.raises(OutOfOrderError, match="an earlier line skips model.1"), model.trace(x):
        model[1].skip(x)
        model[1][1].skip(x)
    with pytest.raises(OutOfOrderError, match="an earlier line skips"), model.trace(x):
        model[1].skip(x)
        model[1][0].input = x
    for late in (lambda: model[3].output.sum(), lambda: float(model[3].output.sum())):
        with pytest.raises(OutOfOrderError, match=r"model\.1\.output is not computed") as caught, model.trace(x):
            old = model[1].output
            model[1].skip(torch.zeros(old.shape))  # which asks for sizes alone
            late()
            (old * 2).save()
        assert caught.value.file == __file__
    with model.trace(x):  # the invoke beside it is another program
        model[1][0].output.save()
    with pytest.raises(InputError, match="only inside a trace"):
        model[1].skip(x)
    with pytest.raises(ModulePathError, match="no call 3|not called"), model.trace(x):
        model[1].next(3).skip(x)
    assert is_clean(net)


def test_an_operation_that_fails_names_its_line() -> None:
    net, x = mlp()
    model = NNsight(net)
    for forced in (False, True):
        with pytest.raises(OpError) as caught, model.trace(x):
            if forced:
                assert model[0].output.sum() < 1e9
            model[1].skip(model[0].output @ torch.ones(3, 3))
        assert caught.value.file == __file__
        assert is_clean(net)


def test_a_cache_has_no_entry_of_what_did_not_run() -> None:
    net, x = mlp()
    model = NNsight(net)
    with model.trace(x) as tracer:
        model[1].skip(model[0].output)
        cache = tracer.cache()
    assert "model.1" in cache and "model.2.0" in cache and not [k for k in cache if k.startswith("model.1.")]


def test_hooks_and_forwards_of_the_user() -> None:
    net, x = mlp()
    model, seen = NNsight(net), []
    net[1].register_forward_hook(lambda m, a, out: seen.append(out))
    original = net[1].forward

    def own(x: torch.Tensor) -> torch.Tensor:
        return original(x) * 3

    net[1].forward = own  # as accelerate does
    want = net(x)
    seen.clear()
    with model.trace(x):
        model[1].skip(model[0].output * 2)
        out = model.output.save()
    close(out, net[3](net[2](net[0](x) * 2)))
    close(seen[-1], net[0](x) * 2)
    assert net[1].__dict__["forward"] is own
    close(net(x), want)

    class Direct(nn.Module):
        """Calls forward itself, which is no call of the module."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(self.inner.forward(x))

    direct = Direct()
    wrapped = NNsight(direct)
    with wrapped.trace(x):
        wrapped.inner.skip(wrapped.inner.input * 2)
        out = wrapped.output.save()
    close(out, direct.inner(x) * 2)


def test_two_threads_and_a_pass_that_waits() -> None:
    net, x = mlp()
    model = NNsight(net)
    want = [net[3](net[2](net[0](x))), net[3](net[1](net[0](x)))]
    failures: list[BaseException] = []

    def work(which: int) -> None:
        try:
            for i in range(30):
                with model.trace(x):
                    if i % 2:
                        assert model[0].output.sum() < 1e9
                    model[1 + which].skip(model[which].output)
                    out = model.output.save()
                close(out, want[which])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and is_clean(net)
    with model.trace(x):
        assert model[0].output.sum() < 1e9
        model[1].skip(model[0].output)
        twin = copy.deepcopy(net)
        for p in twin.parameters():
            p.data.zero_()
        assert not torch.equal(net(x), twin(x)) and not twin(x).any()  # no call of the pass that waits
        out = model.output.save()
    close(out, want[0])
    assert is_clean(net)
    pickle.dumps(net)


def test_operations_of_modules_around() -> None:
    module, x = Several(), torch.randn(3, 4)
    model = NNsight(module)
    for forced in (False, True):
        with model.trace(x):
            h = model.shared.output
            if forced:
                assert h.sum() < 1e9
            model.block.skip(h * 2)
            second = model.block.next().source.add_0.output.save()
            inner = model.block.inner.next(2).output.save()
            out = model.output.save()
        assert second.shape == (3, 4) and out.shape == (3, 2)
        close(inner, module.shared(module.shared(x) * 2))


def test_compiled_and_scripted_modules() -> None:
    x = torch.randn(3, 4)
    for kind in ("module.compile()", "torch.compile", "the whole", "script"):
        net, _ = mlp()
        want = net[3](net[2](net[0](x) * 2))
        if kind == "module.compile()":
            net[1].compile(backend="eager")
        elif kind == "torch.compile":
            net[1] = torch.compile(net[1], backend="eager")
        elif kind == "the whole":
            net.compile(backend="eager")
        else:
            net[1] = torch.jit.script(net[1])
        net(x)
        model = NNsight(net)
        for forced in (False, True):
            with model.trace(x):
                h = model[0].output
                if forced:
                    assert h.sum() < 1e9
                model[1].skip(h * 2)
                out = model.output.save()
            close(out, want)
        net(x)


# ---- language models of transformers ----


def gpt2() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=60, n_positions=40)
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=3, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=60
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("make", [gpt2, llama])
def test_blocks_of_language_models(make: Callable[[], Any]) -> None:
    module, ids = make(), torch.tensor([[5, 6, 7, 8]])
    model = LanguageModel(module, tokenizer=False)
    layers = module.transformer.h if make is gpt2 else module.model.layers
    ours = model.transformer.h if make is gpt2 else model.model.layers
    with torch.no_grad():
        states = outputs(module, (), {"input_ids": ids, "use_cache": False})
        path = f"{ours[0].path}"
        first = flat(states[path][0])[0]
        with by_hand(layers[1], first if isinstance(states[path][0], torch.Tensor) else (first,)):
            want = module(ids, use_cache=False).logits
        with model.trace(ids):
            ours[1].skip(ours[0].output[0])  # a bare tensor for a tuple of one
            given = ours[1].output[0].save()
            logits = model.output.logits.save()
        close(logits, want)
        close(given, first)
        with model.trace(ids):
            ours[1].skip((ours[0].output[0],))
            logits = model.output.logits.save()
        close(logits, want)
        attention = "attn" if make is gpt2 else "self_attn"
        with model.trace(ids):
            mixed = getattr(ours[1], attention)
            mixed.skip((torch.zeros(1, 4, 16), None))
            logits = model.output.logits.save()
        with by_hand(getattr(layers[1], attention), (torch.zeros(1, 4, 16), None)):
            close(logits, module(ids, use_cache=False).logits)
        head = torch.randn(1, 4, 60)
        with model.trace(ids):
            base = model.transformer if make is gpt2 else model.model
            state = base.output.last_hidden_state
            model.lm_head.skip(head)
            out = model.output.save()
            state = state.save()
    assert torch.equal(out.logits, head) and state.shape == (1, 4, 16)
    base = NNsight(module.transformer if make is gpt2 else module.model)
    with base.trace(ids, use_cache=False):
        base.skip({"last_hidden_state": torch.zeros(1, 4, 16)})
        out = base.output.last_hidden_state.save()
    assert not out.any()
    assert is_clean(module)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("forced", [False, True])
def test_steps_of_a_generation(make: Callable[[], Any], forced: bool) -> None:
    module, ids = make(), torch.tensor([[5, 6, 7, 8]])
    model = LanguageModel(module, tokenizer=False)
    layers = module.transformer.h if make is gpt2 else module.model.layers
    ours = model.transformer.h if make is gpt2 else model.model.layers
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():

        def by_layer(steps: set[int]) -> torch.Tensor:
            original, calls = layers[1].forward, 0

            def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                found = original(x, *args, **kwargs) if calls - 1 not in steps else x * 2
                return found

            layers[1].forward = forward
            try:
                return module.generate(ids, attention_mask=torch.ones_like(ids), **options)
            finally:
                del layers[1].forward

        plain = by_layer(set())
        every = by_layer(set(range(5)))
        with model.generate(ids, **options) as tracer:
            for _ in tracer.iter[:]:
                state = ours[1].input
                if forced:
                    assert state.sum() < 1e9
                ours[1].skip(state * 2)
                mlp = ours[2].mlp.output
            out = tracer.result.save()
        assert torch.equal(out, every) and mlp is not None
        with model.generate(ids, **options) as tracer:
            with tracer.iter[2:4]:
                ours[1].skip(ours[1].input * 2)
            out = tracer.result.save()
        assert torch.equal(out, by_layer({2, 3}))
        with model.edit() as edited:
            part = edited.transformer.h if make is gpt2 else edited.model.layers
            part[1].skip(part[1].input * 2)
        for one, want in ((edited, every), (model, plain)):
            with one.generate(ids, **options) as tracer:
                out = tracer.result.save()
            assert torch.equal(out, want)
    with pytest.raises(OutOfOrderError, match="an earlier line skips"), model.generate(ids, **options) as tracer:
        ours[1].skip(ours[1].input)
        ours[1].mlp.output.save()
    assert is_clean(module)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"do_sample": True}, {"use_cache": False}, {"num_return_sequences": 2, "num_beams": 2}],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_ways_to_generate(options: dict[str, Any], layer: int) -> None:
    module, ids = llama(), torch.tensor([[5, 6, 7, 8]])
    model, at = LanguageModel(module, tokenizer=False), module.model.layers[layer]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    at.forward = lambda x, *args, **kwargs: x * 2
    torch.manual_seed(0)
    want = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
    del at.forward
    torch.manual_seed(0)
    with model.generate(ids, **options) as tracer:
        for _ in tracer.iter[:]:
            model.model.layers[layer].skip(model.model.layers[layer].input * 2)
        out = tracer.result.save()
    assert torch.equal(out, want)
    assert is_clean(module)
