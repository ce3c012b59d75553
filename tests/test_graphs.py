"""``tracer.graph``: what it shows, and that it gives the same again: from files, of other prompts, on other models."""

from __future__ import annotations

import base64
import inspect
import os
import pathlib
import pickle
import random
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import nnsight_go
from nnsight_go import Graph, GraphError, LanguageModel, ModulePathError, OpError
from references import Pair, close, edits, in_place, main

pytestmark = pytest.mark.usefixtures("nothing_stays")

NAME = pathlib.Path(__file__).name


def line() -> int:
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno


# ---- showing ----


def test_text(gpt2_pair: Pair) -> None:
    model, shift = gpt2_pair.model, torch.ones(48)
    with model.trace() as tracer:
        at = line()
        with tracer.invoke([1, 2, 3]):
            h = model.transformer.h[1].output[0]
            h[:, -1] += shift
        with tracer.invoke([[4, 5], [6, 7]]):
            model.transformer.h[2].mlp.output = torch.relu(h[:, -1:]) * 2 + model.transformer.h[2].mlp.output
            logits = model.lm_head(model.transformer.ln_f(h)).argmax(-1).save()
        with tracer.invoke():
            model.lm_head.output.save()
        assert repr(tracer.graph) == "<Graph of 3 invokes and 15 nodes>"
    del logits
    lines = [line.partition("  # ") for line in str(tracer.graph).splitlines()]
    assert (
        [text.rstrip() for text, _, _ in lines]
        == """\
trace of 3 invokes and 17 nodes
invoke 0: 1 row of 3 tokens
  %0 = read transformer.h.1.output[0]
  %1 = %0[:, -1]
  %2 = const 0
  %3 = aten::add_(%1, %2)
  %4: %0[:, -1] = %1
invoke 1: 2 rows of 2 tokens
  %5 = %0[:, -1:]
  %6 = aten::relu(%5)
  %7 = aten::mul(%6, 2)
  %8 = read transformer.h.2.mlp.output
  %9 = aten::add(%7, %8)
  %10: write transformer.h.2.mlp.output = %9
  %11 = call transformer.ln_f(%0)
  %12 = call lm_head(%11)
  %13 = aten::argmax(%12, -1)
invoke 2: the whole batch
  %14 = read lm_head.output
invoke 1: 2 rows of 2 tokens
  %15: save %13
invoke 2: the whole batch
  %16: save %14""".splitlines()
    )
    offsets = [2, *[3] * 4, *[5] * 6, *[6] * 3, 8, 6, 8]
    assert [place for _, _, place in lines if place] == [f"{NAME}:{at + n}" for n in offsets]
    assert len({text.index("  # ") for text in str(tracer.graph).splitlines() if "  # " in text}) == 1


