"""Edits of wrapped modules: each later trace brings them along, as plain hooks would, ahead of its own lines."""

from __future__ import annotations

import copy
import gc
import os
import pathlib
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import nnsight_go
from nnsight_go import InputError, LanguageModel, ModulePathError, NNsight, OpError
from nnsight_go.hosted_language import HostedLanguageModel
from references import Pair
from test_edit_programs import check
from test_hosted import Case, _assign_first, _proxies, at, called, case, close, flat, plain
from test_hosted_language import hosted
from zoo import ZOO, tiny

__all__ = ["case"]  # a fixture


def changed(module: Any) -> None:
    """Scales and moves the first tensor that a module gives."""
    value = _proxies(module.output)[0]
    if isinstance(module.output, torch.Tensor):
        module.output = value * 0.5 + 1
    else:
        _assign_first(module.output, value * 0.5 + 1)


def change(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 + 1


def mlp() -> tuple[NNsight, torch.Tensor]:
    module, (x,), _ = ZOO["mlp"]()
    return NNsight(module), x


def out_of(model: NNsight, *args: Any, **kwargs: Any) -> torch.Tensor:
    with model.trace(*args, **kwargs):
        out = model.output.save()
    return out


# ---- what they do ----


@pytest.mark.parametrize("how", ["replace", "in place", "after a value"])
def test_edits(case: Case, how: str) -> None:
    model, args, kwargs = case
    paths = [
        p for p, outputs in called(case).items() if p and flat(outputs[0]) and flat(outputs[0])[0].is_floating_point()
    ]
    for path in paths[:: max(len(paths) // 3, 1)]:
        with model.edit(*args, **kwargs) as edited:
            if how == "in place":
                value = _proxies(at(edited, path).output)[0]
                value *= 0.5
                value += 1
            else:
                changed(at(edited, path))
        for which, changes in ((edited, {path: change}), (model, {})):
            torch.manual_seed(1)
            want = plain(copy.deepcopy(model._module), args, kwargs, changes)
            torch.manual_seed(1)
            with torch.no_grad() if how == "in place" else torch.enable_grad(), which.trace(*args, **kwargs):
                value = _proxies(at(which, path).output)[0]
                if how == "after a value":
                    assert float(value.detach().float().abs().sum()) >= 0
                seen = value.save()
                out = [p.save() for p in _proxies(which.output)]
            close(seen, flat(want[path][0])[0])
            for got, one in zip(out, flat(want[""][0]), strict=True):
                close(got, one)


def test_an_edit_goes_ahead_of_the_traces_own_lines() -> None:
    model, x = mlp()
    with model.edit(x) as edited:
        edited[0].output = edited[0].output * 2
        edited[1].output[:, 0] = 3.0
    with edited.trace(x):
        first = edited[0].output.save()
        edited[0].output = edited[0].output + 1
        hidden = edited[1].output
        before = hidden.clone().save()
        hidden[:, 1] = hidden[:, 0]
        out = edited.output.save()
    module = model._module
    close(first, module[0](x) * 2)
    want = torch.relu(module[0](x) * 2 + 1)
    want[:, 0] = 3
    close(before, want)
    want = want.clone()
    want[:, 1] = 3
    close(out, module[2](want))


@pytest.mark.parametrize("needs", [False, True])
def test_the_trace_changes_in_place_what_an_edit_has_put_there(needs: bool) -> None:
    model, x = mlp()
    with model.edit(x) as edited:
        mine = edited[0].output * 2
        edited[0].output = mine
        edited[2].output = edited[2].output + mine.sum()  # the edit's own is as it was
    with torch.no_grad(), edited.trace(x):
        hidden = edited[0].output
        if needs:
            assert float(hidden.sum()) != 0
        hidden[:, 0] = 7.0
        if needs:
            assert float(hidden[0, 0]) == 7
        hidden[:, 1] = 8.0
        seen = edited[1].input.save()
        edited[2].output[:, 0] = 1.0
        out = edited.output.save()
    module = model._module
    doubled = module[0](x) * 2
    want = doubled.detach().clone()
    want[:, 0], want[:, 1] = 7, 8
    close(seen, want)
    want = (module[2](torch.relu(want)) + doubled.sum()).detach()
    want[:, 0] = 1
    close(out, want)


def test_an_edit_and_its_trace_share_no_tensors() -> None:
    model, x = mlp()
    with model.edit(x) as edited, torch.no_grad():
        h = edited[0].output
        edited[2].input[:] = h.sum()  # what the trace writes into it does not show
    with torch.no_grad(), edited.trace(x):
        h = edited[0].output
        h[:] = 0
        out = edited[2].input.save()
    close(out, torch.full_like(out, float(model._module[0](x).sum())))


def test_two_edits_and_edits_of_edits() -> None:
    model, x = mlp()
    with model.edit(x) as first:
        model[0].output = model[0].output * 2
    with first.edit() as second:
        first[0].output = first[0].output + 1
    turned = model.with_edits(second.edits[1], second.edits[0])
    assert [len(m.edits) for m in (model, first, second, turned)] == [0, 1, 2, 2]
    h = model._module[0](x)
    for which, want in ((model, h), (first, h * 2), (second, h * 2 + 1), (turned, (h + 1) * 2)):
        with which.trace(x):
            seen = which[0].output.save()
        close(seen, want)


def test_in_place_and_clear() -> None:
    model, x = mlp()
    with model.edit(x, inplace=True) as edited:
        edited[1].output[:] = 0
    assert edited is model and len(model.edits) == 1
    close(out_of(model, x), model._module[2].bias.expand(4, 3))
    close(model.trace(x, trace=False), model._module[2].bias.expand(4, 3))
    with model.edit() as more:
        more[2].output = more[2].output + 1
    model.clear_edits()
    assert model.edits == () and len(more.edits) == 2
    close(out_of(model, x), model._module(x))
    close(out_of(more, x), model._module[2].bias.expand(4, 3) + 1)


def test_each_invoke_brings_them() -> None:
    model, _ = mlp()
    inputs = [torch.randn(n, 6) for n in (2, 1, 3)]
    with model.edit(inputs[0]) as edited:
        edited[0].output = edited[0].output * 2
    for needs in (False, True):
        hidden, outs = [], []
        with edited.trace() as tracer:
            for i, x in enumerate(inputs):
                with tracer.invoke(x):
                    h = edited[0].output
                    if needs and i != 0:
                        assert float(h.detach().abs().sum()) > 0
                    if i == 1:
                        edited[0].output = h + hidden[0].sum()
                    hidden.append(h.save())
                    outs.append(edited.output.save())
        module = model._module
        doubled = [module[0](x) * 2 for x in inputs]
        for i, x in enumerate(doubled):
            close(hidden[i], x)
            close(outs[i], module[2](torch.relu(x + doubled[0].sum() if i == 1 else x)))


def test_invokes_that_name_nothing_and_edits_that_go_unread() -> None:
    ran: list[torch.Tensor] = []
    module, (x,), _ = ZOO["mlp"]()
    model = NNsight(module)
    with model.edit(x) as edited:
        edited[0].output = edited[0].output * 0
    handle = module[1].register_forward_hook(lambda m, a, out: ran.append(out.detach()))
    with edited.trace(x):
        pass
    assert len(ran) >= 1 and not ran[-1].any()
    with edited.trace() as tracer:
        with tracer.invoke(x):
            pass
        with tracer.invoke(x[:1]):
            out = edited.output.save()
    handle.remove()
    close(out, module[2](torch.zeros(1, 8)))


def test_values_of_the_trace_and_stop() -> None:
    model, x = mlp()
    with model.edit(x) as edited, torch.no_grad():
        edited[0].output[:, 0] = 1.0
        edited[2].output[:] *= 0
    with torch.no_grad(), edited.trace(x):
        h = edited[0].output
        assert bool((h[:, 0] == 1).all())
        h[:, 1] = 2 if float(h[0, 0]) == 1 else 5
        assert bool((edited[1].output[:, :2] == torch.tensor([1.0, 2.0])).all())
        out = edited.output.save()
    assert not out.any()
    with edited.trace(x) as tracer:
        h = edited[0].output.save()
        tracer.stop()
    assert bool((h[:, 0] == 1).all())


def test_gradients() -> None:
    model, x = mlp()
    with model.edit(x) as edited:
        edited[1].output = edited[1].output * 3
    with edited.trace(x):
        h = edited[0].output
        with edited.output.sum().backward():
            grad = h.grad.save()
    module = model._module
    kept = module[0](x).detach().requires_grad_()
    (want,) = torch.autograd.grad(module[2](torch.relu(kept) * 3).sum(), kept)
    close(grad, want)
    module.zero_grad()
    with edited.trace(x):
        edited.output.sum().backward()
    mine = module[0].weight.grad.clone()
    module.zero_grad()
    module[2](torch.relu(module[0](x)) * 3).sum().backward()
    close(mine, module[0].weight.grad)


def test_cache_session_and_scan() -> None:
    model, x = mlp()
    with model.edit(x) as edited:
        edited[0].output = edited[0].output * 2
    with edited.trace(x) as tracer:
        cache = tracer.cache()
    close(cache["model.0"].output, model._module[0](x) * 2)
    close(cache["model"].output, model._module[2](torch.relu(model._module[0](x) * 2)))
    with model.session():
        with edited.trace(x):
            h = edited[0].output
        with model.trace(x):
            seen = (model[0].output * 2 - h).save()
    assert not seen.any()
    with edited.scan(x):
        h = edited[0].output.save()
    assert h.shape == (4, 8) and h.is_meta


def test_later_calls() -> None:
    module, args, _ = ZOO["recurrent"]()
    model = NNsight(module)
    with model.edit(*args) as edited:
        edited.cell.output = edited.cell.output * 0 + 1
        edited.cell.next(2).output[:] = 2.0
    with torch.no_grad(), edited.trace(*args):
        seen = [edited.cell.output.save()]
        for _ in range(3):
            seen.append(edited.cell.next().output.save())
    assert bool((seen[0] == 1).all()) and bool((seen[2] == 2).all())
    inputs = torch.cat([args[0][:, 1], torch.tanh(seen[0])], 1)
    close(seen[1], module.cell(inputs))


def test_inputs_and_modules_of_the_model() -> None:
    module, args, kwargs = ZOO["structured"]()
    model = NNsight(module)
    with model.edit(*args, **kwargs) as edited:
        edited.inner.inputs[1]["scale"] = torch.full((1,), 5.0)
        edited.tied.output = edited.inner.linear(edited.tied.output)
    with edited.trace(*args, **kwargs):
        out = edited.output.logits.save()
    first = module.inner.linear(args[0]) * 5
    want = module.tied(module.inner.linear(module.tied(first))) + first.sum(-1, keepdim=True)
    close(out, want)


def test_other_inputs_than_the_example() -> None:
    model, _ = mlp()
    with model.edit(torch.rand(1, 6)) as edited:
        edited[0].output[-1] = 0
    x = torch.rand(7, 6)
    with torch.no_grad():
        hidden = model._module[0](x)
        hidden[-1] = 0
        close(out_of(edited, x), model._module[2](torch.relu(hidden)))


# ---- which input an edit is recorded for ----


def test_the_input_that_was_traced_last() -> None:
    model, x = mlp()
    with pytest.raises(InputError, match="there was none") as raised, model.edit():
        pass
    assert "model.edit(x)" in str(raised.value)
    out_of(model, x)
    kept = weakref.ref(x)
    with model.edit() as edited:
        edited[1].output[:] = 0
    close(out_of(edited, x), model._module[2].bias.expand(4, 3))
    del x
    gc.collect()
    assert kept() is None, "its tensors are not kept"


def test_modules_that_the_example_does_not_call(tmp_path: pathlib.Path) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, other: bool = False) -> torch.Tensor:
            return self.b(self.b(x)) if other else self.a(x)

    model, x = NNsight(Either()), torch.rand(1, 2)
    with pytest.raises(ModulePathError, match="model.b is not called"), model.edit(x):
        model.b.output[:] = 0
    with model.edit(x, other=True) as edited:
        edited.b.next().output[:] = 0
    assert not out_of(edited, x, other=True).any()
    with pytest.raises(ModulePathError, match="an edit names the output of b, which is not called 2 times") as raised:
        out_of(edited, x)
    assert raised.value.path == "b" and "edited.b.next().output" in str(raised.value)
    with pytest.raises(ModulePathError, match="an edit names"), edited.trace(x):
        float(edited.output.sum())
    assert not out_of(edited, x, other=True).any()
    edited.edits[0].save(tmp_path / "edit")
    lacking = mlp()[0].with_edits(nnsight_go.load_edit(tmp_path / "edit"))
    with pytest.raises(ModulePathError, match="an edit names b, which this model does not have"):
        out_of(lacking, torch.rand(1, 6))


def test_an_edit_of_a_tensor_that_is_not_there() -> None:
    class Pair_(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor, two: bool = False) -> torch.Tensor:
            out = self.inner(x, two)
            return out[0] + out[1] if two else out

    class Inner(nn.Module):
        def forward(self, x: torch.Tensor, two: bool) -> Any:
            return (x, x * 2) if two else x * 1

    model, x = NNsight(Pair_()), torch.rand(1, 2)
    with model.edit(x, two=True) as edited:
        edited.inner.output[1][:] = 0
    close(out_of(edited, x, two=True), x)
    with pytest.raises(ModulePathError, match="output of inner, which has no 1 in this forward pass"):
        out_of(edited, x)
    with model.edit(x, two=True) as edited:
        edited.inner.inputs[0][0][:] = 3  # its other input is no tensor, and its output another one each time
    assert bool((out_of(edited, x) == 3).all()) and bool((out_of(edited, x, two=True) == 9).all())


# ---- sizes and values ----


@pytest.mark.parametrize("name", ["mlp", "lstm", "gru", "unet", "bert", "recurrent"])
def test_sizes_of_the_input_are_refused(name: str) -> None:
    module, args, kwargs = ZOO[name]()
    model = NNsight(module)
    path = {"lstm": "embed", "bert": "encoder.layer.0.output", "unet": "middle", "recurrent": "cell"}.get(name, "")
    seen = plain(copy.deepcopy(module), args, kwargs)
    value = flat(seen[path][0])[0]
    known = {"unet": 1}.get(name, value.dim() - 1)  # channels of an image are its second axis
    with model.edit(*args, **kwargs) as edited:
        h = _proxies(at(edited, path).output)[0]
        assert h.shape[known] == value.shape[known] and h.dim() == value.dim() and h.dtype == value.dtype
        for axis in set(range(value.dim())) - {known}:
            with pytest.raises(InputError, match="depends on the input, and an edit is recorded without one"):
                h.shape[axis]
        with pytest.raises(InputError, match="depends on the input"):
            h.numel()
        assert "?" in repr(h.shape)


def test_sizes_that_are_the_models_are_known() -> None:
    module, args, kwargs = ZOO["bert"]()
    model = NNsight(module)
    with model.edit(*args, **kwargs) as edited:
        h = edited.encoder.layer[0].output
        width = h.shape[-1]
        parts = h.chunk(4, -1)
        heads = h.unflatten(-1, (2, -1))
        assert width == 16 and len(parts) == 4 and heads.shape[-2:] == (2, 8)
        edited.encoder.layer[0].output = torch.cat([torch.zeros_like(parts[0]), *parts[1:]], -1)
    ids = torch.randint(3, 50, (1, 9))
    with edited.trace(input_ids=ids):
        h = edited.encoder.layer[0].output.save()
    assert h.shape == (1, 9, 16) and not h[..., :4].any() and h[..., 4:].all()


def test_sizes_of_which_nothing_is_known() -> None:
    module, args, _ = ZOO["experts"]()  # cannot be tried out without data
    model = NNsight(module)
    with model.edit(*args) as edited:
        h = edited.router.output
        assert h.dim() == 2 and h.dtype == torch.float32 and h.is_floating_point()
        for ask in (lambda: h.shape[-1], lambda: h.numel(), lambda: len(h), lambda: h.unbind(-1)):
            with pytest.raises(InputError, match="depends on the input"):
                ask()
        edited.router.output = h.roll(1, -1) * 1.5
    seen = plain(copy.deepcopy(module), args, {}, {"router": lambda x: x.roll(1, -1) * 1.5})
    close(out_of(edited, *args), seen[""][0])
    other = torch.randn(2, 4, 6)
    out_of(model, *args), out_of(model, other)  # now two kinds are known
    with model.edit(other):
        assert model.router.output.shape[-1] == 3
        with pytest.raises(InputError, match="depends on the input"):
            model.router.output.shape[0]


def test_values_and_saves_are_refused() -> None:
    model, x = mlp()
    for line in (
        lambda h: float(h.sum()),
        lambda h: bool(h.mean() > 0),
        lambda h: h.save(),
    ):
        with pytest.raises(InputError, match="an edit"), model.edit(x):
            line(model[0].output)
    with pytest.raises(InputError, match="inside a trace"), model.trace(x), model.edit(x):
        pass
    with pytest.raises(KeyError), model.edit(x, inplace=True):
        model[0].output[:] = 0
        raise KeyError
    with model.edit(x) as edited:
        h = edited[0].output
    with pytest.raises(nnsight_go.NotSavedError):
        h + 1
    assert model.edits == ()
    close(out_of(model, x), model._module(x))


def test_an_edit_that_changes_sizes() -> None:
    model, x = mlp()
    with model.edit(x) as edited:
        edited[0].output = torch.cat([edited[0].output, edited[0].output])
    (edit,) = edited.edits
    assert edit.resizes
    with edited.trace(x):
        assert edited[1].output.shape == (8, 8)
        out = edited.output.save()
    close(out, model._module(x).repeat(2, 1))
    with model.edit(x) as edited:
        edited[0].output = edited[0].output * 2
    assert not edited.edits[0].resizes


def test_a_line_that_is_wrong_is_named() -> None:
    model, x = mlp()
    with model.edit(x) as edited:
        edited[0].output = edited[0].output @ torch.zeros(3, 3)
    with pytest.raises(OpError) as raised:
        out_of(edited, x)
    assert "torch.zeros(3, 3)" in str(raised.value)


def test_an_edit_has_tensors_of_its_own() -> None:
    model, x = mlp()
    vector = torch.randn(8)
    extra = nn.Linear(8, 8)
    with model.edit(x) as edited, torch.no_grad():
        edited[0].output[:] = vector + extra(edited[0].output)
    want = vector + extra(model._module[0](x))
    with torch.no_grad():
        vector.zero_()
        extra.weight.zero_()
    with torch.no_grad(), edited.trace(x):
        seen = edited[0].output.save()
    close(seen, want)


# ---- views and files ----


def test_a_view_is_the_same_model() -> None:
    module, args, _ = ZOO["mlp"]()
    model = NNsight(module, rename={"0": "first"})
    with model.edit(*args) as edited:
        model.first.output[:] = 0
    assert type(edited) is NNsight and edited is not model and repr(edited) == repr(model)
    assert edited.first.weight is module[0].weight and edited.first is edited[0] and edited.first is not model.first
    assert edited[1].parent is edited and model[1].parent is model
    with edited.trace(*args):
        assert float(edited.first.output.abs().sum()) == 0
    kept = weakref.ref(edited)
    del edited
    gc.collect()
    assert kept() is None
    close(out_of(model, *args), module(*args))


def test_files(tmp_path: pathlib.Path) -> None:
    model, x = mlp()
    shift = torch.randn(8)
    with model.edit(x) as edited:
        edited[0].output = edited[0].output + shift
    (edit,) = edited.edits
    edit.save(tmp_path / "shift.edit")
    again = nnsight_go.load_edit(tmp_path / "shift.edit")
    assert str(again) == str(edit) and "read 0.output" in str(edit)
    other = NNsight(copy.deepcopy(model._module))
    close(out_of(other.with_edits(again), x), out_of(edited, x))


# ---- language models ----


def test_a_hosted_language_model_equals_a_native_one(either: Pair, tmp_path: pathlib.Path) -> None:
    rows = [either.ids(7), either.ids(4, seed=2)]
    theirs = hosted(either).model
    found = []
    vector = torch.randn(either.width)
    for model in (theirs, either.model):
        with model.edit() as edited:
            hidden = edited.get(either.blocks)[1].output[0]
            hidden[:, -1] = vector
            mlp = edited.get(either.blocks)[2].mlp
            mlp.output = mlp.output * (hidden.shape[-1] / 10) + hidden.mean(1, keepdim=True)
            with pytest.raises(InputError, match="depends on the input"):
                hidden.shape[1]
            logits = edited.lm_head.output
            edited.lm_head.output = torch.where(logits > 0, logits, 0)
        assert type(edited) is type(model)
        assert edited.config is model.config or edited.config == model.config
        logits = []
        with torch.no_grad(), edited.trace() as tracer:
            for ids in rows:
                with tracer.invoke(ids):
                    edited.get(either.blocks)[1].output[0][:, 0] *= 0.5
                    logits.append(edited.output.logits.save())
        edited.edits[0].save(tmp_path / type(model).__name__)
        found.append(logits)
    for got, want in zip(*found, strict=True):
        close(got, want)
    edit = nnsight_go.load_edit(tmp_path / type(either.model).__name__)  # of the native one
    padded = []
    for model in (theirs, either.model):
        with torch.no_grad(), model.with_edits(edit).trace(rows):
            padded.append(model.lm_head.output[0].save())  # what stands on padding is the models' own
    close(*padded)


@pytest.mark.parametrize("seed", range(int(os.environ.get("NNSIGHT_GO_EDITS", "30"))))
def test_random_edits(either: Pair, seed: int, tmp_path: pathlib.Path) -> None:
    # GPT-2's own linear layers look at sizes, so that an edit cannot call them on values
    check(either, hosted(either).model, seed, tmp_path, ("the model has left behind", "this size depends on the input"))


def test_text_and_no_trace(text_pair: Pair) -> None:
    found = []
    for model in (LanguageModel(text_pair.directory, native=False), text_pair.model):
        with model.edit() as edited:
            edited.transformer.h[0].output[0][:] *= 2
        assert edited.tokenizer is not None
        with torch.no_grad():
            found.append(edited.trace("Rome", trace=False).logits)
    close(*found)


def test_models_that_take_more_than_ids() -> None:
    theirs, given = tiny("vit")
    model = LanguageModel(theirs.eval(), tokenizer=False)
    assert isinstance(model, HostedLanguageModel)
    with pytest.raises(InputError, match="there was none"), model.edit():
        pass
    with model.edit(**given) as edited:
        edited.embeddings.output[:, 0] = 0
    with torch.no_grad(), model.edit(inplace=True):  # as traced last
        model.embeddings.output[:, 0] = 0
    for which in (edited, model):
        with torch.no_grad(), which.trace(**given):
            hidden = which.embeddings.output.save()
        assert not hidden[:, 0].any() and hidden[:, 1:].all()
    theirs, given = tiny("t5")
    model = LanguageModel(theirs.eval(), tokenizer=False)
    with model.edit() as edited:
        hidden = edited.decoder.block[0].output[0]
        with pytest.raises(InputError, match="depends on the input"):
            hidden.shape[1]
        hidden[:, -1] = 0
    with torch.no_grad(), edited.trace(**given):
        hidden = edited.decoder.block[0].output[0].save()
    assert hidden.shape[1] == 4 and not hidden[:, -1].any() and hidden[:, :-1].all()


def test_memory_and_hooks() -> None:
    model, x = mlp()
    with model.edit(x) as edited, torch.no_grad():
        edited[0].output[:] *= 2
    out_of(edited, x)
    before = nnsight_go._ffi.counters()
    for _ in range(20):
        with torch.no_grad(), edited.trace(x):
            float(edited[1].output.sum())
            out = edited.output.save()
        del out
        with model.edit() as other:
            other[0].output[:] *= 2
        out_of(other, x)
        del other
    gc.collect()
    after = nnsight_go._ffi.counters()
    assert all(after[key] <= before[key] for key in before), (before, after)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model._module.modules())


# ---- inside modules ----


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).split(8, dim=-1)
        return torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v


