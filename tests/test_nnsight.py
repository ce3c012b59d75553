"""Programs written for nnsight: the table of its names, the stand-in for its modules, and its documented lines."""

from __future__ import annotations

import inspect
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers

import nnsight_go as nnsight
from nnsight_go import LanguageModel, cache, config, foreign, tracing
from nnsight_go.envoy import Envoy
from references import Pair, close, edits, in_place, main

ROOT = pathlib.Path(__file__).parents[1]
MARKS = {"same", "different", "not yet", "not applicable"}

# The public names of nnsight 0.7.0 and 0.8.1, and the versions that have them ("" for both).
NAMES: dict[str, dict[str, str]] = {
    "nnsight": {
        "": "LanguageModel save Envoy CONFIG __version__ NNsight VisionLanguageModel DiffusionModel register status "
        "ndif_status is_model_running compare",
        "0.7": "session Tracer ExceptionWrapper Patch Patcher DEFAULT_PATCHER get_local_env get_remote_env NdifStatus",
        "0.8": "TransformersModel Object NNsightDeprecationWarning deprecated login whoami",
    },
    "model": {
        "": "trace scan generate generator session edit clear_edits dispatch dispatched tokenizer config repo_id "
        "revision to_model_key from_model_key",
        "0.7": "export_edits import_edits",
        "0.8": "pipe attn_implementation pipeline processor image_processor feature_extractor load_adapter "
        "estimate_bytes describe_checkpoint max_tp_size",
    },
    "module": {
        "": "output input inputs skip source __call__ iter all get modules named_modules path device devices to cpu "
        "cuda __getitem__ __len__ __iter__ __setattr__ trace edit session interleave interleaver",
        "0.7": "next interleaving",
        "0.8": "parent root",
    },
    "tracer": {
        "": "invoke barrier cache stop result iter all backend",
        "0.7": "next local",
        "0.8": "",
    },
    "value": {"": "save"},
    "tensor": {"": "backward grad"},
    "cache": {"": "keys __getitem__ __getattr__ output inputs input"},
    "entry": {"": "output inputs input"},
    "CONFIG": {
        "": "APP.DEBUG APP.PYMOUNT APP.REMOTE_LOGGING API.HOST API.APIKEY API.COMPRESS set_default_api_key save",
        "0.7": "APP.CROSS_INVOKER APP.TRACE_CACHING APP.CACHE_DIR set_default_app_debug",
        "0.8": "APP.DISABLE_CPP_BACKTRACE",
    },
}
ARGUMENTS: dict[str, dict[str, str]] = {
    "LanguageModel": {
        "": "repo_id device_map dispatch dtype torch_dtype tokenizer rename revision token cache_dir "
        "local_files_only trust_remote_code low_cpu_mem_usage attn_implementation tokenizer_kwargs envoys",
        "0.7": "automodel config_model meta_buffers import_edits",
        "0.8": "task peft",
    },
    "trace": {
        "": "*inputs input_ids attention_mask labels remote blocking trace fn backend tracer_cls truncation max_length "
        "add_special_tokens padding",
        "0.8": "verbose job_id",
    },
}
# What nnsight calls the parameters of what is marked `same`.
PARAMETERS: dict[str, list[str]] = {
    "nnsight.save": ["value"],
    "nnsight.session": [],
    "model.trace": ["remote", "blocking", "fn", "backend", "tracer_cls", "trace", "verbose", "job_id"],
    "model.clear_edits": [],
    "module.skip": ["replacement"],
    "module.get": ["path"],
    "tracer.invoke": [],
    "tracer.barrier": ["n"],
    "tracer.cache": [
        "modules", "device", "dtype", "detach", "include_output", "include_inputs", "non_blocking",
    ],
    "cache.keys": [],
}  # fmt: skip
OWNERS: dict[str, Any] = {
    "nnsight": nnsight,
    "model": LanguageModel,
    "module": Envoy,
    "tracer": tracing.Tracer,
    "value": torch.Tensor,
    "tensor": torch.Tensor,
    "cache": cache.View,
    "entry": cache.Entry("output", ((), {})),
    "CONFIG": nnsight.CONFIG,
}


def rows() -> dict[str, tuple[str, str, str]]:
    """The tables of the page: versions, mark and remark by name."""
    out: dict[str, tuple[str, str, str]] = {}
    for line in (ROOT / "docs" / "nnsight.md").read_text().splitlines():
        if found := re.fullmatch(r"\| `([^`]+)`(?: \((0\.[78])\))? \| ([a-z ]+) \| ?(.*?) ?\|", line):
            name, version, mark, how = found.groups()
            assert name not in out, name
            out[name] = version or "", mark, how
    return out


ROWS = rows()
MODULES = {name: row for name, row in ROWS.items() if name.startswith("nnsight.") and name.count(".") > 1}


