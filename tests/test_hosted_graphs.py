"""Stored graphs on wrapped modules: the same again, on other inputs, from files, and beside models of the engine."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_go import Graph, GraphError, LanguageModel, ModulePathError, NNsight, OpError
from nnsight_go.hosting import mapped
from references import Pair
from test_hosted import _proxies, at, close
from test_rowwise import like
from zoo import ZOO

pytestmark = pytest.mark.usefixtures("nothing_stays")


def small() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)


def read(graph: Graph, directory: pathlib.Path) -> Graph:
    """What comes back from a file."""
    graph.save(directory / "graph")
    return Graph.load(directory / "graph")


@pytest.mark.parametrize("name", ZOO)
def test_the_same_again_and_on_other_inputs(name: str, tmp_path: pathlib.Path) -> None:
    module, args, kwargs = ZOO[name]()
    model = NNsight(module)
    spots = model._hosted.layout((args, kwargs)).spots
    path = next((s.path for s in spots[len(spots) // 2 :] if s.port and s.path and not s.call), "")

    def trace(args: Any, kwargs: Any) -> tuple[Graph, list[torch.Tensor]]:
        torch.manual_seed(1)
        with model.trace(*args, **kwargs) as tracer:
            inner = _proxies(at(model, path).output)
            if inner[0].dtype.is_floating_point:
                inner[0][:] = inner[0] * 1.5
            saved = [p.save() for p in [*inner, *_proxies(model.output)]]
        return tracer.graph, list({id(x): x for x in saved}.values())

    graph, saved = trace(args, kwargs)
    torch.manual_seed(1)
    for a, b in zip(graph.run(model), saved, strict=True):
        close(a, b)
    other = mapped((args, kwargs), like)
    torch.manual_seed(1)
    found = read(graph, tmp_path).run(model, other[1] if not other[0] else other[0]) if not all(other) else None
    if found is not None:
        for a, b in zip(found, trace(*other)[1], strict=True):
            close(a, b)


def test_text() -> None:
    module, x = small()
    model = NNsight(module)
    with model.trace() as tracer:
        with tracer.invoke(x):
            model[1].output[:, 0] = 0
        with tracer.invoke(x[:1]):
            model.output.save()
    lines = [line.partition("  # ")[0].rstrip() for line in str(tracer.graph).splitlines()]
    assert lines == [
        "trace of 2 invokes and 4 nodes",
        "invoke 0: an input of [3, 4]",
        "  %0 = read 1.output",
        "  %1: %0[:, 0] = 0",
        "invoke 1: an input of [1, 4]",
        "  %2 = read (model).output",
        "  %3: save %2",
    ]
    assert "invoke 1: an input of [1, 4]" in tracer.graph.mermaid()


def test_several_invokes_edits_skips_and_tensors_from_outside(tmp_path: pathlib.Path) -> None:
    module, x = small()
    model, shift = NNsight(module), torch.randn(8)
    with model.edit(x) as edited:
        edited[0].output = edited[0].output * 2
    with edited.trace() as tracer:
        with tracer.invoke(x[:1]):
            h = edited[1].output
        with tracer.invoke(x[1:2]):
            edited[1].skip(edited[0].output + shift)
            edited[1].output[:] += h
            out = edited.output.save()
    inputs = torch.randn(2, 1, 4)
    for graph in (tracer.graph, read(tracer.graph, tmp_path)):
        (got,) = graph.run(model, *inputs)
        close(got, module[2](module[0](inputs[1]) * 2 + shift + module[1](module[0](inputs[0]) * 2)))
    (got,) = tracer.graph.run(model)
    close(got, out)
    with pytest.raises(GraphError, match="has 2 inputs, and 1 were given"):
        tracer.graph.run(model, x)


def test_gradients(tmp_path: pathlib.Path) -> None:
    module, x = small()
    model = NNsight(module)
    with model.trace(x) as tracer:
        h = model[1].output
        with model.output.square().sum().backward():
            gradient = h.grad.save()
    module.zero_grad()
    other = torch.randn(5, 4)
    for graph, given, count in ((tracer.graph, (), 3), (read(tracer.graph, tmp_path), (other,), 5)):
        (got,) = graph.run(model, *given)
        inner = module[1](module[0](other if given else x)).detach().requires_grad_()
        module[2](inner).square().sum().backward()
        assert inner.grad is not None and got.shape == (count, 8)
        close(got, inner.grad)
    assert gradient.shape == (3, 8)


def test_operations_and_later_calls(tmp_path: pathlib.Path) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = torch.tanh(self.step(x))
            return x

    module = Loop()
    model, x, y = NNsight(module), torch.randn(2, 4), torch.randn(6, 4)
    with model.trace(x) as tracer:
        model.source.tanh_1.output[:, 0] = 1
        model.step.next(2).output.save()
    (got,) = read(tracer.graph, tmp_path).run(model, y)
    h = torch.tanh(module.step(torch.tanh(module.step(y))))
    h[:, 0] = 1
    close(got, module.step(h))


def test_what_a_graph_is_tied_to(tmp_path: pathlib.Path) -> None:
    module, x = small()
    model, y = NNsight(module), torch.randn(5, 4)
    with model.trace(x) as tracer:
        model[1].output[: model[1].output.shape[0] // 2].save()
    graph = read(tracer.graph, tmp_path)
    assert torch.equal(graph.run(model, x + 1)[0], module[:2](x + 1)[:1])
    with pytest.raises(GraphError, match="fits only inputs of the sizes") as caught:
        graph.run(model, y)
    assert caught.value.file == __file__
    with model.trace(x) as tracer:
        if model[1].output.sum() > 0:
            model.output.save()
    assert torch.equal(tracer.graph.run(model)[0], module(x))
    with pytest.raises(GraphError, match="fits only the inputs it was recorded with"):
        tracer.graph.run(model, x)
    with pytest.raises(GraphError, match="whose inputs it does not bring along"):
        read(tracer.graph, tmp_path).run(model)


def test_what_does_not_fit(tmp_path: pathlib.Path) -> None:
    module, x = small()
    model = NNsight(module)
    with model.trace(x) as tracer:
        model[2].output.save()
    other = NNsight(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ModulePathError, match="this graph names 2, which this model does not have"):
        tracer.graph.run(other)
    with model.trace(x) as tracer:
        (model[1].output @ torch.ones(8, 1)).save()
    wide = NNsight(nn.Sequential(nn.Linear(4, 6), nn.ReLU()))
    with pytest.raises(OpError) as raised:
        tracer.graph.run(wide)
    assert (raised.value.file, raised.value.op) == (__file__, "aten::matmul")
    with model.trace() as tracer:
        with tracer.invoke(x):
            pass
        with tracer.invoke():
            model.output.save()
    with pytest.raises(GraphError, match="sees the whole batch"):
        tracer.graph.run(model)

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return x, object()

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd = Odd()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.odd(x)[0]

    odd, kept = NNsight(Uses()), object()
    with odd.trace(x) as tracer:
        odd.odd.skip((x * 2, kept))
        odd.output.save()
    assert torch.equal(tracer.graph.run(odd)[0], x * 2)
    with pytest.raises(GraphError, match="keeps tensors and plain values"):
        tracer.graph.save(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_models_of_the_engine_and_wrapped_ones_run_each_others(either: Pair, tmp_path: pathlib.Path) -> None:
    hosted = LanguageModel(either.directory, tokenizer=False, native=False)
    ids, other = either.ids(6), either.ids(4, seed=3)
    path, rows = f"{either.blocks}.1", [either.ids(5, seed=4), either.ids(5, seed=5)]
    both = [other, either.ids(4, seed=6)]

    def record(model: Any) -> tuple[Graph, list[torch.Tensor]]:
        with model.trace() as tracer:
            with tracer.invoke(ids):
                state = model.get(path).output[0][:, -1]
                first = model.lm_head.output.save()
            with tracer.invoke(other):
                model.get(path).output[0][:, 0] = state
                second = model.lm_head.output.save()
        return tracer.graph, [first, second]

    for model, guest in ((either.model, hosted), (hosted, either.model)):
        graph, want = record(model)
        graph = read(graph, tmp_path)
        for a, b in zip(graph.run(guest, ids, other), want, strict=True):
            close(a, b)
        for a, b in zip(graph.run(guest, rows, both), graph.run(model, rows, both), strict=True):
            close(a, b)
    for a, b in zip(record(either.model)[0].run(hosted), want, strict=True):  # tokens come along
        close(a, b)
    with pytest.raises(GraphError, match="whose inputs it does not bring along"):
        record(hosted)[0].run(either.model)