def test_operations_of_a_module(tmp_path: pathlib.Path) -> None:
    module = Attention()
    model, x = NNsight(module), torch.rand(1, 3, 8)
    with model.edit(x) as edited:
        pattern = edited.source.softmax_0.output
        with pytest.raises(InputError, match="depends on the input"):
            pattern.shape[1]
        assert edited.source.split_0.output[2].shape[-1] == 8
        edited.source.softmax_0.output = pattern * 2
    edited.edits[0].save(tmp_path / "edit")
    again = NNsight(module).with_edits(nnsight_go.load_edit(tmp_path / "edit"))
    for which in (edited, again):
        for y in (x, torch.rand(2, 5, 8)):
            close(out_of(which, y), module(y) * 2)
            with which.trace(y):
                scores = which.source.softmax_0.output
                assert float(scores[0, 0].detach().sum()) == pytest.approx(2)
                which.source.softmax_0.output = scores / 4
                out = which.output.save()
            close(out, module(y) / 2)
    close(out_of(model, x), module(x))


# ---- generation ----


def test_generation(either: Pair) -> None:
    told = []
    prompt = either.ids(5)
    for model in (hosted(either).model, either.model):
        with model.edit() as edited:
            edited.get(either.blocks)[1].output[0][:, -1] *= -3
            edited.lm_head.output = edited.lm_head.output.roll(1, -1)
        seen = []
        with torch.no_grad(), edited.generate(prompt, max_new_tokens=4, do_sample=False) as tracer:
            plain_tokens = tracer.result.save()
        with torch.no_grad(), edited.generate(prompt, max_new_tokens=4, do_sample=False) as tracer:
            for step in tracer.iter[:]:
                hidden = edited.get(either.blocks)[1].output[0]
                if step == 1:
                    assert float(hidden.abs().sum()) > 0
                    hidden[:] *= 0.5
                seen.append(hidden[:, -1].save())
            tokens = tracer.result.save()
        with torch.no_grad(), model.generate(prompt, max_new_tokens=4, do_sample=False) as tracer:
            other = tracer.result.save()
        assert not torch.equal(plain_tokens, other)
        told.append((plain_tokens, tokens, torch.stack(seen), other))
    for got, want in zip(*told, strict=True):
        close(got.float(), want.float())


def test_generation_of_an_encoder_and_a_decoder() -> None:
    theirs, _ = tiny("t5")
    theirs.generation_config.decoder_start_token_id = 0
    model = LanguageModel(theirs.eval(), tokenizer=False)
    with model.edit() as edited:
        edited.encoder.block[0].output[0][:] = 0
        edited.decoder.block[0].output[0][:] *= 2
    with torch.no_grad(), edited.generate([[5, 6, 7]], max_new_tokens=3, min_new_tokens=3) as tracer:
        hidden = edited.encoder.block[0].output[0].save()
        states = [edited.decoder.block[0].output[0].save() for _ in tracer.iter[:]]
    with torch.no_grad(), model.generate([[5, 6, 7]], max_new_tokens=1) as tracer:
        model.encoder.block[0].output[0][:] = 0
        want = model.decoder.block[0].output[0].save()
    assert not hidden.any() and len(states) == 3
    close(states[0], want * 2)
