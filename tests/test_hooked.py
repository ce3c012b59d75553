"""Blocks whose lines builtins do in the hooks of a pass: they are what the other ways give, and fail as they do."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nnsight_go import InputError, NNsight, OpError, _ffi, hooked, known, positions, proxy, straight, wire
from nnsight_go.envoy import Envoy
from nnsight_go.points import Leaf, Point
from nnsight_go.proxy import Proxy

WIDTH = 6
VECTOR = torch.linspace(-1, 1, WIDTH)

Block = Callable[[Any, Any], list[Any]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)])


def keeps(model: Any, x: Any) -> list[Any]:
    return [model[i].output.save() for i in (0, 2, 2)] + [model[3][0].output.save(), model.output.save()]


def stores(model: Any, x: Any) -> list[Any]:
    model[1].output[:] = 0
    model[2].output[0, 1:3] = model[2].output[0, :2] * 2
    kept = model[2].output.save()
    model[3].output[..., -1] = 1.5
    return [kept, model[3].output.save(), model.output.save()]


def replaces(model: Any, x: Any) -> list[Any]:
    before = model[1].output.save()
    model[1].output = before.relu() + 1
    after = model[1].output.save()
    model[2].output = torch.where(model[2].output > 0, 2.0, model[2].output)
    return [before, after, model[2].output.save(), model.output.save()]


def computes(model: Any, x: Any) -> list[Any]:
    hidden = model[0].output
    values, indices = hidden.topk(2, dim=-1)
    scaled = (hidden - hidden.mean(-1, keepdim=True)) / hidden.std(-1, keepdim=True)
    model[2].output += scaled[:, :1]
    return [values.save(), indices.save(), scaled.to(torch.float64).save(), model.output.argmax(-1).save()]


def takes_from_outside(model: Any, x: Any) -> list[Any]:
    kept = (VECTOR * 2).exp()
    model[1].output = model[1].output + VECTOR
    moved = model[1].output.save()
    model[2].output[0] = kept
    product = (model[2].output @ VECTOR).save()
    model[3].output[1] = VECTOR
    return [moved, product, model.output.save()]


def changes_in_place(model: Any, x: Any) -> list[Any]:
    first = model[0].output.mul_(2).clamp_(-1, 1).save()
    hidden = model[1].output
    hidden += 1
    return [first, hidden.save(), model.output.clone().save()]


def nothing(model: Any, x: Any) -> list[Any]:
    return []


BLOCKS = [keeps, stores, replaces, computes, takes_from_outside, changes_in_place, nothing]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets an entry for every pass that builtins do."""
    found: list[int] = []
    run = hooked.run

    def counted(rec: Any, *args: Any) -> None:
        found.append(len(rec.nodes))
        run(rec, *args)

    monkeypatch.setattr(hooked, "run", counted)
    monkeypatch.setattr(known, "learn", lambda *_: None)  # of what is said again there is test_known.py
    return found


def traced(block: Block, x: torch.Tensor) -> list[torch.Tensor]:
    model = NNsight(network())
    for _ in range(2):  # the second is done as the first was
        with model.trace(x):
            saved = block(model, x)
    return saved


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
@pytest.mark.parametrize("grad", [False, True])
def test_it_is_what_the_other_ways_give(
    block: Block, grad: bool, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, WIDTH)
    with torch.set_grad_enabled(grad):
        quick = traced(block, x)
        assert len(runs) == 2
        with monkeypatch.context() as patch:
            patch.setattr(hooked, "program", lambda *_: None)
            in_python = traced(block, x)
            patch.setattr(straight, "plan", lambda *_: None)
            by_the_engine = traced(block, x)
    assert len(runs) == 2
    for one, two, three in zip(quick, in_python, by_the_engine, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
        assert one.dtype == two.dtype == three.dtype
        assert one.requires_grad == two.requires_grad == three.requires_grad


def test_values_are_freed_when_nothing_uses_them_any_more(runs: list[int]) -> None:
    counts: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = [y for y in gc.get_objects() if type(y) is torch.Tensor and not y.is_meta]
            counts.append(sum(y.shape == (3, WIDTH, 7) for y in found))
            return x

    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), Counting())
    model = NNsight(net)
    with torch.no_grad(), model.trace(torch.randn(3, WIDTH)):
        wide = model[0].output.unsqueeze(-1).expand(3, WIDTH, 7)
        kept = ((wide * 2 + 1) * 3).sum(-1).save()
    assert len(runs) == 1 and counts[-1] == 0
    assert kept.shape == (3, WIDTH)