@pytest.fixture(scope="module")
def landmarks() -> Pair:
    directory = ROOT / "python" / "nnsight_go" / "models" / "landmarks"
    hf = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    model = LanguageModel("nnsight-go/landmarks", device_map="cpu", dispatch=True)
    return Pair(directory, hf, model, "transformer.h", "attn", "transformer.ln_f")


@pytest.fixture(params=["landmarks", "text_pair"])
def pair(request: pytest.FixtureRequest) -> Pair:
    """The built-in model, and a small random GPT-2 with a tokenizer."""
    found: Pair = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def model(pair: Pair) -> LanguageModel:
    return pair.model


def seen(pair: Pair, prompt: str, **changes: Any) -> dict[Any, dict[str, torch.Tensor]]:
    """What plain hooks see of a prompt, with edits (``h_0_output=...`` is of ``transformer.h.0.output``)."""
    ids = list(pair.model.tokenizer(prompt)["input_ids"])
    return pair.run(ids, edits({f"transformer.{k.replace('_', '.')}": v for k, v in changes.items()}))


def logits(pair: Pair, prompt: str, **changes: Any) -> torch.Tensor:
    return main(seen(pair, prompt, **changes), "lm_head")


# ---- the table ----


def test_every_name_has_a_row_and_every_row_a_name() -> None:
    wanted = {
        f"{owner}.{name}": version
        for owner, versions in NAMES.items()
        for version, names in versions.items()
        for name in names.split()
    }
    for call, versions in ARGUMENTS.items():
        for version, names in versions.items():
            for name in names.split():
                given = name if name.startswith("*") or name == "repo_id" else f"{name}="
                wanted[f"{call}({given})"] = version
    # tracer.collect is vLLM's, and has its row for those who look for it
    listed = {name: row[0] for name, row in ROWS.items() if name not in MODULES and name != "tracer.collect"}
    assert listed == wanted


def test_rows_are_well_formed() -> None:
    lines = [x for x in (ROOT / "docs" / "nnsight.md").read_text().splitlines() if x.startswith("| `")]
    assert len(lines) == len(ROWS)
    for name, (_, mark, how) in ROWS.items():
        assert mark in MARKS, name
        assert how or mark == "same", f"{name} is {mark}, and its row does not say how"


def attribute(owner: str, name: str, model: LanguageModel) -> Any:
    """What a name of ours is; raises AttributeError where there is none."""
    if owner == "CONFIG":
        at: Any = nnsight.CONFIG
        for part in name.split("."):
            at = getattr(at, part)
        return at
    if owner in ("model", "module") and (name not in dir(Envoy) and name not in dir(LanguageModel)):
        return getattr(model, name)
    if owner == "tracer" and name not in dir(tracing.Tracer):
        return getattr(model.trace(), name)
    return inspect.getattr_static(OWNERS[owner], name)


@pytest.mark.parametrize("name", [n for n in ROWS if n not in MODULES and "(" not in n and not n.startswith("tensor.")])
def test_names_are_there_as_their_row_says(name: str, text_pair: Pair) -> None:
    with text_pair.model.trace("Rome"):
        pass  # mounts .save()
    owner, _, rest = name.partition(".")
    mark = ROWS[name][1]
    if mark.startswith("not"):
        with pytest.raises(AttributeError):
            attribute(owner, rest, text_pair.model)
        return
    if mark == "different" and (name in foreign_names()):
        return  # something under another name, which the row tells
    found = attribute(owner, rest, text_pair.model)
    if mark == "same" and (inspect.isfunction(found) and not rest.startswith("__") and owner != "value"):
        parameters = inspect.signature(found).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for parameter in PARAMETERS[name]:
            assert takes_any or parameter in parameters, parameter


# A module has none of these: its model has them.
OF_THE_MODEL = {"module.trace", "module.edit", "module.session"}


def foreign_names() -> set[str]:
    """Names that only an error knows."""
    tables = {"nnsight": foreign.PACKAGE, "model": foreign.MODULE, "module": foreign.MODULE, "tracer": foreign.TRACER}
    return {f"{owner}.{name}" for owner, table in tables.items() for name in table} | OF_THE_MODEL | {"model.repo_id"}


# A value to give for each argument, and for those that must be refused one that asks for something.
OPENING: dict[str, Any] = {
    "device_map": "cpu", "dispatch": True, "dtype": torch.float32, "torch_dtype": "float32", "tokenizer": None,
    "rename": {"mlp": "feedforward"}, "revision": "main", "token": "x", "cache_dir": ".", "local_files_only": True,
    "trust_remote_code": True, "low_cpu_mem_usage": True, "meta_buffers": False, "task": "text-generation",
    "attn_implementation": "sdpa",
}  # fmt: skip
OPENING_REFUSED: dict[str, Any] = {
    "tokenizer_kwargs": {"a": 1}, "envoys": {}, "automodel": object, "config_model": object, "import_edits": True,
    "peft": "x", "task": "fill-mask", "attn_implementation": "eager",
}  # fmt: skip