def test_a_chart(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    with model.trace([1, 2, 3]) as tracer:
        model.transformer.h[1].output[0][:, -1] = 0
        model.lm_head.output.save()
    assert (
        tracer.graph.mermaid()
        == """\
flowchart TD
  subgraph i0["invoke 0: 1 row of 3 tokens"]
    n0(["%0 = read transformer.h.1.output[0]"])
    n1["%1: %0[:, -1] = 0"]
    n2(["%2 = read lm_head.output"])
    n3[["%3: save %2"]]
  end
  n0 --> n1
  n2 --> n3
"""
    )


def test_a_graph_grows_with_its_block(gpt2_pair: Pair) -> None:
    model, lengths = gpt2_pair.model, []
    with model.trace([1, 2]) as tracer:
        for block in model.transformer.h:
            block.output[0].save()
            lengths.append(str(tracer.graph).count("read"))
        early = tracer.graph
        with pytest.raises(GraphError, match="keeps no values"):
            early.run(model)
    assert lengths == [1, 2, 3]
    with pytest.raises(GraphError, match="Take tracer.graph after the block"):
        early.save("never")
    with model.trace([1, 2]) as tracer:
        model.lm_head.output * 2
    with pytest.raises(GraphError, match="keeps no values"):
        tracer.graph.run(model)


# ---- running ----


def test_the_same_again(either: Pair, tmp_path: pathlib.Path) -> None:
    ids, model = either.ids(), either.model
    vector = torch.randn(either.width)
    with model.trace(ids) as tracer:
        hidden = either.layers[1].output[0]
        hidden[:, -1] = vector
        state = hidden.save()
        logits = model.lm_head.output.save()
        called = model.lm_head(model.get(either.final)(hidden)).softmax(-1).save()
    graph = tracer.graph
    graph.save(tmp_path / "graph")
    again = Graph.load(tmp_path / "graph")
    assert str(again) == str(graph) and again.mermaid() == graph.mermaid()
    for one in (graph, again):
        found = one.run(model)
        for got, want in zip(found, (state, logits, called), strict=True):
            close(got, want, 1e-5)
        assert all(type(x) is torch.Tensor for x in found)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("tokens", [1, 4, 12])
def test_other_prompts_of_other_lengths(either: Pair, tmp_path: pathlib.Path, tokens: int, rows: int) -> None:
    with either.model.trace(either.ids(7)) as tracer:
        either.layers[1].output[0][:, -1] = either.layers[1].output[0].mean(1)
        either.layers[2].mlp.output = either.layers[2].mlp.output * 0.5
        either.model.lm_head.output.save()
        either.model.lm_head.output[:, -1].argmax(-1).save()
    tracer.graph.save(tmp_path / "graph")
    prompts = [either.ids(tokens, seed=n) for n in range(rows)]

    def mean(x: torch.Tensor) -> None:
        x[:, -1] = x.mean(1)

    want = either.run(
        prompts,  # type: ignore[arg-type]
        edits({f"{either.blocks}.1.output": in_place(mean), f"{either.blocks}.2.mlp.output": lambda x: x * 0.5}),
    )
    given = prompts if rows > 1 else prompts[0]
    logits, best = Graph.load(tmp_path / "graph").run(either.model, given)
    close(logits, main(want, "lm_head"))
    assert torch.equal(best, main(want, "lm_head")[:, -1].argmax(-1))


def test_several_invokes_and_edits(either: Pair, tmp_path: pathlib.Path) -> None:
    first, second = either.ids(5), either.ids(3, seed=2)
    with either.model.edit() as edited:
        either.layers[0].output[0][:] = either.layers[0].output[0] * 0.5
    with edited.trace() as tracer:
        with tracer.invoke(first):
            state = either.layers[2].output[0][:, -1]
        with tracer.invoke(second):
            either.layers[1].output[0][:, 0] = state
            logits = edited.lm_head.output.save()
    tracer.graph.save(tmp_path / "graph")
    graph = Graph.load(tmp_path / "graph")
    (same,) = graph.run(either.model)
    close(same, logits, 1e-5)
    half = edits({f"{either.blocks}.0.output": lambda x: x * 0.5})
    for a, b in ((first, second), (either.ids(2, seed=5), either.ids(9, seed=6))):
        vector = main(either.run(a, half), f"{either.blocks}.2")[:, -1]
        want = either.run(
            b,
            edits(
                {
                    f"{either.blocks}.0.output": lambda x: x * 0.5,
                    f"{either.blocks}.1.output": in_place(lambda x, v=vector: x[:, 0].copy_(v)),
                }
            ),
        )
        (got,) = graph.run(either.model, a, b)
        close(got, main(want, "lm_head"))
    for wrong in ((first,), (first, second, first)):
        with pytest.raises(GraphError, match=f"has 2 inputs, and {len(wrong)} were given") as caught:
            graph.run(either.model, *wrong)
        assert caught.value.file == __file__


def test_the_whole_batch_of_other_prompts(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    with model.trace() as tracer:
        with tracer.invoke([1, 2, 3]):
            model.transformer.h[1].output[0][:] = 0
        with tracer.invoke([4, 5, 6]):
            pass
        with tracer.invoke():
            model.lm_head.output.save()
    a, b = gpt2_pair.ids(6), gpt2_pair.ids(6, seed=2)
    (got,) = tracer.graph.run(model, a, b)
    close(got[:1], main(gpt2_pair.run(a, edits({"transformer.h.1.output": torch.zeros_like})), "lm_head"))
    close(got[1:], main(gpt2_pair.run(b), "lm_head"))


def test_another_model(gpt2_pair: Pair, llama_pair: Pair, text_pair: Pair) -> None:
    """Any that has the modules: the text's model has other weights and sizes."""
    with gpt2_pair.model.trace([1, 2, 3]) as tracer:
        gpt2_pair.model.transformer.h[1].output[0][:, -1] *= 2
        gpt2_pair.model.lm_head.output.save()
    prompt = "The Eiffel Tower is in"
    ids = text_pair.model.tokenizer(prompt)["input_ids"]
    (got,) = tracer.graph.run(text_pair.model, prompt)
    want = text_pair.run(ids, edits({"transformer.h.1.output": in_place(lambda x: x[:, -1].mul_(2))}))
    close(got, main(want, "lm_head"))
    with pytest.raises(ModulePathError, match=r"transformer\.h\.1"):
        tracer.graph.run(llama_pair.model)


def test_skips_caches_sessions_and_stops(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    with model.session():
        with model.trace([1, 2, 3]) as tracer:
            model.transformer.h[1].skip(model.transformer.h[0].output[0] * 2)
            cache = tracer.cache(modules=["transformer.h.2", "lm_head"])
            tracer.stop()
        values = [cache["model.transformer.h.2"].output[0], cache["model.lm_head"].output]
    got = tracer.graph.run(model)
    for a, b in zip(got, values, strict=True):
        close(a, b, 1e-5)
    other = gpt2_pair.ids(5)
    state = main(gpt2_pair.run(other), "transformer.h.0") * 2
    want = gpt2_pair.run(other, edits({"transformer.h.1.output": lambda x: state}))
    close(tracer.graph.run(model, other)[1], main(want, "lm_head"))


def test_errors_name_the_line_that_was_recorded(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    model = gpt2_pair.model
    with model.trace([1, 2, 3, 4]) as tracer:
        at = line() + 1
        model.lm_head.output[:, 3].save()
    tracer.graph.save(tmp_path / "graph")
    for graph in (tracer.graph, Graph.load(tmp_path / "graph")):
        with pytest.raises((OpError, IndexError)) as caught:
            graph.run(model, [1, 2])
        assert isinstance(caught.value, nnsight_go.NnsightError)
        assert (caught.value.file, caught.value.line) == (__file__, at)
    (logits,) = tracer.graph.run(model, [5, 6, 7, 8, 9])
    close(logits, main(gpt2_pair.run([5, 6, 7, 8, 9]), "lm_head")[:, 3])


# ---- what a graph has of its own inputs ----


@pytest.mark.parametrize("stored", [False, True])
def test_a_line_that_used_sizes(gpt2_pair: Pair, tmp_path: pathlib.Path, stored: bool) -> None:
    model = gpt2_pair.model
    with model.trace([1, 2, 3, 4]) as tracer:
        h = model.transformer.h[1].output[0]
        at = line() + 1
        h[:, h.shape[1] - 1] = 0
        model.lm_head.output.save()
    graph = tracer.graph
    if stored:
        graph.save(tmp_path / "graph")
        graph = Graph.load(tmp_path / "graph")
    for wrong in ([1, 2], [[1, 2, 3, 4], [1, 2, 3, 4]]):
        with pytest.raises(GraphError, match="inputs of the sizes it was recorded with") as caught:
            graph.run(model, wrong)
        assert (caught.value.file, caught.value.line) == (__file__, at)
    (got,) = graph.run(model, [7, 8, 9, 10])
    want = gpt2_pair.run([7, 8, 9, 10], edits({"transformer.h.1.output": in_place(lambda x: x[:, -1].zero_())}))
    close(got, main(want, "lm_head"))


@pytest.mark.parametrize("stored", [False, True])
def test_a_line_that_used_values(gpt2_pair: Pair, tmp_path: pathlib.Path, stored: bool) -> None:
    model = gpt2_pair.model
    with model.trace([1, 2, 3, 4]) as tracer:
        h = model.transformer.h[1].output[0]
        at = line() + 1
        if h.norm() > 0:
            h[:, -1] = 0
        logits = model.lm_head.output.save()
    graph = tracer.graph
    if stored:
        graph.save(tmp_path / "graph")
        graph = Graph.load(tmp_path / "graph")
    with pytest.raises(GraphError, match="a line of it used their values") as caught:
        graph.run(model, [7, 8, 9, 10])
    assert (caught.value.file, caught.value.line) == (__file__, at)
    for found in (graph.run(model), graph.run(model, [1, 2, 3, 4])):
        assert len(found) == 1, "only what the block saved, not the value that the line needed"
        close(found[0], logits, tolerance=1e-5)


def test_a_large_tensor_that_changed(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    model, large, small = gpt2_pair.model, torch.randn(48, 400), torch.randn(48)
    with model.trace([1, 2, 3]) as tracer:
        model.transformer.h[1].output[0][:] += model.transformer.h[1].output[0] @ large @ large.mT * 0.01 + small
        logits = model.lm_head.output.save()
    tracer.graph.save(tmp_path / "graph")
    small.zero_()  # of which the graph has its own
    close(tracer.graph.run(model)[0], logits)
    large.zero_()
    for use in (lambda: tracer.graph.run(model), lambda: tracer.graph.save(tmp_path / "other")):
        with pytest.raises(GraphError, match=r"of sizes \[48, 400\] .* changed in place"):
            use()
    close(Graph.load(tmp_path / "graph").run(model)[0], logits)


# ---- files ----


def test_another_process_runs_it(text_pair: Pair, tmp_path: pathlib.Path) -> None:
    prompt, other = "The Eiffel Tower", "The Colosseum is in"
    with text_pair.model.trace(prompt) as tracer:
        text_pair.model.transformer.h[1].output[0][:, -1] += torch.arange(48.0)
        text_pair.model.lm_head.output.save()
    tracer.graph.save(tmp_path / "graph")
    (want,) = tracer.graph.run(text_pair.model, other)
    script = (
        "import sys, torch, nnsight_go\n"
        "model = nnsight_go.LanguageModel(sys.argv[1])\n"
        "(out,) = nnsight_go.Graph.load(sys.argv[2]).run(model, sys.argv[3])\n"
        "torch.save(out, sys.argv[4])\n"
    )
    command = [sys.executable, "-c", script, str(text_pair.directory), str(tmp_path / "graph"), other]
    path = os.pathsep.join([str(pathlib.Path(nnsight_go.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(tmp_path / "out.pt")], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    close(torch.load(tmp_path / "out.pt"), want, tolerance=1e-5)


def test_no_pickle(gpt2_pair: Pair, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "dump", "dumps"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    with gpt2_pair.model.trace([1, 2]) as tracer:
        gpt2_pair.model.transformer.h[1].output[0][:] += torch.ones(48)
        logits = gpt2_pair.model.lm_head.output.save()
    tracer.graph.save(tmp_path / "graph")
    close(Graph.load(tmp_path / "graph").run(gpt2_pair.model)[0], logits, 1e-5)


def test_spoilt_files(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    """Whatever is in a file, reading and running it ends in a result or in an error that says what is wrong."""
    path, model = tmp_path / "graph", gpt2_pair.model
    with model.trace() as tracer:
        with tracer.invoke([1, 2, 3]):
            h = model.transformer.h[1].output[0]
            h[:, -1] += torch.arange(48.0)
        with tracer.invoke([4, 5]):
            model.transformer.h[1].output[0][:, -1] = h[:, -1]
            model.lm_head.output.save()
    tracer.graph.save(path)
    good = path.read_bytes()
    tensors = safetensors.torch.load_file(path)
    metadata = safetensors.safe_open(path, "pt").metadata()
    graph, rng = base64.b64decode(metadata["graph"]), random.Random(1)
    found = {"load": 0, "run": 0, "fine": 0}
    for i in range(400):
        if i % 4 == 0:
            data = bytearray(good)
            data[rng.randrange(len(data))] = rng.randrange(256)
            path.write_bytes(data)
        else:
            changed = bytearray(graph)
            for _ in range(rng.choice([1, 1, 3])):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            entries = metadata | {"graph": base64.b64encode(changed).decode()}
            path.write_bytes(safetensors.torch.save(tensors, entries))
        try:
            loaded = Graph.load(path)
        except GraphError:
            found["load"] += 1
            continue
        try:
            loaded.run(model)
            found["fine"] += 1
        except nnsight_go.NnsightError as error:
            assert not isinstance(error, nnsight_go.errors.InternalError), error
            found["run"] += 1
    assert min(found.values()) > 5, found
    with model.edit() as edited:
        edited.transformer.h[1].output[0][:] = 0
    edited.edits[0].save(path)
    with pytest.raises(GraphError, match="holds no graph"):
        Graph.load(path)
    close(Graph.run(tracer.graph, model)[0], tracer.graph.run(model)[0])


def test_a_model_that_has_not_been_dispatched(gpt2_pair: Pair, tmp_path: pathlib.Path) -> None:
    with gpt2_pair.model.trace([1, 2]) as tracer:
        logits = gpt2_pair.model.lm_head.output.save()
    fresh = LanguageModel(gpt2_pair.directory, tokenizer=False)
    assert not fresh.dispatched
    close(tracer.graph.run(fresh)[0], logits, tolerance=1e-5)
    fresh.close()
