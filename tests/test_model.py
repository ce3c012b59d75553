"""The model outside of traces: its tree, its parameters, its names, and where code that uses it may stand."""

from __future__ import annotations

import concurrent.futures
import pathlib
import subprocess
import sys
import threading

import pytest
import torch
import transformers

from nnsight_go import Envoy, InputError, LanguageModel, ModulePathError
from references import Pair, close, edits, in_place, main

ROOT = pathlib.Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("nothing_stays")

GPT2 = """\
GPT2LMHeadModel(
  (transformer): GPT2Model(
    (wte): Embedding(61, 48)
    (wpe): Embedding(64, 48)
    (drop): Dropout(p=0.1, inplace=False)
    (h): ModuleList(
      (0-2): 3 x GPT2Block(
        (ln_1): LayerNorm((48,), eps=1e-05, elementwise_affine=True, bias=True)
        (attn): GPT2Attention(
          (c_attn): Conv1D(nf=144, nx=48)
          (c_proj): Conv1D(nf=48, nx=48)
          (attn_dropout): Dropout(p=0.1, inplace=False)
          (resid_dropout): Dropout(p=0.1, inplace=False)
        )
        (ln_2): LayerNorm((48,), eps=1e-05, elementwise_affine=True, bias=True)
        (mlp): GPT2MLP(
          (c_fc): Conv1D(nf=192, nx=48)
          (c_proj): Conv1D(nf=48, nx=192)
          (act): NewGELUActivation()
          (dropout): Dropout(p=0.1, inplace=False)
        )
      )
    )
    (ln_f): LayerNorm((48,), eps=1e-05, elementwise_affine=True, bias=True)
  )
  (lm_head): Linear(in_features=48, out_features=61, bias=False)
)"""


# ---- the tree ----


def test_repr_of_gpt2(gpt2_pair: Pair) -> None:
    assert repr(gpt2_pair.model) == GPT2
    assert repr(gpt2_pair.layers[0].ln_1) == "LayerNorm((48,), eps=1e-05, elementwise_affine=True, bias=True)"


def test_repr_is_that_of_transformers(either: Pair) -> None:
    assert repr(either.model) == repr(either.hf)


def test_the_tree_is_that_of_transformers(either: Pair) -> None:
    ours, theirs = either.model, either.hf
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    assert len(either.layers) == either.hf.config.num_hidden_layers
    assert [layer.path for layer in either.layers] == [f"{either.blocks}.{i}" for i in range(len(either.layers))]
    assert either.layers[-1] is either.layers[2] is ours.get(f"{either.blocks}.2")
    assert [x.path for x in either.layers[1:]] == [f"{either.blocks}.1", f"{either.blocks}.2"]
    assert "mlp" in dir(either.layers[0]) and "weight" in dir(ours.lm_head)
    assert len(list(ours.modules())) == len(list(theirs.modules()))