def arguments(call: str) -> dict[str, str]:
    return {n[len(call) + 1 : -2]: row[1] for n, row in ROWS.items() if n.startswith(f"{call}(") and n.endswith("=)")}


def test_arguments_of_models(text_pair: Pair) -> None:
    for name, mark in arguments("LanguageModel").items():
        if name in OPENING:
            LanguageModel(text_pair.directory, **{name: OPENING[name]}).close()
        else:
            assert mark == "not yet" or name in OPENING_REFUSED, name
    for name, value in OPENING_REFUSED.items():
        with pytest.raises(nnsight.InputError, match=name):
            LanguageModel(text_pair.directory, **{name: value})
    with pytest.raises(TypeError, match="nonsense"):
        LanguageModel(text_pair.directory, nonsense=1)


def test_arguments_of_traces(text_pair: Pair) -> None:
    model, prompt = text_pair.model, "The Colosseum is in"
    ids = model.tokenizer(prompt, return_tensors="pt")
    given: dict[str, Any] = {
        "input_ids": ids["input_ids"], "attention_mask": None, "labels": None, "blocking": True, "verbose": True,
        "trace": True, "truncation": True, "max_length": 40, "add_special_tokens": True, "padding": True,
        "fn": None, "backend": None, "tracer_cls": None, "job_id": None, "remote": False,
    }  # fmt: skip
    assert set(given) == set(arguments("trace"))
    want = logits(text_pair, prompt)
    for name, value in given.items():
        with model.trace(*([] if name == "input_ids" else [prompt]), **{name: value}):
            out = model.lm_head.output.save()
        close(out, want)
    refused: dict[str, Any] = {"fn": len, "backend": "x", "tracer_cls": object, "job_id": "x"}
    assert set(refused) == {n for n, mark in arguments("trace").items() if mark.startswith("not")}
    for name, value in refused.items():
        with pytest.raises(nnsight.InputError, match=name):
            model.trace(prompt, **{name: value})


def test_arguments_of_the_tokenizer(text_pair: Pair) -> None:
    model, prompt = text_pair.model, "The Colosseum is in the city of"
    with model.trace(prompt, max_length=3, truncation=True):
        cut = model.lm_head.output.save()
    close(cut, logits(text_pair, prompt)[:, :3])
    with pytest.raises(nnsight.InputError, match="padding_side"):
        model.trace([prompt, "Rome"], padding=True, padding_side="right")


def test_trace_false_gives_the_output_at_once(pair: Pair) -> None:
    prompt = "The Eiffel Tower is in the city of"
    close(pair.model.trace(prompt, trace=False).logits, logits(pair, prompt))


def test_names_of_configs(text_pair: Pair, llama_pair: Pair) -> None:
    for pair in (text_pair, llama_pair):
        for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"):
            assert getattr(pair.model.config, name) == getattr(pair.hf.config, name)


def test_whole_tracebacks(text_pair: Pair) -> None:
    def files() -> list[str]:
        with pytest.raises(nnsight.InputError) as caught:
            text_pair.model.trace(3.5)
        return [str(entry.path) for entry in caught.traceback]

    assert all(file == __file__ for file in files())
    nnsight.CONFIG.set_default_app_debug(True)
    try:
        assert any(file.endswith("inputs.py") for file in files())
    finally:
        nnsight.CONFIG.set_default_app_debug(False)
    assert all(file == __file__ for file in files())


def test_settings_hide_the_key() -> None:
    settings = config.Config()
    settings.set_default_api_key("a secret")
    assert settings.API.APIKEY == "a secret" and "secret" not in repr(settings)
    with pytest.raises(AttributeError):
        settings.APP.DEBUGG = True  # type: ignore[attr-defined]


# ---- errors about what is not here ----


@pytest.mark.parametrize("name", foreign.PACKAGE)
def test_missing_names_say_why(name: str) -> None:
    why = re.escape(foreign.PACKAGE[name])
    if name in ("session", "save") or hasattr(nnsight, name):
        pytest.fail(f"{name} is there, and foreign.py says that it is not")
    with pytest.raises(AttributeError, match=why):
        getattr(nnsight, name)
    with pytest.raises(ImportError, match=why):
        exec(f"from nnsight_go import {name}")


def test_missing_attributes_say_why(text_pair: Pair) -> None:
    model = text_pair.model
    for name, why in foreign.MODULE.items():
        if name.startswith("_"):
            continue
        for module in (model, model.transformer.h[0]):
            with pytest.raises(nnsight.ModulePathError, match=re.escape(why[1:])):
                getattr(module, name)
    tracer = model.trace()
    for name, why in foreign.TRACER.items():
        with pytest.raises(AttributeError, match=re.escape(why)):
            getattr(tracer, name)
    with pytest.raises(AttributeError, match="'nonsense'"):
        _ = tracer.nonsense


