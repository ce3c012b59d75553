"""Gradients in traces, held to autograd on transformers' own models with hooks."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import nnsight_go
from nnsight_go import GradientError, InputError, LanguageModel, NnsightError, OutOfOrderError, _ffi
from references import Pair, tensors

Change = Callable[[torch.Tensor], torch.Tensor | None]
Place = tuple[str, str]


class Reference:
    """A forward pass of transformers' model whose float values at all access points keep their gradients.

    Args:
        edits: by place: changes its main tensor in place, or gives another.
        hooks: by place: what its gradient becomes in the backward pass.
    """

    def __init__(self, pair: Pair, rows: list[list[int]], edits: Any = None, hooks: Any = None) -> None:
        self.seen: dict[Place, dict[str, torch.Tensor]] = {}
        edits, hooks = edits or {}, hooks or {}
        handles = []

        def visit(place: Place, value: Any, main: torch.Tensor | None) -> torch.Tensor | None:
            new = None
            if isinstance(main, torch.Tensor) and place in edits:
                new = edits[place](main)
                main = main if new is None else new
            if isinstance(main, torch.Tensor) and place in hooks:
                main.register_hook(hooks[place])
            return new

        def keep(place: Place, leaves: dict[str, torch.Tensor]) -> None:
            self.seen[place] = leaves
            for x in leaves.values():
                if x.is_floating_point() and x.requires_grad:
                    x.retain_grad()

        for path, module in pair.hf.named_modules():

            def before(_: Any, args: Any, kwargs: Any, path: str = path) -> Any:
                first = args[0] if args else kwargs[next(iter(kwargs))]
                new = visit((path, "input"), args, first)
                if new is not None:
                    args, kwargs = ((new, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): new})
                keep((path, "input"), tensors(args, "args") | tensors(kwargs, "kwargs"))
                return args, kwargs

            def after(module: Any, args: Any, output: Any, path: str = path) -> Any:
                bare = isinstance(output, torch.Tensor)
                new = visit((path, "output"), output, output if bare else output[0])
                if new is not None:
                    output = new if bare else (new, *output[1:])
                block = bare and path.startswith(pair.blocks + ".") and path.count(".") == pair.blocks.count(".") + 1
                keep((path, "output"), tensors((output,) if block else output))
                return output

            handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ]
        try:
            self.logits = pair.hf(input_ids=torch.tensor(rows), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()

    def grad(self, path: str, port: str = "output", leaf: str | None = None) -> torch.Tensor:
        leaves = self.seen[path, port]
        grad = (next(iter(leaves.values())) if leaf is None else leaves[leaf]).grad
        assert grad is not None
        return grad


@pytest.fixture(autouse=True)
def clean(either: Pair) -> Iterator[None]:
    either.hf.zero_grad()
    yield
    either.hf.zero_grad()


def weights(pair: Pair, rows: list[list[int]]) -> torch.Tensor:
    """What a loss weighs the logits with, so that no gradient of them is a constant."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(rows), len(rows[0]), pair.hf.config.vocab_size, generator=generator)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got.detach(), want.detach(), rtol=tolerance, atol=tolerance * float(want.abs().max()))


def hidden(pair: Pair, layer: int) -> Any:
    return pair.layers[layer].output[0]


# ---- the documented forms ----