def test_operations_see_the_state_of_their_lines(runs: list[int]) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                return self.inner(x).float()

    model, weight = NNsight(Changing()), torch.randn(WIDTH, WIDTH, requires_grad=True)
    with model.trace(torch.randn(2, WIDTH)):
        product = (model.inner.output.float() @ weight).save()
    assert len(runs) == 1
    assert product.requires_grad and product.dtype == torch.float32
    with torch.inference_mode(), model.trace(torch.randn(2, WIDTH)):
        product = (model.inner.output.float() * 2).save()
    assert product.is_inference() and len(runs) == 2


def test_an_operation_that_fails_names_its_line(runs: list[int]) -> None:
    model = NNsight(network())
    for line in ("call", "store", "item"):
        with pytest.raises(OpError) as caught, model.trace(torch.randn(3, WIDTH)):
            if line == "call":
                wrong = model[1].output @ torch.ones(5, 5)
            elif line == "store":
                model[1].output[:, 9] = 1
                wrong = model[1].output
            else:
                wrong = model[1].output[7]
            wrong.save()
        assert caught.value.file == __file__ and "[3, 6]" in str(caught.value)
        torch.testing.assert_close(model._module(torch.ones(1, WIDTH)), network()(torch.ones(1, WIDTH)))
        assert not any(m._forward_hooks for m in model._module.modules())
    assert len(runs) == 3


def test_an_interrupt_in_an_operation_goes_on_as_it_is() -> None:
    class Interrupting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.add:
                raise KeyboardInterrupt
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    class Giving(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.as_subclass(Interrupting)

    model = NNsight(nn.Sequential(nn.Identity(), Giving()))
    with pytest.raises(KeyboardInterrupt), model.trace(torch.ones(2)):
        model[1].output.add(1).save()
    assert not any(m._forward_hooks for m in model._module.modules())


@pytest.mark.parametrize("gives", [None, (torch.ones(2),), 3], ids=["nothing", "a tuple", "a number"])
def test_a_module_that_gives_something_else_this_time(gives: Any, runs: list[int]) -> None:
    class Changing(nn.Module):
        other = False

        def forward(self, x: torch.Tensor) -> Any:
            return gives if self.other else x

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Changing()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x) if not self.part.other else x + len(str(self.part(x)))

    model, x = NNsight(Whole()), torch.ones(2)
    with model.trace(x):
        kept = model.part.output.save()
    assert torch.equal(kept, x)
    Changing.other = True
    with pytest.raises(InputError, match="part") as caught, model.trace(x):
        lost = model.part.output.save()
        kept = model.output.save()
    assert len(runs) == 2 and ("None" in str(caught.value)) == (gives is None)
    for value in (lost, kept):
        with pytest.raises(InputError.__mro__[1]):  # all or none: nothing has become a tensor
            value.sum()


def test_a_module_that_is_not_called_this_time(runs: list[int]) -> None:
    class Sometimes(nn.Module):
        off = False

        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.off else self.part(x)

    model, x = NNsight(Sometimes()), torch.ones(2)
    with model.trace(x):
        model.part.output.save()
    Sometimes.off = True
    with pytest.raises(InputError, match="was not called"), model.trace(x):
        model.part.output.save()
    assert len(runs) == 2


def test_a_copy_that_a_forward_makes_of_itself_goes_on_without_hooks(runs: list[int]) -> None:
    copies: list[nn.Module] = []

    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if type(x) is torch.Tensor and not copies:  # not in a pass of fake tensors
                copies.append(copy.deepcopy(self.part))
            return self.part(x)

    net = Copying()
    net(torch.ones(1, 2))
    copies.clear()
    model = NNsight(net)
    with model.trace(torch.ones(1, 2)):
        model.part.output[:] = 5
        out = model.output.save()
    assert len(runs) == 1 and torch.equal(out, torch.full((1, 2), 5.0))
    want = net.part(torch.ones(1, 2))
    assert torch.equal(copies[0](torch.ones(1, 2)), want) and not torch.equal(want, out)