# ---- nnsight_go.as_nnsight ----

IMPORTS = """
import importlib, json, sys
import nnsight_go.as_nnsight
found = {}
for name in json.loads(sys.argv[1]):
    module, _, last = name.rpartition(".")
    try:
        scope = {}
        exec(f"from {module} import {last} as it", scope)
        it = scope["it"]
        found[name] = f"{it.__module__}.{it.__qualname__}" if hasattr(it, "__qualname__") else ""
    except ImportError as e:
        found[name] = e.__class__.__name__ + ": " + str(e)
print(json.dumps(found))
"""


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)


def test_modules_of_nnsight_hold_what_the_table_says() -> None:
    names = [*MODULES, *(n for n in ROWS if n.startswith("nnsight.") and n not in MODULES)]
    done = python(IMPORTS, json.dumps(names))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in names:
        mark, failed = ROWS[name][1], "Error: " in found[name]
        assert failed == mark.startswith("not"), (name, mark, found[name])
        if failed:
            assert "stands in for nnsight" in found[name] or foreign.PACKAGE[name.rpartition(".")[2]] in found[name]
    assert found["nnsight.modeling.language.LanguageModel"] == "nnsight_go.model.LanguageModel"
    assert found["nnsight.intervention.envoy.Envoy"] == "nnsight_go.envoy.Envoy"


def test_a_program_for_nnsight_runs_unchanged() -> None:
    program = """
import nnsight_go.as_nnsight
import nnsight_go.as_nnsight  # twice is once
import importlib.util
import nnsight
import nnsight.modeling.language
from nnsight import CONFIG, LanguageModel, NNsight, save
from nnsight import *
from nnsight.intervention.envoy import Envoy
from nnsight.models.LanguageModel import LanguageModel as Old
from nnsight.util import apply, fetch_attr

assert importlib.util.find_spec("nnsight") is not None and not hasattr(nnsight, "DiffusionModel")
assert nnsight.__version__.startswith("0.8.1+") and Old is LanguageModel is nnsight.TransformersModel
model = LanguageModel("nnsight-go/landmarks", device_map="auto", dispatch=True)
with model.trace("The Eiffel Tower is in the city of"):
    hidden = save(model.transformer.h[-1].output[0])
    output = model.output.save()
assert isinstance(model.transformer, Envoy) and fetch_attr(model, "transformer.h.0") is model.transformer.h[0]
assert apply([(1, "a"), {"b": 2}, slice(1, 2)], lambda x: x + 1, int) == [(2, "a"), {"b": 3}, slice(2, 3)]
print(hidden.shape, model.tokenizer.decode(output.logits[0, -1].argmax()))
"""
    done = python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([1, 10, 112])  Paris\n"


def test_the_real_one_is_left_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "nnsight.py").write_text("real = True")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import nnsight; {{}}; assert nnsight.real"
    assert python(code.format("import nnsight_go")).returncode == 0
    done = python(code.format("import nnsight_go.as_nnsight"))
    assert "ImportError: nnsight has been imported already" in done.stderr


def test_modules_that_are_not_there() -> None:
    done = python("import nnsight_go.as_nnsight\nimport nnsight.modeling.vllm")
    assert "ModuleNotFoundError" in done.stderr and foreign.PACKAGE["VLLM"] in done.stderr


# ---- nnsight's documented lines ----
# README, walkthrough and docs/usage of nnsight 0.7; where those count on a block that gives a bare tensor,
# as in earlier versions of them, with `.output[0]`.