def test_unknown_names_offer_the_nearest(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    for wrong, said in (
        (lambda: model.transfromer, "transformer"),
        (lambda: model.transformer.h[0].atn, "attn"),
        (lambda: model.transformer.h[0].mlp.c_fcc, "c_fc"),
        (lambda: model.get("transformer.h.0.mpl"), "mlp"),
        (lambda: model.lm_head.wieght, "weight"),
        (lambda: model.transformer.h[0].ouput, "output"),
    ):
        with pytest.raises(ModulePathError, match=rf"Nearest: .*{said}") as caught:
            wrong()
        assert isinstance(caught.value, AttributeError)
        assert caught.value.file == __file__
    with pytest.raises(IndexError, match="modules 0 to 2"):
        model.transformer.h[3]
    with pytest.raises(ModulePathError, match="modules 0 to 2"):
        model.get("transformer.h.7")
    assert not hasattr(model, "nothing") and getattr(model, "nothing", 5) == 5


def test_only_a_list_has_items(gpt2_pair: Pair) -> None:
    for wrong in (lambda: gpt2_pair.model.lm_head[0], lambda: len(gpt2_pair.model), lambda: list(gpt2_pair.model)):
        with pytest.raises(TypeError):
            wrong()
    assert gpt2_pair.model


def test_modules_cannot_be_replaced(gpt2_pair: Pair) -> None:
    with pytest.raises(InputError, match=r"lm_head.output = value"):
        gpt2_pair.model.lm_head = torch.nn.Linear(1, 1)
    with pytest.raises(ModulePathError, match="has no 'hidden'"):
        gpt2_pair.model.hidden = 1


def test_values_outside_of_a_trace(gpt2_pair: Pair) -> None:
    for name in ("output", "input", "inputs"):
        with pytest.raises(InputError, match="only inside a trace"):
            getattr(gpt2_pair.model.lm_head, name)
    with pytest.raises(InputError, match="only inside a trace"):
        gpt2_pair.model.lm_head.output = torch.ones(1)


def test_modules_of_another_model(gpt2_pair: Pair, llama_pair: Pair) -> None:
    with pytest.raises(InputError, match="belongs to another model"), gpt2_pair.model.trace([1]):
        llama_pair.model.lm_head.output  # noqa: B018


def test_what_never_runs_says_so(gpt2_pair: Pair) -> None:
    for module in (gpt2_pair.layers, gpt2_pair.layers[0].attn.attn_dropout):
        with pytest.raises(ModulePathError, match="never runs by itself"), gpt2_pair.model.trace([1]):
            module.output.save()


def test_rename(gpt2_pair: Pair) -> None:
    model = LanguageModel(
        gpt2_pair.directory, rename={"transformer.h": "layers", "attn": ["attention", "mixer"], "lm_head": "unembed"}
    )
    assert model.layers is model.transformer.h
    assert model.layers[1].attention is model.layers[1].mixer is model.transformer.h[1].attn
    with model.trace(gpt2_pair.ids()):
        hidden = model.layers[1].attention.output[0].save()
        out = model.unembed.output.save()
    want = gpt2_pair.run(gpt2_pair.ids())
    close(hidden, main(want, "transformer.h.1.attn"))
    close(out, main(want, "lm_head"))
    assert repr(model) == GPT2, "the first names stay"
    for wrong in ({"nothing": "x"}, {"attn": "mlp"}, {"attn": "output"}, {"attn": "no name"}):
        with pytest.raises(InputError, match="rename"):
            LanguageModel(gpt2_pair.directory, rename=wrong)


# ---- parameters ----


def test_parameters_are_those_of_transformers(either: Pair) -> None:
    want = dict(either.hf.named_parameters())
    got = dict(either.model.named_parameters())
    assert list(got) == list(want)
    for name, value in want.items():
        assert type(got[name]) is torch.nn.Parameter
        assert torch.equal(got[name], value)
    assert [id(p) for p in either.model.parameters()] == [id(p) for p in got.values()]
    assert sum(p.numel() for p in either.model.parameters()) == either.hf.num_parameters()
    assert list(either.model.state_dict()) == list(either.hf.state_dict())
    block = either.layers[1]
    assert dict(block.named_parameters()).keys() == dict(either.hf.get_submodule(block.path).named_parameters()).keys()


def test_a_parameter_is_one_object(either: Pair) -> None:
    weight = either.model.lm_head.weight
    assert weight is either.model.lm_head.weight
    if either.hf.config.tie_word_embeddings:
        assert weight.data_ptr() == either.model.transformer.wte.weight.data_ptr()


@pytest.mark.parametrize("dispatch", [True, False])
def test_parameters_are_live(gpt2_pair: Pair, dispatch: bool) -> None:
    model = LanguageModel(gpt2_pair.directory, dispatch=dispatch)
    hf = transformers.AutoModelForCausalLM.from_pretrained(gpt2_pair.directory).eval()
    ids = torch.tensor([gpt2_pair.ids()])
    for change in (
        lambda m: m.transformer.h[1].mlp.c_fc.weight.mul_(0.5),
        lambda m: m.transformer.ln_f.bias.copy_(torch.linspace(-1, 1, 48)),
        lambda m: m.transformer.h[0].attn.c_attn.weight[:, 5].zero_(),
        lambda m: m.lm_head.weight.add_(0.1),  # tied: the embedding, too
    ):
        with torch.no_grad():
            change(model)
            change(hf)
            want = hf(ids).logits
        with model.trace(ids):
            got = model.lm_head.output.save()
        close(got, want)
    assert not torch.equal(want, main(gpt2_pair.run(gpt2_pair.ids()), "lm_head")), "other models are not touched"


def test_parameters_cannot_be_replaced(gpt2_pair: Pair) -> None:
    with pytest.raises(InputError, match=r"copy_\(value\)"):
        gpt2_pair.model.lm_head.weight = torch.zeros(61, 48)


def test_parameters_take_part_in_traces(either: Pair) -> None:
    with torch.no_grad(), either.model.trace(either.ids()):
        direct = (either.layers[2].output[0] @ either.model.lm_head.weight.T).save()
    with torch.no_grad():
        want = main(either.run(either.ids()), f"{either.blocks}.2") @ either.hf.lm_head.weight.T
    close(direct, want)


def test_parameters_outlive_the_model(gpt2_pair: Pair) -> None:
    model = LanguageModel(gpt2_pair.directory, dispatch=True)
    weight = model.lm_head.weight
    model.close()
    close(weight.detach().clone(), gpt2_pair.hf.lm_head.weight.detach().clone())


def test_weights_load_at_the_first_trace(gpt2_pair: Pair) -> None:
    model = LanguageModel(gpt2_pair.directory)
    assert not model.dispatched
    with model.trace([1, 2]):
        model.lm_head.output.save()
    assert model.dispatched
    assert LanguageModel(gpt2_pair.directory, dispatch=True).dispatched


def test_what_belongs_to_a_model(gpt2_pair: Pair) -> None:
    model = gpt2_pair.model
    assert model.config.n_embd == 48 and model.config["n_layer"] == 3 and isinstance(model.config.to_dict(), dict)
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    assert model.directory == gpt2_pair.directory and model.path == ""
    assert isinstance(model, Envoy)
    with pytest.raises(AttributeError):
        model.config.nothing  # noqa: B018


# ---- threads ----


def test_eight_threads_trace_one_model(either: Pair) -> None:
    wants = {}
    for n in range(1, 9):
        edit = edits({f"{either.blocks}.1.output": in_place(lambda x, n=n: x[:, -1].mul_(n))})
        wants[n] = main(either.run(either.ids(n, seed=n), edit), "lm_head")
    barrier = threading.Barrier(8)

    def work(n: int) -> float:
        barrier.wait()
        for _ in range(12):
            torch.manual_seed(n)
            with either.model.trace(either.ids(n, seed=n)):
                hidden = either.layers[1].output[0]
                if n % 2:
                    assert float(hidden.abs().sum()) > 0
                hidden[:, -1] *= n
                out = either.model.lm_head.output.save()
            close(out, wants[n])
        return float(out.sum())

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(work, range(1, 9)))) == 8