def test_calls_of_other_threads_are_not_looked_at(runs: list[int]) -> None:
    other: list[torch.Tensor] = []

    class Spreading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if type(x) is torch.Tensor:  # not in a pass of fake tensors
                thread = threading.Thread(target=lambda: other.append(self.part(x + 1)))
                thread.start()
                thread.join()
            return self.part(x)

    net, x = Spreading(), torch.ones(1, 2)
    model = NNsight(net)
    with torch.no_grad(), model.trace(x):
        model.part.output[:] = 0
        out = model.output.save()
    assert len(runs) == 1 and torch.equal(out, torch.zeros(1, 2))
    torch.testing.assert_close(other[-1], net.part(x + 1))


def test_subclasses_of_lists_of_modules_have_items() -> None:
    class Layers(nn.Sequential):
        pass

    class Named(nn.ModuleDict):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self["b"](self["a"](x))

    model, x = NNsight(Layers(nn.Linear(2, 3), Named({"a": nn.Tanh(), "b": nn.Linear(3, 1)}))), torch.ones(1, 2)
    assert len(model) == 2 and len(model[1]) == 2 and [e.path for e in model] == ["0", "1"]
    with model.trace(x):
        first, last = model[-2].output.save(), model[1]["b"].output.save()
    assert torch.equal(first, model._module[0](x)) and torch.equal(last, model._module(x))


def test_builtins_give_what_their_twins_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same block, recorded by the functions in Python: nodes, places and what is bound."""

    def recorded(slow: bool) -> tuple[list[Any], list[Any]]:
        model = NNsight(network())
        with monkeypatch.context() as patch:
            if slow:
                patch.setattr(Envoy, "output", property(functools.partial(Envoy._read, port=1)))
            with model.trace(torch.ones(1, WIDTH)) as tracer:
                hidden = model[-1][0].output
                assert hidden.shape == (1, WIDTH)  # a look, which is no use
                assert model[2].output is not None
                (hidden * 2).save()
                model[3].output.save()
            recorder = tracer._recorder
        return [n[:2] + n[3:] for n in recorder.nodes], [positions.row(n[2])[::2] for n in recorder.nodes]

    assert recorded(slow=False) == recorded(slow=True)


def test_a_builtin_says_what_it_wants() -> None:
    calls = _ffi.calls()
    for name, args in {
        "forward": (1, 2),
        "prepare": (1,),
        "remember": (1,),
        "record": (1,),
        "argument": (1,),
        "proxy": (Proxy, 1, None, 2),
        "become": ([], [1], torch.Tensor),
    }.items():
        with pytest.raises(TypeError):
            calls[name](*args)
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(RecursionError):
        calls["frozen"](nested)
    tensor = torch.ones(2)
    only_says_so: Any = weakref.proxy(tensor)  # that it is a tensor
    assert isinstance(only_says_so, torch.Tensor) and calls["frozen"](only_says_so) == id(only_says_so)
    with pytest.raises(TypeError):
        calls["become"]([], [only_says_so], torch.Tensor)
    assert calls["frozen"]([1, (torch.ones(2),)]) == calls["frozen"]([1, (torch.zeros(2),)])
    assert calls["frozen"]([torch.ones(2)]) != calls["frozen"]([torch.ones(2, dtype=torch.float64)])
    assert calls["frozen"]([torch.ones(2)]) != calls["frozen"]((torch.ones(2),)) != calls["frozen"]({"a": 1})


def test_what_others_hold_stays_theirs() -> None:
    """A saved value is the object of an output that nobody holds, and shares memory with one that somebody does."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.kept = nn.Linear(4, 4), None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = self.inner(x)
            self.weak = weakref.ref(self.kept)
            return self.kept * 2

    module, x = Keeps(), torch.randn(2, 4)
    model = NNsight(module)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), model.trace(x):
            inner, twice = model.inner.output.save(), model.inner.output.save()
            out = model.output.save()
        kept = module.kept
        assert isinstance(kept, torch.Tensor) and kept is not inner and inner is twice and module.weak() is kept
        assert kept.data_ptr() == inner.data_ptr() and torch.equal(out, kept * 2)
        assert type(inner) is torch.Tensor and inner.requires_grad == grad and kept.requires_grad == grad
        if grad:
            out.sum().backward(retain_graph=True)
            (kept.sum() + inner.sum()).backward()
            torch.testing.assert_close(module.inner.bias.grad, torch.full((4,), 8.0))
            module.zero_grad()
    out.tag = 1  # as of any tensor
    with model.trace(x):
        again = model.output.save()
    assert not hasattr(again, "tag") and out.tag == 1