def test_getting_started(landmarks: Pair) -> None:
    model = landmarks.model
    with model.trace("The Eiffel Tower is in the city of"):
        # Intervene on activations (must access in execution order!)
        model.transformer.h[0].output[0][:] = 0

        # Access and save hidden states from a later layer
        hidden_states = model.transformer.h[-1].output[0].save()

        # Get model output
        output = model.output.save()

    def zero(x: torch.Tensor) -> torch.Tensor:
        return x.zero_()

    want = seen(landmarks, "The Eiffel Tower is in the city of", h_0_output=in_place(zero))
    close(hidden_states, main(want, "transformer.h.5"))
    close(output.logits, main(want, "lm_head"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(landmarks.directory)
    text = model.tokenizer.decode(output.logits.argmax(dim=-1)[0])
    assert text == tokenizer.decode(main(want, "lm_head").argmax(dim=-1)[0])


def test_predicted_token(landmarks: Pair) -> None:
    llm = landmarks.model
    with llm.trace("The Eiffel Tower is in the city of"):
        hidden_states = llm.transformer.h[-1].output[0].save()
        logits = llm.lm_head.output.save()

    assert hidden_states.shape == (1, 10, 112)
    assert llm.tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_accessing_activations(pair: Pair, model: LanguageModel) -> None:
    with model.trace("The Eiffel Tower is in the city of"):
        attn_output = model.transformer.h[0].attn.output[0].save()
        mlp_output = model.transformer.h[0].mlp.output.save()
        layer_output = model.transformer.h[2].output[0].save()
        layer_input = model.transformer.h[2].input.save()
        logits = model.lm_head.output.save()

    want = seen(pair, "The Eiffel Tower is in the city of")
    close(attn_output, main(want, "transformer.h.0.attn"))
    close(mlp_output, main(want, "transformer.h.0.mlp"))
    close(layer_output, main(want, "transformer.h.2"))
    close(layer_input, main(want, "transformer.h.1"))
    close(logits, main(want, "lm_head"))


def test_operations_on_values(pair: Pair, model: LanguageModel) -> None:
    with model.trace("The Eiffel Tower is"):
        layer1_out = model.transformer.h[1].output[0]
        max_idx = torch.argmax(layer1_out, dim=1).save()
        total = (model.transformer.h[1].output[0].sum() + model.transformer.h[2].output[0].sum()).save()

    want = seen(pair, "The Eiffel Tower is")
    close(max_idx, main(want, "transformer.h.1").argmax(dim=1))
    close(total, main(want, "transformer.h.1").sum() + main(want, "transformer.h.2").sum())


def test_saving_before_a_modification(model: LanguageModel) -> None:
    with model.trace("The Eiffel Tower is"):
        before = model.transformer.h[1].mlp.output.clone().save()
        model.transformer.h[1].mlp.output[:, 0] = 0
        after = model.transformer.h[1].mlp.output.save()

    assert before[:, 0].abs().sum() > 0 and after[:, 0].abs().sum() == 0
    assert torch.equal(before[:, 1:], after[:, 1:])


def test_replacement(pair: Pair, model: LanguageModel) -> None:
    torch.manual_seed(3)
    with model.trace("The Eiffel Tower is"):
        hs = model.transformer.h[-1].mlp.output.clone()
        noise = 0.01 * torch.randn(hs.shape)
        model.transformer.h[-1].mlp.output = hs + noise
        result = model.transformer.h[-1].mlp.output.save()
        logits = model.lm_head.output.save()

    torch.manual_seed(3)
    last = f"h_{len(model.transformer.h) - 1}_mlp_output"
    want = seen(pair, "The Eiffel Tower is", **{last: lambda x: x + 0.01 * torch.randn(x.shape)})
    close(result, main(want, f"transformer.{last[:-7].replace('_', '.')}"))
    close(logits, main(want, "lm_head"))


def test_errors_are_the_ones_of_torch(model: LanguageModel) -> None:
    with pytest.raises(IndexError, match="5000 is out of bounds"), model.trace("The Eiffel Tower is"):
        model.transformer.h[0].output[0][:, :, 5000] = 0
        model.lm_head.output.save()


def test_invokes(pair: Pair, model: LanguageModel) -> None:
    with model.trace() as tracer:
        with tracer.invoke("The Eiffel Tower is"):
            out1 = model.lm_head.output[:, -1].save()

        with tracer.invoke(["The Colosseum is in", "The Colosseum"]):
            out2 = model.lm_head.output[:, -1].save()

        # No-arg invoke: operates on ALL 3 inputs
        with tracer.invoke():
            out_all = model.lm_head.output[:, -1].save()  # Shape: [3, vocab]

    close(out1, logits(pair, "The Eiffel Tower is")[:, -1])
    close(out2[:1], logits(pair, "The Colosseum is in")[:, -1])
    close(out2[1:], logits(pair, "The Colosseum")[:, -1])
    close(out_all, torch.cat([out1, out2]))


def test_embeddings_across_prompts(pair: Pair, model: LanguageModel) -> None:
    dummy = "_ _ _ _ _ _ _"  # as many tokens
    while len(model.tokenizer(dummy)["input_ids"]) < len(model.tokenizer("The Eiffel Tower is in")["input_ids"]):
        dummy += "_"
    prompt = "The Eiffel Tower is in"
    while len(model.tokenizer(dummy)["input_ids"]) > len(model.tokenizer(prompt)["input_ids"]):
        prompt += "n"
    with model.trace() as tracer:
        barrier = tracer.barrier(2)

        with tracer.invoke(prompt):
            paris_embeddings = model.transformer.wte.output
            barrier()

        with tracer.invoke(dummy):
            barrier()
            model.transformer.wte.output = paris_embeddings
            patched_output = model.lm_head.output[:, -1].save()

    close(patched_output, logits(pair, prompt)[:, -1])


def test_activation_patching(landmarks: Pair) -> None:
    model = landmarks.model
    clean = "The Eiffel Tower is in the city of"
    corrupt = "The Colosseum is in the city of"
    LAYER = 3
    with model.trace() as tracer:
        barrier = tracer.barrier(2)

        # Invoke 1: capture clean residual stream at the last token of LAYER.
        with tracer.invoke(clean):
            clean_hs = model.transformer.h[LAYER].output[0][:, -1, :]
            barrier()

        # Invoke 2: corrupt run, with the clean activation patched in.
        with tracer.invoke(corrupt):
            barrier()
            model.transformer.h[LAYER].output[0][:, -1, :] = clean_hs
            patched_logits = model.lm_head.output[:, -1, :].save()

        # Invoke 3: corrupt-only baseline (for comparison), no patching.
        with tracer.invoke(corrupt):
            baseline_logits = model.lm_head.output[:, -1, :].save()

    assert patched_logits.argmax() == model.tokenizer.encode(" Paris")[0]
    assert baseline_logits.argmax() == model.tokenizer.encode(" Rome")[0]


def test_early_stopping(pair: Pair, model: LanguageModel) -> None:
    with model.trace("The Eiffel Tower is") as tracer:
        layer0 = model.transformer.h[0].output[0].save()
        tracer.stop()  # Don't execute remaining layers

    close(layer0, main(seen(pair, "The Eiffel Tower is"), "transformer.h.0"))


def test_scanning(model: LanguageModel) -> None:
    width = model.config.hidden_size
    with model.scan("The Eiffel Tower is"):
        hidden_dim = model.transformer.h[0].output[0].shape[-1].save()  # type: ignore[attr-defined]
    assert hidden_dim == width

    with model.scan("The Eiffel Tower is"):
        dim = nnsight.save(model.transformer.h[0].output[0].shape[-1])
        n_layers = nnsight.save(len(model.transformer.h))
        last_logits = model.lm_head.output[:, -1].save()
        paths = nnsight.save([m.path for m in model.modules()])
        model.transformer.h[0].output[0][:, :, width - 1] = 0
    assert (dim, n_layers, last_logits.shape) == (width, model.config.n_layer, (1, model.config.vocab_size))
    assert paths[:2] == ["", "transformer"]

    with pytest.raises(IndexError, match=f"index {width} is out of bounds"), model.scan("The Eiffel Tower is"):
        model.transformer.h[0].output[0][:, :, width] = 0
    with pytest.raises(nnsight.OpError, match="must match"), model.scan("The Eiffel Tower is"):
        model.transformer.h[0].output[0][:, 0] = torch.zeros(width + 1)
    with model.scan("The Eiffel Tower is"):
        hidden = model.transformer.h[0].output[0]
        hidden[hidden > 0] = 0  # how much that writes is not known, and fits
        hidden = hidden.save()
    assert hidden.is_meta and hidden.shape[-1] == width

    with model.scan("The Eiffel Tower is") as tracer:
        cache = tracer.cache()
    shapes = {path: entry.output.shape for path, entry in cache.items() if hasattr(entry.output, "shape")}
    assert shapes["model.transformer.h.0.mlp"][-1] == width


def test_caching(pair: Pair, model: LanguageModel) -> None:
    with model.trace("The Eiffel Tower is") as tracer:
        cache = tracer.cache()

    want = seen(pair, "The Eiffel Tower is")
    close(cache["model.transformer.h.0"].output[0], main(want, "transformer.h.0"))
    close(cache.model.transformer.h[0].output[0], main(want, "transformer.h.0"))

    with model.trace("The Eiffel Tower is") as tracer:
        cache = tracer.cache(
            modules=[model.transformer.h[0], model.transformer.h[2], "model.lm_head"],
            device=torch.device("cpu"),
            dtype=torch.float64,
            detach=True,
            include_output=True,
            include_inputs=True,
            non_blocking=True,
        )
        model.transformer.h[0].output[0][:] = 0
    assert list(cache.keys()) == ["model.transformer.h.0", "model.transformer.h.2", "model.lm_head"]
    assert not cache["model.transformer.h.0"].output[0].any()
    args, _ = cache["model.transformer.h.0"].inputs
    assert torch.equal(args[0], cache["model.transformer.h.0"].input)
    close(args[0], main(want, "transformer.h.0", "input").double())


def test_skipping(pair: Pair, model: LanguageModel) -> None:
    with model.trace("The Eiffel Tower is"):
        # Get layer 0 output
        layer0_out = model.transformer.h[0].output

        # Skip layer 1 - use layer 0's output instead
        model.transformer.h[1].skip(layer0_out)

        # Continue with rest of model
        output = model.lm_head.output.save()

    hidden = main(seen(pair, "The Eiffel Tower is"), "transformer.h.0")
    close(output, logits(pair, "The Eiffel Tower is", h_1_output=lambda _: hidden))


def test_editing(pair: Pair, model: LanguageModel) -> None:
    # First, get hidden states that predict "Paris"
    with model.trace("The Eiffel Tower is in the city of"):
        paris_hidden = model.transformer.h[-1].output[0][:, -1, :].save()

    # Create an edited model that always uses these hidden states
    with model.edit() as model_edited:
        model.transformer.h[-1].output[0][:, -1, :] = paris_hidden

    with model.trace("The Colosseum is in the city of"):
        original = model.lm_head.output.argmax(dim=-1).save()

    with model_edited.trace("The Colosseum is in the city of"):
        modified = model.lm_head.output.argmax(dim=-1).save()

    assert original[0, -1] == logits(pair, "The Colosseum is in the city of")[0, -1].argmax()
    assert modified[0, -1] == logits(pair, "The Eiffel Tower is in the city of")[0, -1].argmax()


def test_editing_in_place(pair: Pair, model: LanguageModel) -> None:
    with model.edit(inplace=True):
        inp = model.transformer.h[1].input
        model.transformer.h[1].skip(inp)  # always skip layer 1, pass-through
    try:
        with model.trace("The Eiffel Tower is"):
            out = model.lm_head.output.save()
    finally:
        model.clear_edits()
    hidden = main(seen(pair, "The Eiffel Tower is"), "transformer.h.0")
    close(out, logits(pair, "The Eiffel Tower is", h_1_output=lambda _: hidden))
    with model.trace("The Eiffel Tower is"):
        out = model.lm_head.output.save()
    close(out, logits(pair, "The Eiffel Tower is"))


def test_sessions(pair: Pair, model: LanguageModel) -> None:
    with model.session(remote=False):
        with model.trace("The Eiffel Tower is in"):
            hs1 = model.transformer.h[0].output[0][:, -1]  # no .save() needed inside

        # Plain Python - runs between traces
        assert hs1.shape == (1, model.config.hidden_size)

        with model.trace("The Colosseum is in"):
            model.transformer.h[0].output[0][:, -1] = hs1  # Use value from first trace
            hs2 = model.transformer.h[0].output[0].save()
    close(hs2[:, -1], main(seen(pair, "The Eiffel Tower is in"), "transformer.h.0")[:, -1])


@pytest.mark.parametrize("of_model", [True, False])
def test_lists_of_sessions(pair: Pair, model: LanguageModel, of_model: bool) -> None:
    prompts = ["The Eiffel Tower", "The Colosseum is", "Rome"]
    with model.session() if of_model else nnsight.session():
        results = list().save()  # type: ignore[attr-defined]  # noqa: C408  (as documented)
        for prompt in prompts:
            with model.trace(prompt):
                results.append(model.lm_head.output.argmax(dim=-1))
    for prompt, result in zip(prompts, results, strict=True):
        close(result, logits(pair, prompt).argmax(dim=-1))
    with pytest.raises(nnsight.InputError, match="outside of one"):
        nnsight.save(results)


def test_renaming(pair: Pair) -> None:
    model = LanguageModel(
        pair.directory,
        rename={
            "transformer.h": "layers",  # mount at new path
            "mlp": "feedforward",  # rename every MLP child
            ".transformer": ["model", "mdl"],  # multiple aliases for one path
        },
    )
    with model.trace("The Eiffel Tower is") as tracer:
        cache = tracer.cache()
        a = model.layers[0].feedforward.output.save()
        b = model.transformer.h[0].mlp.output.save()
        c = model.model.h[0].mlp.output.save()
        d = model.mdl.h[0].mlp.output.save()
    want = main(seen(pair, "The Eiffel Tower is"), "transformer.h.0.mlp")
    for got in (a, b, c, d):
        close(got, want)
    for got in (
        cache["model.layers.0.feedforward"].output,
        cache["model.layers.0.mlp"].output,
        cache.layers[0].feedforward.output,
        cache.model.layers[0].mlp.output,
    ):
        close(got, want)
    with pytest.raises(nnsight.ModulePathError, match="no 'model.layer.0'"):
        cache["model.layer.0"]


def test_logit_lens(pair: Pair, model: LanguageModel) -> None:
    prompt = "The Eiffel Tower is in the city of"
    with model.trace(prompt):
        layer_top_tokens = []
        for block in model.transformer.h:
            hs = block.output[0]
            logits = model.lm_head(model.transformer.ln_f(hs))
            top_tok = logits[:, -1, :].argmax(dim=-1).save()
            layer_top_tokens.append(top_tok)

    want = seen(pair, prompt)
    for i, tok in enumerate(layer_top_tokens):
        with torch.no_grad():
            hidden = pair.hf.transformer.ln_f(main(want, f"transformer.h.{i}"))
            close(tok, pair.hf.lm_head(hidden)[:, -1].argmax(-1))
        assert model.tokenizer.decode(tok[0]) == model.tokenizer.decode([int(tok)])


def test_conditionals(pair: Pair, model: LanguageModel) -> None:
    with model.trace("The Eiffel Tower is"):
        output = model.transformer.h[0].output[0]
        if torch.all(output < 1e5):
            model.transformer.h[-1].output[0][:] = 0
        final = model.transformer.h[-1].output[0].save()
    assert not final.any()

    with model.trace("The Eiffel Tower is"):
        norm = model.transformer.h[0].output[0].norm(dim=-1).mean()
        if norm > 1e9:
            model.transformer.h[1].output[0][:] = 0
        final = model.lm_head.output.save()
    close(final, logits(pair, "The Eiffel Tower is"))


def test_saving_in_every_form(model: LanguageModel) -> None:
    with model.trace("The Eiffel Tower is"):
        means = [model.transformer.h[i].output[0].mean() for i in range(3)]
        means = nnsight.save(means)
        activations = list().save()  # type: ignore[attr-defined]  # noqa: C408
        for i in range(len(model.transformer.h)):
            activations.append(model.transformer.h[i].output[0])
        x = torch.tensor([1, 2, 3]).save()  # type: ignore[attr-defined]
        y = nnsight.save(2)
        shape = nnsight.save(model.transformer.h[0].output[0].shape)
    assert all(type(m) is torch.Tensor for m in means) and y == 2 and torch.equal(x, torch.tensor([1, 2, 3]))
    assert len(activations) == model.config.n_layer and activations[0].shape == shape


def test_ablating_a_head(pair: Pair, model: LanguageModel) -> None:
    n_heads, head_dim = model.config.n_head, model.config.n_embd // model.config.n_head
    with model.trace("The Eiffel Tower is"):
        attn_out = model.transformer.h[1].attn.output[0]
        B, S, _ = attn_out.shape
        reshaped = attn_out.view(B, S, n_heads, head_dim).clone()
        reshaped[:, :, 1, :] = 0
        new_attn = reshaped.view(B, S, n_heads * head_dim)
        model.transformer.h[1].attn.output = (new_attn,) + model.transformer.h[1].attn.output[1:]  # noqa: RUF005
        out = model.lm_head.output.save()

    def ablate(x: torch.Tensor) -> None:
        x[..., head_dim : 2 * head_dim] = 0

    close(out, logits(pair, "The Eiffel Tower is", h_1_attn_output=in_place(ablate)))


def test_steering(pair: Pair, model: LanguageModel) -> None:
    direction = torch.randn(model.config.n_embd, device=model.device)
    direction, coef = direction / direction.norm(), 4.0
    with model.trace("The Eiffel Tower is"):
        for layer in [0, 1, 2]:
            model.transformer.h[layer].output[0][:, -1, :] += direction * (coef / 4)
        out = model.lm_head.output.save()

    def steer(x: torch.Tensor) -> None:
        x[:, -1, :] += direction * (coef / 4)

    close(out, logits(pair, "The Eiffel Tower is", **{f"h_{i}_output": in_place(steer) for i in range(3)}))


def test_results_and_steps(pair: Pair, model: LanguageModel) -> None:
    want = logits(pair, "The Eiffel Tower is")
    with model.trace("The Eiffel Tower is") as tracer:
        steps, hidden = [], list().save()  # type: ignore[attr-defined]  # noqa: C408
        for step in tracer.iter[:]:
            steps.append(step)
            hidden.append(model.lm_head.output)
        for step in tracer.all():
            steps.append(step)
        for chosen in (tracer.iter[0], tracer.iter[:1], tracer.iter[[0, 2]]):
            with chosen as step:
                steps.append(step)
        for step in tracer.iter[1:3]:
            steps.append(step)
        for never in (tracer.iter[1], tracer.iter[1:], tracer.iter[[1, 2]]):
            with pytest.raises(nnsight.InputError, match="none of these steps"), never:
                steps.append(100)
        result = tracer.result.save()
    assert steps == [0] * 5 and len(hidden) == 1
    close(hidden[0], want)
    close(result.logits, want)


def test_operations_inside_modules(pair: Pair, model: LanguageModel) -> None:
    source = model.transformer.h[0].attn.source
    assert "scaled_dot_product_attention_0" in str(source)
    with model.trace("The Eiffel Tower is"):
        source.scaled_dot_product_attention_0.output[:] = 0
        attn_output = model.transformer.h[0].attn.output[0].save()
    bias = pair.hf.transformer.h[0].attn.c_proj.bias
    close(attn_output, bias.detach().expand_as(attn_output))


def test_modules_as_a_tree(model: LanguageModel) -> None:
    block = model.transformer.h[0]
    assert block.parent is model.transformer.h and block.mlp.root is model and model.parent is None
    assert model.to("cpu") is model and block.cpu() is block
    assert block.device == torch.device("cpu") and model.devices == {torch.device("cpu")}
    with pytest.raises(nnsight.InputError, match="device_map"):
        model.to("meta")
    mlps = list(model.modules(include_fn=lambda m: m.path.endswith("mlp")))
    assert [m.path for m in mlps] == [f"transformer.h.{i}.mlp" for i in range(model.config.n_layer)]
    named = dict(block.named_modules(include_fn=lambda m: m in mlps))
    assert named == {"mlp": block.mlp}