def test_the_documented_block(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.trace(ids):
        state = hidden(either, -1)
        state.requires_grad = True
        logits = model.lm_head.output
        with logits.sum().backward():
            logits_grad = logits.grad.save()
            state_grad = state.grad.save()
    want = Reference(either, [ids])
    want.logits.sum().backward()
    assert type(logits_grad) is type(state_grad) is torch.Tensor
    close(logits_grad, torch.ones_like(want.logits))
    close(state_grad, want.grad(f"{either.blocks}.2"))


def test_the_documented_retain_grad(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.trace(ids):
        state = hidden(either, 1).save()
        state.retain_grad()
        model.lm_head.output.sum().backward()
    want = Reference(either, [ids])
    want.logits.sum().backward()
    assert state.grad is not None
    close(state.grad, want.grad(f"{either.blocks}.1"))


def test_backward_after_the_block(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.trace(ids):
        state = hidden(either, 1).requires_grad_().save()
        loss = (model.lm_head.output * weights(either, [ids])).sum().save()
    assert state.grad is None
    assert loss.grad_fn is not None
    loss.backward()
    want = Reference(either, [ids])
    (want.logits * weights(either, [ids])).sum().backward()
    assert state.grad is not None
    close(state.grad, want.grad(f"{either.blocks}.1"))


# ---- every place ----


def test_every_access_point(either: Pair) -> None:
    model, rows = either.model, [either.ids(6), either.ids(6, seed=2)]
    want = Reference(either, rows)
    (want.logits * weights(either, rows)).sum().backward()
    found = {}
    with model.trace(rows):
        values = {}
        for (path, port), leaves in want.seen.items():
            for leaf, x in leaves.items():
                if x.is_floating_point() and x.grad is not None and path:
                    point = model._native.points[path, 0 if port == "input" else 1]
                    values[path, port, leaf] = model._native and _leaf(model, point, leaf)
        with (model.lm_head.output * weights(either, rows)).sum().backward():
            for key, value in values.items():
                found[key] = value.grad.save()
    assert len(found) > 40
    for (path, port, leaf), grad in found.items():
        close(grad, want.grad(path, port, leaf))


def _leaf(model: LanguageModel, point: Any, leaf: str) -> Any:
    value: Any = getattr(model.get(point.path), "inputs" if leaf.startswith(("args", "kwargs")) else "output")
    if leaf.startswith(("args", "kwargs")):
        kind, _, key = leaf.partition(".")
        return value[0][int(key)] if kind == "args" else value[1][key]
    for key in filter(None, leaf.split(".")):
        value = value[int(key)] if key.isdigit() else value[key]
    return value


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "after"])
def test_parameters(either: Pair, inside: bool) -> None:
    model, rows = either.model, [either.ids(6), either.ids(6, seed=2)]
    mine = dict(model.named_parameters())
    try:
        for p in mine.values():
            p.requires_grad_(True)
        with model.trace(rows):
            loss = (model.lm_head.output * weights(either, rows)).sum().save()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        want = Reference(either, rows)
        (want.logits * weights(either, rows)).sum().backward()
        theirs = dict(either.hf.named_parameters())
        assert set(mine) == set(theirs)
        for name, p in mine.items():
            assert p.grad is not None, name
            close(p.grad, theirs[name].grad, 2e-4)
    finally:
        for p in mine.values():
            p.requires_grad_(False)
            p.grad = None


def test_parameters_stay_out_unless_asked_for(either: Pair) -> None:
    model = either.model
    assert not any(p.requires_grad for p in model.parameters())
    with model.trace(either.ids()):
        state = hidden(either, 0)
        logits = model.lm_head.output.save()
        with logits.sum().backward():
            grad = state.grad.save()
    assert all(p.grad is None for p in model.parameters())
    assert not logits.requires_grad and logits.grad_fn is None, "what was saved drops the graph"
    assert not grad.requires_grad
    logits.numpy()


# ---- edits of values ----


def test_gradients_through_edits(either: Pair) -> None:
    model, ids = either.model, either.ids()
    mlp = f"{either.blocks}.1.mlp"

    def zero(x: torch.Tensor) -> None:
        x[:, 2:4] = 0

    edits = {(f"{either.blocks}.0", "output"): zero, (mlp, "output"): lambda x: x * 0.5 + 1}
    want = Reference(either, [ids], edits)
    (want.logits * weights(either, [ids])).sum().backward()
    with model.trace(ids):
        before = model.get(f"{either.blocks}.0").input
        first = hidden(either, 0)
        first[:, 2:4] = 0
        module = model.get(mlp)
        output = module.output
        module.output = output * 0.5 + 1
        changed = module.output
        with (model.lm_head.output * weights(either, [ids])).sum().backward():
            grads = [x.grad.save() for x in (before, first, output, changed)]
    close(grads[0], want.grad(f"{either.blocks}.0", "input"))
    close(grads[1], want.grad(f"{either.blocks}.0"))
    close(grads[2], want.grad(mlp) * 0.5)
    close(grads[3], want.grad(mlp))


def test_a_value_of_the_users_own(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.trace(ids):
        mine = torch.zeros(1, len(ids), either.width)
        blended = hidden(either, 1) * 0.5 + mine
        model.get(f"{either.blocks}.1").output[0] = blended
        with model.lm_head.output.sum().backward():
            grad = blended.grad.save()
    want = Reference(either, [ids], {(f"{either.blocks}.1", "output"): lambda x: x * 0.5})
    want.logits.sum().backward()
    close(grad, want.grad(f"{either.blocks}.1"))


def test_an_assigned_tensor_from_outside(either: Pair) -> None:
    model, ids = either.model, either.ids()
    given = torch.randn(1, len(ids), either.width)
    with model.trace(ids):
        either.layers[0].output[0] = given
        state = hidden(either, 0)  # which is that tensor: it requires no gradient, here it has one
        with model.lm_head.output.sum().backward():
            grad = state.grad.save()
    want = Reference(either, [ids], {(f"{either.blocks}.0", "output"): lambda x: given + 0 * x})
    want.logits.sum().backward()
    close(grad, want.grad(f"{either.blocks}.0"))
    assert not given.requires_grad and given.grad is None


def test_a_leaf_from_outside(either: Pair) -> None:
    model, ids = either.model, either.ids()
    steering = torch.zeros(either.width, requires_grad=True)
    for _ in range(2):  # gradients add up, as in PyTorch
        with model.trace(ids):
            hidden(either, 1)[:] += steering
            model.lm_head.output.sum().backward()
    want = Reference(either, [ids])
    want.logits.sum().backward()
    assert steering.grad is not None
    close(steering.grad, 2 * want.grad(f"{either.blocks}.1").sum((0, 1)))


def test_a_leaf_is_filled_once_though_the_model_runs_again(either: Pair) -> None:
    model, ids = either.model, either.ids()
    steering = torch.zeros(either.width, requires_grad=True)
    with model.trace(ids):
        early = hidden(either, 0)
        float(early.sum())  # the model has run to here, and nothing followed it
        hidden(either, 1)[:] += steering
        model.lm_head.output.sum().backward()
        first = float(early.mean())  # the pass has filled the leaf
        with (model.lm_head.output * 2).sum().backward():
            grad = early.grad.save()  # and now all of it runs anew
    want = Reference(either, [ids])
    want.logits.sum().backward()
    assert first == first
    assert steering.grad is not None
    close(steering.grad, 3 * want.grad(f"{either.blocks}.1").sum((0, 1)))
    close(grad, 2 * want.grad(f"{either.blocks}.0"))


# ---- edits of gradients ----


@pytest.mark.parametrize("seed", range(6))
def test_random_changes_of_gradients(either: Pair, seed: int) -> None:
    r = random.Random(seed)
    model, ids = either.model, either.ids()
    names = [f"{either.blocks}.{k}" for k in range(3)] + [f"{either.blocks}.{k}.mlp" for k in range(3)]
    order = sorted(names, key=lambda n: (n.split(".")[2], not n.endswith("mlp")), reverse=True)  # as gradients come
    chosen = [n for n in order if r.random() < 0.7]
    changes = {n: r.choice(["read", "zero", "scale", "replace", "part"]) for n in chosen}
    noise = torch.randn(1, len(ids), either.width)

    def hook(kind: str) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def change(g: torch.Tensor) -> torch.Tensor | None:
            if kind == "part":
                g = g.clone()
                g[:, 1:3] = 0
                return g
            return {"read": None, "zero": g * 0, "scale": g * 3, "replace": noise}[kind]

        return change

    want = Reference(either, [ids], hooks={(n, "output"): hook(kind) for n, kind in changes.items()})
    (want.logits * weights(either, [ids])).sum().backward()
    found = {}
    with model.trace(ids):
        values = {n: model.get(n).output[0] if n.count(".") == 2 else model.get(n).output for n in names}
        first = model.get(names[0]).input
        with (model.lm_head.output * weights(either, [ids])).sum().backward():
            for n in chosen:
                value = values[n]
                if r.random() < 0.3:
                    float(value.grad.abs().sum())  # a value in the middle of the pass
                match changes[n]:
                    case "zero":
                        value.grad[:] = 0
                    case "scale":
                        value.grad *= 3
                    case "replace":
                        value.grad = noise
                    case "part":
                        value.grad[:, 1:3] = 0
                found[n] = value.grad.save()
            last = first.grad.save()
    for n in chosen:
        close(found[n], want.grad(n))  # what a hook gives is what is retained
    close(last, want.grad(names[0], "input"))


def test_changes_that_come_too_late(either: Pair) -> None:
    model = either.model
    with (
        pytest.raises(OutOfOrderError, match="changed after one was read that depends on it") as raised,
        model.trace(either.ids()),
    ):
        first, last = hidden(either, 0), hidden(either, 2)
        with model.lm_head.output.sum().backward():
            first.grad.save()
            last.grad[:] = 0
    assert "last.grad[:] = 0" in str(raised.value)


def test_reads_come_in_any_order(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.trace(ids), model.lm_head.output.sum().backward():
        grads = [hidden(either, k).grad.save() for k in (1, 2, 0)]  # read in the block for the first time
    want = Reference(either, [ids])
    want.logits.sum().backward()
    for k, grad in zip((1, 2, 0), grads, strict=True):
        close(grad, want.grad(f"{either.blocks}.{k}"))


def test_gradients_are_tensors_of_their_own(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.trace(ids):
        block = either.layers[1]
        attention, mlp = block.get(either.attention).output[0], block.mlp.output
        with model.lm_head.output.sum().backward():
            one = block.output[0].grad.save()
            one[:] = 0
            other = mlp.grad.save()
            with_attention = attention.grad.save()
    assert float(one.abs().sum()) == 0
    assert float(other.abs().sum()) == 0, "the gradient of the block's output flows on to its parts"
    assert float(with_attention.abs().sum()) == 0
    with model.trace(ids):
        block = either.layers[1]
        mlp = block.mlp.output
        with model.lm_head.output.sum().backward():
            one, other = block.output[0].grad.save(), mlp.grad.save()
        one[:] = 0  # the pass is over: a change of one tensor
    assert float(one.abs().sum()) == 0
    assert float(other.abs().sum()) > 0


def test_hooks(either: Pair) -> None:
    model, ids = either.model, either.ids()
    seen = []
    with model.trace(ids):
        first, last = hidden(either, 0), hidden(either, 2)
        last.register_hook(lambda g: g * 2)
        last.register_hook(lambda g: g + 1)
        removed = last.register_hook(lambda g: g * 0)
        removed.remove()
        first.register_hook(lambda g: seen.append(g.abs().sum().save()))
        with model.lm_head.output.sum().backward():
            grad = first.grad.save()
    want = Reference(either, [ids], hooks={(f"{either.blocks}.2", "output"): lambda g: g * 2 + 1})
    want.logits.sum().backward()
    close(grad, want.grad(f"{either.blocks}.0"))
    assert len(seen) == 1
    close(seen[0], want.grad(f"{either.blocks}.0").abs().sum())


# ---- several passes ----


def test_several_passes(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.trace(ids):
        state = hidden(either, 1)
        logits = model.lm_head.output
        grads = []
        for token in range(3):
            with logits[0, -1, token].backward(retain_graph=True):
                grads.append(state.grad.save())
    want = Reference(either, [ids])
    for token, grad in enumerate(grads):
        x = want.seen[f"{either.blocks}.1", "output"]["0"]
        close(grad, torch.autograd.grad(want.logits[0, -1, token], x, retain_graph=True)[0])


def test_retained_gradients_add_up(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.trace(ids):
        state = hidden(either, 1).save()
        state.retain_grad()
        loss = model.lm_head.output.sum()
        assert state.grad is None
        loss.backward(retain_graph=True)
        once = state.grad.clone().save()
        loss.backward(retain_graph=True)
        twice = state.grad.clone().save()
        state.grad = None
        loss.backward()
    want = Reference(either, [ids])
    want.logits.sum().backward()
    close(once, want.grad(f"{either.blocks}.1"))
    close(twice, 2 * once)
    close(state.grad, once)


def test_gradient_and_several_roots(either: Pair) -> None:
    model, ids = either.model, either.ids()
    seed = weights(either, [ids])
    with model.trace(ids):
        state, logits = hidden(either, 1), model.lm_head.output
        with logits.backward(gradient=seed, retain_graph=True):
            one = state.grad.save()
        (two,) = torch.autograd.grad(logits, state, seed, retain_graph=True)
        two = two.save()
        three, four = torch.autograd.grad([logits.sum(), logits[0, 0, 0]], [state, hidden(either, 0)])
        three, four = three.save(), four.save()
    want = Reference(either, [ids])
    x, y = (want.seen[f"{either.blocks}.{k}", "output"]["0"] for k in (1, 0))
    close(one, torch.autograd.grad(want.logits, x, seed, retain_graph=True)[0])
    close(two, one)
    both = torch.autograd.grad([want.logits.sum(), want.logits[0, 0, 0]], [x, y])
    close(three, both[0])
    close(four, both[1])


def test_backward_of_chosen_inputs(either: Pair) -> None:
    model, ids = either.model, either.ids()
    bias, other = (torch.zeros(either.width, requires_grad=True) for _ in range(2))
    with model.trace(ids):
        hidden(either, 1)[:] += bias + other
        state = hidden(either, 0).save()
        model.lm_head.output.sum().backward(inputs=[bias, state])
    want = Reference(either, [ids])
    want.logits.sum().backward()
    assert bias.grad is not None
    close(bias.grad, want.grad(f"{either.blocks}.1").sum((0, 1)))
    close(state.grad, want.grad(f"{either.blocks}.0"))
    assert other.grad is None


def test_second_order(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.trace(ids):
        state = hidden(either, 1)
        loss = model.lm_head.output.logsumexp(-1).sum()
        with loss.backward(create_graph=True):
            penalty = (state.grad**2).sum()
        with penalty.backward():
            grad = state.grad.save()
    implementation = either.hf.config._attn_implementation
    either.hf.set_attn_implementation("eager")  # the fused one has no second derivatives
    try:
        want = Reference(either, [ids])
    finally:
        either.hf.set_attn_implementation(implementation)
    x = want.seen[f"{either.blocks}.1", "output"]["0"]
    (first,) = torch.autograd.grad(want.logits.logsumexp(-1).sum(), x, create_graph=True)
    close(grad, torch.autograd.grad((first**2).sum(), x)[0], 1e-3)


# ---- invokes ----


def test_invokes_of_several_lengths(either: Pair) -> None:
    model = either.model
    prompts = [either.ids(7), either.ids(4, seed=2), either.ids(9, seed=3)]
    grads, alone = [], []
    with model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                state = hidden(either, 1)
                with (model.lm_head.output * weights(either, [ids])).sum().backward():
                    grads.append(state.grad.save())
        with tracer.invoke(either.ids(5)):
            plain = model.lm_head.output.save()
    for ids in prompts:
        with model.trace(ids):
            state = hidden(either, 1)
            with (model.lm_head.output * weights(either, [ids])).sum().backward():
                alone.append(state.grad.save())
    for got, one, ids in zip(grads, alone, prompts, strict=True):
        want = Reference(either, [ids])
        (want.logits * weights(either, [ids])).sum().backward()
        close(got, one, 1e-6)
        close(got, want.grad(f"{either.blocks}.1"))
    with model.trace(either.ids(5)):
        want_plain = model.lm_head.output.save()
    close(plain, want_plain, 1e-5)


def test_padded_prompts_of_one_invoke(either: Pair) -> None:
    model = either.model
    prompts = [either.ids(7), either.ids(4, seed=2)]
    with model.trace(prompts):
        state = hidden(either, 1)
        with model.lm_head.output[:, -1].sum().backward():
            grad = state.grad.save()
    for r, ids in enumerate(prompts):
        want = Reference(either, [ids])
        want.logits[:, -1].sum().backward()
        close(grad[r, 7 - len(ids) :], want.grad(f"{either.blocks}.1")[0])
        assert float(grad[r, : 7 - len(ids)].abs().sum()) == 0


def test_gradients_across_invokes(either: Pair) -> None:
    model, source, target = either.model, either.ids(6), either.ids(6, seed=2)
    with model.trace() as tracer:
        with tracer.invoke(source):
            given = hidden(either, 0)
        with tracer.invoke(target):
            hidden(either, 0)[:, -1] = given[:, -1]
            with model.lm_head.output[:, -1].sum().backward():
                grad = given.grad.save()
    path = f"{either.blocks}.0"
    first = Reference(either, [source])

    def transplant(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :-1], first.seen[path, "output"]["0"][:, -1:]], 1)

    second = Reference(either, [target], {(path, "output"): transplant})
    second.logits[:, -1].sum().backward()
    close(grad, first.grad(path))


def test_an_invoke_of_the_whole_batch(either: Pair) -> None:
    model, prompts = either.model, [either.ids(6), either.ids(6, seed=2)]
    with model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                hidden(either, 0)[:] *= 2
        with tracer.invoke():
            state = hidden(either, 1)
            with model.lm_head.output.sum().backward():
                grad = state.grad.save()
    want = Reference(either, prompts, {(f"{either.blocks}.0", "output"): lambda x: x * 2})
    want.logits.sum().backward()
    close(grad, want.grad(f"{either.blocks}.1"))


# ---- what Python adds ----


class Clamp(torch.autograd.Function):
    """A straight-through estimator: its gradient is not that of what it computes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return g * ctx.scale, None


def test_custom_functions_keep_their_gradient(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.trace(ids):
        first = hidden(either, 0)
        block = either.layers[1]
        block.output[0] = Clamp.apply(block.output[0], 0.5)
        with model.lm_head.output.sum().backward():
            grad = first.grad.save()
    want = Reference(either, [ids], {(f"{either.blocks}.1", "output"): lambda x: Clamp.apply(x, 0.5)})
    want.logits.sum().backward()
    close(grad, want.grad(f"{either.blocks}.0"))
    assert "apply" not in torch.autograd.Function.__dict__ or not hasattr(torch.autograd.Function.apply, "_nng")


def test_an_error_in_a_custom_backward(either: Pair) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            raise ValueError("no gradient today")

    model = either.model
    with pytest.raises(Exception, match="no gradient today"), model.trace(either.ids()):
        first = hidden(either, 0)
        either.layers[1].output[0] = Broken.apply(hidden(either, 1))
        with model.lm_head.output.sum().backward():
            first.grad.save()
    with model.trace(either.ids()):
        assert model.lm_head.output.save() is not None


def test_a_probe_is_trained(either: Pair) -> None:
    model = either.model
    torch.manual_seed(0)
    mine = torch.nn.Sequential(torch.nn.Linear(either.width, 8), torch.nn.ReLU(), torch.nn.Linear(8, either.width))
    theirs = copy.deepcopy(mine)
    losses = []
    optimizers = [torch.optim.Adam(p.parameters(), lr=1e-2) for p in (mine, theirs)]
    for step in range(4):
        ids = either.ids(6)
        for optimizer in optimizers:
            optimizer.zero_grad()
        with model.trace(ids):
            state = hidden(either, 1)
            loss = ((mine(state) - state) ** 2).mean().save()
            if step % 2:
                loss.backward()
        if not step % 2:
            loss.backward()
        x = Reference(either, [ids]).seen[f"{either.blocks}.1", "output"]["0"].detach()
        want = ((theirs(x) - x) ** 2).mean()
        want.backward()
        close(loss, want)
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            close(p.grad, q.grad)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_fine_tuning_is_that_of_transformers(either: Pair, tmp_path: Any) -> None:
    theirs = copy.deepcopy(either.hf)
    theirs.save_pretrained(tmp_path)
    model = LanguageModel(tmp_path, tokenizer=False, dispatch=True)
    rows = torch.tensor([either.ids(8), either.ids(8, seed=2)])
    model.requires_grad_(True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=3e-3) for m in (model, theirs)]
    losses = []
    for _ in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        with model.trace(rows):
            logits = model.lm_head.output
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).save()
        loss.backward()
        want = theirs(rows, labels=rows, use_cache=False).loss
        want.backward()
        assert abs(float(loss) - float(want)) < 1e-4 * max(1.0, abs(float(want)))
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    # not by parameters: where a gradient is zero but for rounding (the bias of keys), AdamW makes noise of it
    with model.trace(rows):
        logits = model.lm_head.output.save()
    close(logits, theirs(rows, use_cache=False).logits, 1e-3)


def test_gradcheck(either: Pair, tmp_path: Any) -> None:
    either.hf.save_pretrained(tmp_path)
    model = LanguageModel(tmp_path, tokenizer=False, dtype=torch.float64)
    blocks = model.get(either.blocks)

    def logits(x: torch.Tensor) -> torch.Tensor:
        with model.trace(either.ids(3)):
            blocks[0].output[0][:, 1, :4] = x
            out = model.lm_head.output[0, -1, :5].save()
        return out

    x = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    # Llama's norms compute in single precision, whatever its dtype
    rough = {"eps": 1e-3, "atol": 1e-3, "rtol": 1e-2} if either.attention == "self_attn" else {}
    assert torch.autograd.gradcheck(logits, (x,), **rough)


# ---- modes ----


def test_lines_under_no_grad(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.trace(ids):
        with torch.no_grad():
            state = hidden(either, 1)  # the first line is under it, the model is not
            constant = model.lm_head.output.sum()
        with (model.lm_head.output.sum() * constant).backward():
            grad = state.grad.save()
    want = Reference(either, [ids])
    (want.logits.sum() * want.logits.sum().detach()).backward()
    close(grad, want.grad(f"{either.blocks}.1"))


def test_a_trace_under_no_grad(either: Pair) -> None:
    model = either.model
    for mode in (torch.no_grad, torch.inference_mode):
        with pytest.raises(GradientError, match="no_grad|inference mode"), mode(), model.trace(either.ids()):
            state = hidden(either, 1)
            with model.lm_head.output.sum().backward():
                state.grad.save()
    with torch.no_grad(), torch.enable_grad(), model.trace(either.ids()):
        state = hidden(either, 1)
        with model.lm_head.output.sum().backward():
            assert state.grad.save() is not None


@pytest.mark.parametrize("layer", [0, 2])
def test_steps_of_a_generation(either: Pair, layer: int) -> None:
    model, ids = either.model, either.ids(5)
    grads = []
    with model.generate(ids, max_new_tokens=3, pad_token_id=0) as tracer:
        for _ in tracer.iter[:]:
            state = hidden(either, layer)
            with model.lm_head.output.logsumexp(-1).sum().backward():
                grads.append(state.grad.save())
        output = tracer.result.save()
    for step, grad in enumerate(grads):
        row = output[0, : len(ids) + step].tolist()
        want = Reference(either, [row])
        want.logits[:, -1].logsumexp(-1).sum().backward()
        whole = want.grad(f"{either.blocks}.{layer}")
        close(grad, whole if step == 0 else whole[:, -1:])


def test_scan_and_shapes(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.scan(ids):
        state = hidden(either, 1)
        with model.lm_head.output.sum().backward():
            grad = state.grad.save()
            assert grad.shape == (1, len(ids), either.width)
    assert grad.shape == (1, len(ids), either.width)
    assert grad.is_meta


def test_standing_edits(either: Pair) -> None:
    model, ids = either.model, either.ids()
    with model.edit() as edited:
        hidden(either, 0)[:] *= 2
    with edited.trace(ids):
        state = edited.get(f"{either.blocks}.1").output[0]
        with edited.lm_head.output.sum().backward():
            grad = state.grad.save()
    want = Reference(either, [ids], {(f"{either.blocks}.0", "output"): lambda x: x * 2})
    want.logits.sum().backward()
    close(grad, want.grad(f"{either.blocks}.1"))


def test_a_graph_with_gradients(either: Pair, tmp_path: Any) -> None:
    model, ids = either.model, either.ids()
    with model.trace(ids) as tracer:
        state = hidden(either, 1)
        with model.lm_head.output.sum().backward():
            state.grad[:, 0] = 0
            grad = hidden(either, 0).grad.save()
    text = str(tracer.graph)
    assert "backward" in text and "grad of" in text
    tracer.graph.save(tmp_path / "graph")
    (again,) = nnsight_go.Graph.load(tmp_path / "graph").run(model)
    close(again, grad, 1e-6)


# ---- what cannot be ----


MISTAKES: dict[str, tuple[Callable[[Pair], Any], str]] = {}


def mistake(says: str) -> Callable[[Callable[[Pair], Any]], None]:
    def note(f: Callable[[Pair], Any]) -> None:
        MISTAKES[f.__name__] = f, says

    return note


@mistake("only floating point and complex values have gradients")
def of_token_ids(pair: Pair) -> None:
    with pair.model.lm_head.output.sum().backward():
        pair.model.inputs[1]["input_ids"].grad.save()


@mistake("of dtype int64")
def from_indices(pair: Pair) -> None:
    state = hidden(pair, 1)
    with pair.model.lm_head.output.argmax(-1).backward():
        state.grad.save()


@mistake("no part in what backward\\(\\) starts from")
def not_connected(pair: Pair) -> None:
    first, last = hidden(pair, 0), hidden(pair, 2)
    with first.sum().backward():
        first.grad.save()
        last.grad.save()


@mistake("h.grad\\[:, -1\\], not h\\[:, -1\\].grad")
def of_a_part(pair: Pair) -> None:
    part = hidden(pair, 1)[:, -1]
    with pair.model.lm_head.output.sum().backward():
        part.grad.save()


@mistake("an earlier backward pass has gone through this graph")
def freed(pair: Pair) -> None:
    state, loss = hidden(pair, 1), pair.model.lm_head.output.sum()
    for _ in range(2):
        with loss.backward():
            state.grad.save()


@mistake("grad can be implicitly created only for scalar outputs")
def of_no_scalar(pair: Pair) -> None:
    state = hidden(pair, 1)
    with pair.model.lm_head.output.backward():
        state.grad.save()


@mistake("takes part in autograd")
def of_nothing(pair: Pair) -> None:
    pair.model.lm_head.output.sum().backward()


@mistake("takes part in autograd")
def of_what_was_detached(pair: Pair) -> None:
    state = hidden(pair, 1)
    with pair.model.lm_head.output.detach().sum().backward():
        state.grad.save()


@mistake("a gradient of float32 .* cannot become one of float32")
def set_to_another_size(pair: Pair) -> None:
    state = hidden(pair, 1)
    with pair.model.lm_head.output.sum().backward():
        state.grad = torch.zeros(2)


@mistake("a gradient cannot become a float")
def set_to_a_number(pair: Pair) -> None:
    state = hidden(pair, 1)
    with pair.model.lm_head.output.sum().backward():
        state.grad = 0.0


@mistake("this backward pass has gone by")
def entered_late(pair: Pair) -> None:
    done = pair.model.lm_head.output.sum().backward()
    hidden(pair, 1).sum()
    with done:
        pass


@mistake("cannot be switched off")
def switched_off(pair: Pair) -> None:
    state = hidden(pair, 1).requires_grad_()
    state.requires_grad = False


@mistake("fills the gradients of these inputs and has no block")
def a_block_of_inputs(pair: Pair) -> None:
    state = hidden(pair, 1)
    with pair.model.lm_head.output.sum().backward(inputs=[state]):
        pass


@mistake("takes no is_grads_batched")
def unused(pair: Pair) -> None:
    torch.autograd.grad(pair.model.lm_head.output.sum(), hidden(pair, 1), allow_unused=True)


@mistake("grad_fn is not available inside a trace")
def grad_fn(pair: Pair) -> None:
    _ = hidden(pair, 1).grad_fn


@pytest.mark.parametrize("name", list(MISTAKES))
def test_mistakes(either: Pair, nothing_stays: None, name: str) -> None:
    line, says = MISTAKES[name]
    with (
        pytest.raises(NnsightError, match=says) as raised,
        either.model.trace(either.ids()),
    ):
        line(either)
    assert "your line" in str(raised.value)
    with either.model.trace(either.ids()):
        assert either.model.lm_head.output.save() is not None


def test_facts(either: Pair) -> None:
    with either.model.trace(either.ids()):
        early, state = hidden(either, 0), hidden(either, 1)
        assert not state.requires_grad and not state.retains_grad
        state.requires_grad_(True)
        assert state.requires_grad and state.retains_grad and (state * 2).requires_grad
        assert hidden(either, 2).requires_grad and not early.requires_grad
        assert not state.detach().requires_grad or True  # as it was computed from it: PyTorch's own answer is False
        assert state.grad is None


def test_memory_comes_back(either: Pair) -> None:
    model, ids = either.model, either.ids()

    def once() -> None:
        with model.trace(ids):
            states = [hidden(either, k) for k in range(3)]
            states[0].retain_grad()
            float(states[1].sum())
            with model.lm_head.output.sum().backward():
                states[2].grad *= 0.5
                [s.grad.save() for s in states]

    once()
    before = _ffi.counters()
    for _ in range(5):
        once()
    assert _ffi.counters() == before


# ---- training ----


@pytest.fixture
def dropping(either: Pair, tmp_path: Any) -> tuple[LanguageModel, Any]:
    """A model with dropout everywhere its architecture has some, in both libraries."""
    theirs = copy.deepcopy(either.hf)
    config = theirs.config
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.3)
    theirs.save_pretrained(tmp_path)
    theirs = type(theirs).from_pretrained(tmp_path).train()
    return LanguageModel(tmp_path, tokenizer=False, dispatch=True), theirs


def test_training_drops_what_transformers_drops(dropping: tuple[LanguageModel, Any], either: Pair) -> None:
    model, theirs = dropping
    rows = torch.tensor([either.ids(8), either.ids(8, seed=2)])
    assert not model.training
    with model.trace(rows):
        calm = model.lm_head.output.save()
    assert model.train() is model and model.training
    for seed in range(3):
        torch.manual_seed(seed)
        with model.trace(rows):
            logits = model.lm_head.output.save()
        torch.manual_seed(seed)
        want = theirs(rows, use_cache=False).logits
        close(logits, want)
        assert float((logits - calm).abs().max()) > 1e-2
    model.eval()
    with model.trace(rows):
        again = model.lm_head.output.save()
    assert torch.equal(calm, again)
    with pytest.raises(InputError, match="trains as the whole model does"):
        model.get(either.blocks)[0].train()


def test_training_steps_with_dropout(dropping: tuple[LanguageModel, Any], either: Pair) -> None:
    model, theirs = dropping
    model.train()
    model.requires_grad_()
    rows = torch.tensor([either.ids(8), either.ids(8, seed=2)])
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2) for m in (model, theirs)]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.manual_seed(step)
        with model.trace(rows):
            logits = model.lm_head.output
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
            loss.backward()
            loss.save()
        torch.manual_seed(step)
        want = theirs(rows, labels=rows, use_cache=False).loss
        want.backward()
        close(loss, want)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        close(p, q, 1e-3)


def test_the_same_is_dropped_when_the_model_runs_again(dropping: tuple[LanguageModel, Any], either: Pair) -> None:
    model, _ = dropping
    blocks = model.get(either.blocks)
    model.train()
    torch.manual_seed(5)
    with model.trace(either.ids()):
        early = blocks[0].output[0]
        seen = early.sum().item()  # the model has run to here, and nothing followed it
        with model.lm_head.output.sum().backward():
            early.grad.save()
        early.save()
    assert abs(float(early.detach().sum()) - seen) < 1e-3 * max(1.0, abs(seen))


def test_invokes_draw_for_themselves(dropping: tuple[LanguageModel, Any], either: Pair) -> None:
    model, theirs = dropping
    model.train()
    prompts = [either.ids(6), either.ids(4, seed=2)]
    torch.manual_seed(1)
    logits = []
    with model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                logits.append(model.lm_head.output.save())
    torch.manual_seed(1)
    for got, ids in zip(logits, prompts, strict=True):
        close(got, theirs(torch.tensor([ids]), use_cache=False).logits)


def test_another_librarys_backward_in_the_place_of_torchs(gpt2_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", lambda self, *a, **k: pytest.fail("it is not ours"))
    with gpt2_pair.model.trace(gpt2_pair.ids(4)):
        state = gpt2_pair.model.transformer.h[0].output[0]
        with gpt2_pair.model.lm_head.output.sum().backward():
            grad = state.grad.save()
    assert grad.abs().sum() > 0