def test_a_value_of_another_threads_trace_is_refused(gpt2_pair: Pair) -> None:
    def use(x: torch.Tensor) -> BaseException | None:
        try:
            x + 1
        except BaseException as e:
            return e
        return None

    with gpt2_pair.model.trace(gpt2_pair.ids()), concurrent.futures.ThreadPoolExecutor(1) as pool:
        x = gpt2_pair.layers[1].output[0]
        error = pool.submit(use, x).result()
        x.save()
    assert "another trace" in str(error)
    close(x, main(gpt2_pair.run(gpt2_pair.ids()), f"{gpt2_pair.blocks}.1"))


# ---- where code may stand ----

SCRIPT = """
import sys
from nnsight_go import LanguageModel
model = LanguageModel(sys.argv[1])
with model.trace([1, 2, 3]): h = model.transformer.h[1].output[0]; h[:, -1] = 0; out = model.lm_head.output.save()
print(type(out).__name__, tuple(out.shape), bool((h is not None)))
"""


@pytest.mark.parametrize("how", ["-c", "-"])
def test_scripts_without_a_file(gpt2_pair: Pair, how: str) -> None:
    command = [sys.executable, how, *([SCRIPT] if how == "-c" else []), str(gpt2_pair.directory)]
    environment = {"PYTHONPATH": str(ROOT / "python"), "PATH": ""}
    done = subprocess.run(
        command, input=SCRIPT if how == "-" else None, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Tensor (1, 3, 61) True\n"


def test_exec_lambda_and_one_line(gpt2_pair: Pair) -> None:
    model, ids = gpt2_pair.model, gpt2_pair.ids()
    want = main(gpt2_pair.run(ids), "lm_head")

    names = {"model": model, "ids": ids}
    exec("with model.trace(ids): out = model.lm_head.output.save()", names)
    close(names["out"], want)  # type: ignore[arg-type]

    read = lambda: model.lm_head.output.save()  # noqa: E731
    with model.trace(ids):
        by_lambda = read()
    close(by_lambda, want)

    with model.trace(ids): one_line = model.lm_head.output.save()  # noqa: E701  # fmt: skip
    close(one_line, want)

    def function() -> torch.Tensor:
        with model.trace(ids):
            return model.lm_head.output.save()

    close(function(), want)
    assert [close(function(), want) for _ in range(2)] == [None, None]
    with model.trace(ids):
        listed = [block.output[0].norm().save() for block in model.transformer.h]
    assert len(listed) == 3
    tracer = model.trace(ids)
    with tracer:
        out = model.lm_head.output.save()
    close(out, want)


def test_generators_and_nested_functions(gpt2_pair: Pair) -> None:
    model, ids = gpt2_pair.model, gpt2_pair.ids()

    def norms(blocks: list[Envoy]):  # type: ignore[no-untyped-def]
        for block in blocks:
            yield block.output[0].norm()

    with model.trace(ids):
        found = [n.save() for n in norms(model.transformer.h)]
    for i, n in enumerate(found):
        close(n, main(gpt2_pair.run(ids), f"{gpt2_pair.blocks}.{i}").norm())
