"""Traces in every place that Python runs, and eight threads on one model at once."""

from __future__ import annotations

import asyncio
import code
import concurrent.futures
import doctest
import os
import pathlib
import subprocess
import sys
import threading
import types

import nbclient
import nbformat
import pytest
import torch

import nnsight_go
from nnsight_go import LanguageModel, OpError
from references import Pair, close, edits, in_place, main

pytestmark = pytest.mark.usefixtures("nothing_stays")

# Three lines that use the block's order, a value in it, and what is saved after it.
BLOCK = """\
with model.trace([1, 2, 3]) as tracer:
    h = model.transformer.h[1].output[0]
    if h.norm() > 0:
        h[:, -1] = 0
    out = model.lm_head.output.save()
"""
CHECK = "print('sum', round(float(out.double().abs().sum()), 3), tuple(out.shape))\n"
WRONG = """\
with model.trace([1, 2, 3]):
    bad = model.lm_head.output @ torch.zeros(3, 3)
    bad = bad.save()
"""


@pytest.fixture(scope="module")
def answer(gpt2_pair: Pair) -> str:
    """What CHECK prints."""
    want = gpt2_pair.run([1, 2, 3], edits({"transformer.h.1.output": in_place(lambda x: x[:, -1].zero_())}))
    out = main(want, "lm_head")
    return f"sum {round(float(out.double().abs().sum()), 3)} {tuple(out.shape)}"


def setup(pair: Pair) -> str:
    return f"import torch\nfrom nnsight_go import LanguageModel\nmodel = LanguageModel({str(pair.directory)!r})\n"