def test_an_output_that_nobody_holds_is_as_one_that_somebody_does() -> None:
    fired: list[str] = []

    class Splits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 2).chunk(2)[0]

    class Begins(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            leaf = torch.ones(x.shape, requires_grad=True)
            if type(x) is torch.Tensor:  # not in a pass of fake tensors
                leaf.register_hook(lambda grad: fired.append("the module's"))
            return leaf

    model = NNsight(nn.Sequential(Splits()))
    with torch.no_grad(), model.trace(torch.ones(2, 4)):
        part = model[0].output.save()
    part += torch.ones(4, requires_grad=True)  # which no view of torch's from there takes
    assert torch.equal(part.detach_(), torch.full((1, 4), 3.0))
    model = NNsight(nn.Sequential(Begins()))
    with model.trace(torch.ones(2)):
        out = model[0].output.save()
    out.register_hook(lambda grad: fired.append("ours"))
    out.sum().backward()
    assert sorted(fired) == ["ours", "the module's"]


class Watching(TorchDispatchMode):
    """Sees the operations of a pass, and that it is made another object of an output that somebody holds."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            self.act()
        return func(*args, **(kwargs or {}))


class Given(nn.Module):
    """Gives its first output up but for a weak reference, and holds its last one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.weak: Callable[[], torch.Tensor | None] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        self.weak = weakref.ref(first)
        self.held = self.last(first)
        return self.held


def test_a_weak_reference_finds_no_placeholder(runs: list[int]) -> None:
    module, x, found = Given(), torch.ones(2, 4), list[Any]()
    model = NNsight(module)
    with torch.no_grad(), Watching(lambda: found.append(module.weak())), model.trace(x):
        first, last = model.first.output.save(), model.last.output.save()
    assert len(runs) == 1 and torch.equal(first, module.first(x)) and torch.equal(last, module.held)
    seen = [y for y in found if type(y) is torch.Tensor]
    assert seen and all(torch.equal(y, first) for y in seen)


def test_an_error_of_a_dispatch_mode_is_its_own(runs: list[int]) -> None:
    def fail() -> None:
        if runs:
            raise ZeroDivisionError("mine")

    model = NNsight(Given())
    with torch.no_grad(), pytest.raises(ZeroDivisionError, match="mine"), Watching(fail), model.trace(torch.ones(2, 4)):
        model.last.output.save()


def test_proxies_become_tensors_all_or_none() -> None:
    class Wider(torch.Tensor):
        __slots__ = ("more",)

    model, x = NNsight(network()), torch.ones(1, WIDTH)
    other, values = torch.zeros(2).as_subclass(Wider), [torch.ones(2), torch.ones(2)]
    with model.trace(x):
        first = model[0].output.save()
        for proxies, cls in (([first, other], torch.Tensor), ([first, first], int)):
            with pytest.raises(TypeError):
                _ffi.calls()["become"](proxies, values, cls)
        assert type(first) is Proxy and first.shape == (1, WIDTH)
    assert type(other) is Wider and other.sum() == 0 and torch.equal(first, model._module[0](x))


def test_classes_that_do_not_fit_leave_the_slots_known() -> None:
    class Other:
        __slots__ = (*[f"a{i}" for i in range(60)], "nodes")

    with pytest.raises(AttributeError, match="made"):
        _ffi.calls()["prepare"](
            Proxy, proxy.PLACEHOLDER, Leaf, positions.files, positions.is_users,
            Envoy._read, Proxy.save, Envoy.__getitem__, wire.argument, Other, Point,
        )  # fmt: skip
    model, x = NNsight(network()), torch.ones(1, WIDTH)
    with model.trace(x):
        kept = model[0].output.save()
    assert torch.equal(kept, model._module[0](x))