def python(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(pathlib.Path(nnsight_go.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHON_COLORS": "0", "PYTHON_BASIC_REPL": "1"}
    return subprocess.run(
        [sys.executable, *arguments], input=given, capture_output=True, text=True, env=environment, timeout=240
    )


# ---- processes of their own ----


def test_a_file(gpt2_pair: Pair, answer: str, tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(setup(gpt2_pair) + BLOCK + CHECK + WRONG)
    done = python(str(script))
    assert done.stdout.strip() == answer, done.stderr
    assert done.returncode == 1
    shown = done.stderr.splitlines()
    at = (setup(gpt2_pair) + BLOCK + CHECK).count("\n") + 2
    trace = next(i for i, text in enumerate(shown) if text.startswith("Traceback"))
    files = [text for text in shown[trace:] if text.startswith('  File "')]
    assert files == [f'  File "{script}", line {at - 1}, in <module>', f'  File "{script}", line {at}, in <module>'], (
        done.stderr
    )
    assert f"your line: {script}:{at}" in done.stderr


def test_the_prompt(gpt2_pair: Pair, answer: str) -> None:
    """``python -i``: each block is compiled by itself, and there is no file. A wrong one does not end the session."""
    blocks = [setup(gpt2_pair), BLOCK, WRONG, "with model.trace([1, 2]): one = model.lm_head.output.save()\n"]
    lines = "\n".join(blocks) + "\n" + CHECK + "print(tuple(one.shape))\n"
    done = python("-i", "-q", given=lines)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [answer, "(1, 2, 61)"], done.stderr
    assert done.stderr.count("nnsight_go.errors.OpError") == 1
    assert "nnsight_go/tracing.py" not in done.stderr and "your line: <stdin>:2" in done.stderr


def test_the_debugger(gpt2_pair: Pair, answer: str, tmp_path: pathlib.Path) -> None:
    """A breakpoint in the block: values can be looked at and lines stepped over, and the rest goes on as ever."""
    script = tmp_path / "script.py"
    script.write_text(setup(gpt2_pair) + BLOCK + CHECK)
    commands = [
        "b 6",  # if h.norm() > 0
        "c",
        "p tuple(h.shape)",
        "p round(h.norm().item(), 2)",
        "p h",
        "n",
        "n",
        "!extra = model.transformer.h[2].output[0].norm().save()",
        "p float(h[:, -1].abs().sum())",
        "c",
        "p type(extra).__name__",
        "q",
    ]
    done = python("-m", "pdb", str(script), given="\n".join(commands) + "\n")
    assert answer in done.stdout, done.stdout + done.stderr
    norm = float(main(gpt2_pair.run([1, 2, 3]), "transformer.h.1").norm())
    shown = done.stdout.replace("(Pdb) ", "").splitlines()
    assert "(1, 3, 48)" in shown and "0.0" in shown
    numbers = [float(text) for text in shown if text.replace(".", "", 1).isdigit()]
    assert any(abs(number - norm) < 0.02 for number in numbers), (norm, done.stdout)
    assert "<Proxy shape=[1, 3, 48], float32, from transformer.h.1.output[0]>" in shown


def test_a_notebook(gpt2_pair: Pair, answer: str) -> None:
    cells = [setup(gpt2_pair), BLOCK, CHECK, "%%time\n" + BLOCK + CHECK, WRONG, BLOCK + CHECK + "out", "tracer.graph"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(pathlib.Path(nnsight_go.__file__).parents[1]), path]))
    try:
        nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", allow_errors=True).execute()
    finally:
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path

    def printed(cell: int) -> str:
        return "".join(o.get("text", "") for o in notebook.cells[cell].outputs)

    assert answer in printed(2) and answer in printed(3) and answer in printed(5), notebook.cells
    errors = [o for cell in notebook.cells for o in cell.outputs if o.output_type == "error"]
    assert [error.ename for error in errors] == ["OpError"]
    text = "\n".join(errors[0].traceback)
    assert "bad = model.lm_head.output @ torch.zeros(3, 3)" in errors[0].evalue
    assert "nnsight_go/tracing.py" not in text and "nnsight_go/recorder.py" not in text
    (shown,) = [o for o in notebook.cells[5].outputs if o.output_type == "execute_result"]
    assert shown.data["text/plain"].startswith("tensor(")
    (graph,) = [o for o in notebook.cells[6].outputs if o.output_type == "execute_result"]
    assert graph.data["text/plain"] == "<Graph of 1 invokes and 7 nodes>"


# ---- inside of this one ----


def test_doctest(gpt2_pair: Pair, answer: str) -> None:
    text = "".join(
        f"{'... ' if line.startswith(' ') else '>>> '}{line}\n" for line in (BLOCK + CHECK + WRONG).splitlines()
    )
    head, tail = text.split(">>> with model.trace([1, 2, 3]):\n")
    example = f"{head}{answer}\n>>> with model.trace([1, 2, 3]):\n{tail}Traceback (most recent call last):\n    ...\n"
    example += "nnsight_go.errors.OpError: ...\n"
    test = doctest.DocTestParser().get_doctest(
        example, {"model": gpt2_pair.model, "torch": torch}, "example", "example.txt", 0
    )
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    results = runner.run(test, out=said.append)
    assert (results.failed, results.attempted) == (0, 3), "".join(said)


def test_a_console_and_exec(gpt2_pair: Pair, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {"model": gpt2_pair.model}
    console = code.InteractiveConsole(names)
    for text in (BLOCK + CHECK).splitlines():
        if text.startswith("print"):
            console.push("")
        assert console.push(text) == text.startswith(("with", "    "))
    exec(BLOCK + CHECK, names)
    exec(compile(BLOCK + CHECK, "a name that is no file", "exec"), names)
    eval(compile(BLOCK, "<string>", "exec"), {}, names)
    exec(CHECK, names)
    assert capsys.readouterr().out.splitlines() == [answer] * 4


def test_functions_that_are_built(gpt2_pair: Pair) -> None:
    model, ids = gpt2_pair.model, gpt2_pair.ids()
    want = gpt2_pair.run(ids, edits({"transformer.h.1.output": in_place(lambda x: x[:, -1].zero_())}))
    zero = lambda h: h[:, -1].zero_()  # noqa: E731
    read = types.FunctionType(
        compile("lambda: model.lm_head.output.save()", "<built>", "eval").co_consts[0], {"model": model}
    )
    with model.trace(ids):
        zero(model.transformer.h[1].output[0])
        out = read()
    close(out, main(want, "lm_head"))
    with model.trace(ids): zero(model.transformer.h[1].output[0]); one = read()  # noqa: E701, E702  # fmt: skip
    close(one, main(want, "lm_head"))
    both = [f() for f in (lambda: run(model, ids), lambda: [run(model, ids) for _ in range(2)][1])]
    assert torch.equal(both[0], both[1])


def run(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    with model.trace(ids):
        return model.lm_head.output.save()


class Probe:
    """A trace in a method and in a class's body."""

    def __init__(self, model: LanguageModel) -> None:
        with model.trace([1, 2, 3]):
            self.hidden = model.transformer.h[1].output[0].save()

    async def later(self, model: LanguageModel) -> torch.Tensor:
        await asyncio.sleep(0)
        with model.trace([1, 2, 3]):
            out = model.lm_head.output.save()
        await asyncio.sleep(0)
        return out


def test_classes_and_coroutines(gpt2_pair: Pair) -> None:
    model, seen = gpt2_pair.model, gpt2_pair.run([1, 2, 3])
    probe = Probe(model)
    close(probe.hidden, main(seen, "transformer.h.1"))

    async def all_of_them() -> list[torch.Tensor]:
        return await asyncio.gather(*(probe.later(model) for _ in range(3)))

    for out in asyncio.run(all_of_them()):
        close(out, main(seen, "lm_head"))

    class Body:
        with model.trace([1, 2, 3]):
            out = model.lm_head.output.save()

    close(Body.out, main(seen, "lm_head"))


# ---- threads ----


def test_eight_threads_with_a_verb_each(either: Pair) -> None:
    """What one of them does shows in none of the others, whichever comes first."""
    model, layers, place = either.model, either.layers, f"{either.blocks}.1.output"
    prompts = [either.ids(4 + n, seed=n) for n in range(8)]
    plain = [main(either.run(ids), "lm_head") for ids in prompts]
    halved = [main(either.run(ids, edits({place: lambda x: x * 0.5})), "lm_head") for ids in prompts]
    start = threading.Barrier(8)

    def forced(n: int) -> None:
        with model.trace(prompts[n]):
            hidden = layers[1].output[0]
            if hidden.norm().item() > 0:
                hidden *= 0.5
            out = model.lm_head.output.save()
        close(out, halved[n])

    def invokes(n: int) -> None:
        with model.trace() as tracer:
            barrier = tracer.barrier(2)
            with tracer.invoke(prompts[n]):
                layers[1].output[0][:] *= 0.5
                barrier()
                first = model.lm_head.output.save()
            with tracer.invoke(prompts[0]):
                barrier()
                second = model.lm_head.output.save()
        close(first, halved[n])
        close(second, plain[0])

    def edited(n: int) -> None:
        with model.edit() as view:
            layers[1].output[0][:] = layers[1].output[0] * 0.5
        with view.trace(prompts[n]):
            out = view.lm_head.output.save()
        close(out, halved[n])

    def session(n: int) -> None:
        with model.session():
            with model.trace(prompts[n]):
                state = layers[1].output[0]
            with model.trace(prompts[n]):
                layers[1].output[0] = state * 0.5
                out = model.lm_head.output
        close(out, halved[n])

    def cached(n: int) -> None:
        with model.trace(prompts[n]) as tracer:
            cache = tracer.cache()
            layers[1].output[0][:] *= 0.5
            tracer.stop()
        close(cache["model.lm_head"].output, halved[n])

    def scanned(n: int) -> None:
        with model.scan(prompts[n]):
            out = model.lm_head.output.save()
        assert out.is_meta and out.shape == plain[n].shape

    def skipped(n: int) -> None:
        with model.trace(prompts[n]):
            layers[1].skip(layers[1].input)
            model.lm_head.output.save()
            raise KeyError

    def wrong(n: int) -> None:
        with pytest.raises(OpError), model.trace(prompts[n]):
            (layers[1].output[0] @ torch.zeros(2, 2)).save()
        with model.trace(prompts[n]):
            out = model.lm_head.output.save()
        close(out, plain[n])

    def one(n: int) -> None:
        works = (forced, invokes, edited, session, cached, scanned, skipped, wrong)
        start.wait()
        for turn in range(16):
            work = works[(n + turn) % 8]
            if work is skipped:
                with pytest.raises(KeyError):
                    work(n)
            else:
                work(n)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    assert model.edits == ()
