"""What goes wrong says what, where and what to do; afterwards everything is as it was."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import random
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import safetensors.torch
import torch

from nnsight_go import (
    ForkError,
    HandleError,
    InputError,
    LanguageModel,
    ModelLoadError,
    ModulePathError,
    NnsightError,
    NotSavedError,
    OpError,
    OutOfOrderError,
    TokenizerError,
)
from nnsight_go.recorder import current
from programs import Maker, source, surroundings
from references import Pair, close, main


@pytest.fixture(autouse=True)
def next_trace_is_right(nothing_stays: None, either: Pair) -> Iterator[None]:
    want = main(either.run(either.ids()), "lm_head")
    yield
    assert current.recorder is None
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with either.model.trace(either.ids()):
        out = either.model.lm_head.output.save()
    close(out, want)


LINES = pathlib.Path(__file__).read_text().splitlines()


def marked(text: str) -> int:
    """The number of the line of this file that ends with a mark."""
    (found,) = [i for i, line in enumerate(LINES, 1) if line.endswith(f"# mark: {text}")]
    return found


def says(caught: pytest.ExceptionInfo[NnsightError], *parts: str, at: str = "", also: str = "") -> None:
    """Fails unless an error has these parts and names the marked line (and a second one)."""
    error = caught.value
    assert isinstance(error, NnsightError)
    text = str(error)
    for part in parts:
        assert part in text, f"{part!r} is not in:\n{text}"
    assert error.hint, f"it does not say what to do:\n{text}"
    if at:
        assert (error.file, error.line) == (__file__, marked(at)), text
        assert f"{__file__}:{marked(at)}" in text
    if also:
        assert (error.other_file, error.other_line) == (__file__, marked(also)), text
        assert f"{__file__}:{marked(also)}" in text
    assert str(pickle.loads(pickle.dumps(error))) == text, "errors cross processes"


# ---- inputs ----


def test_prompt_longer_than_the_context(either: Pair) -> None:
    longest = either.hf.config.max_position_embeddings
    with either.model.trace([1] * longest):
        out = either.model.lm_head.output.save()
    assert out.shape[1] == longest
    with pytest.raises(InputError) as caught, either.model.trace([1] * (longest + 1)):
        either.model.lm_head.output.save()
    says(caught, str(longest), str(longest + 1))
    with pytest.raises(InputError) as caught, either.model.trace() as tracer:
        with tracer.invoke([1, 2]):
            either.model.lm_head.output.save()
        with tracer.invoke([1] * (longest + 5)):
            either.model.lm_head.output.save()
    says(caught, str(longest), str(longest + 5))


@pytest.mark.parametrize("id", [61, -1, 1 << 40, -(1 << 60)])
def test_ids_outside_of_the_vocabulary(either: Pair, id: int) -> None:
    with pytest.raises(InputError) as caught, either.model.trace([1, 2, id]):
        either.model.lm_head.output.save()
    says(caught, f"id {id}", "token 2", "0 to 60")
    with pytest.raises(InputError) as caught, either.model.trace() as tracer:
        with tracer.invoke([1]):
            pass
        with tracer.invoke([[1, 2], [3, id]]):
            either.model.lm_head.output.save()
    says(caught, f"id {id}", "row 1")


@pytest.mark.parametrize(
    "given", [[], [[]], (), torch.tensor([], dtype=torch.long), [[1], []], torch.zeros(1, 0).long()]
)
def test_empty_inputs(either: Pair, given: Any) -> None:
    with pytest.raises(InputError, match="empty|no tokens") as caught:
        either.model.trace(given)  # mark: empty
    says(caught, "Give", at="empty")
    with pytest.raises(InputError), either.model.trace() as tracer:
        tracer.invoke(given)


@pytest.mark.parametrize("given", ["", ["x", ""], [""]])
def test_empty_texts(text_pair: Pair, given: Any) -> None:
    with pytest.raises(InputError, match="empty") as caught:
        text_pair.model.trace(given)  # mark: empty text
    says(caught, at="empty text")


@pytest.mark.parametrize(
    "given", [1.5, torch.randn(3), torch.zeros(1, 2, 3).long(), [1, "a"], [1.0], [True], object(), [[1], 2], [[[1]]], 7]
)
def test_inputs_of_another_kind(either: Pair, given: Any) -> None:
    with pytest.raises(InputError) as caught:
        either.model.trace(given)  # mark: kind
    says(caught, at="kind")


def test_arguments_that_do_not_fit(either: Pair) -> None:
    for call, said in (
        (lambda: either.model.trace([1], [2]), "2 inputs"),
        (lambda: either.model.trace([1], input_ids=[1]), "both"),
        (lambda: either.model.trace([1], max_new_tokens=3), "max_new_tokens"),
        (lambda: either.model.trace(attention_mask=[1]), "no input"),
        (lambda: either.model.trace([1, 2], attention_mask=[1]), "attention mask"),
        (lambda: either.model.trace([1, 2], attention_mask=torch.ones(2, 2)), "attention mask"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        says(caught, said)
    with pytest.raises(InputError) as caught:
        either.model.trace([1], remote=True)
    says(caught, "no server is known", "NNSIGHT_GO_HOST")


# ---- lines of the block ----


def test_shapes_that_do_not_fit(either: Pair) -> None:
    with pytest.raises(OpError) as caught, either.model.trace(either.ids()):
        hidden = either.layers[1].output[0]
        moved = hidden + torch.ones(5)  # mark: add
        moved.save()
    says(caught, "aten::add", "[5]", f"[1 7 {either.width}]", at="add")
    assert isinstance(caught.value, RuntimeError)


def test_the_line_is_found_inside_of_functions(either: Pair) -> None:
    def helper(x: torch.Tensor) -> torch.Tensor:
        return x @ torch.ones(3, 3)  # mark: helper

    with pytest.raises(OpError) as caught, either.model.trace(either.ids()):
        helper(either.layers[1].output[0]).save()
    says(caught, "3", at="helper")
    assert caught.value.func == "helper"


@pytest.mark.parametrize("forced", [False, True])
def test_errors_of_values_name_their_line(either: Pair, forced: bool) -> None:
    with pytest.raises(OpError) as caught, either.model.trace(either.ids()):
        hidden = either.layers[1].output[0]
        picked = hidden[:, 99]  # mark: index
        if forced:
            picked.sum().item()
        picked.save()
    says(caught, "99", at="index")


def test_writes_that_do_not_fit(either: Pair) -> None:
    with pytest.raises(OpError) as caught, either.model.trace(either.ids()):
        either.layers[1].output[0][:, -1] = torch.ones(5)  # mark: set
        either.model.lm_head.output.save()
    says(caught, "5", at="set")
    with pytest.raises(OpError) as caught, either.model.trace(either.ids()):
        either.layers[1].mlp.output += torch.ones(2, 2)  # mark: iadd
        either.model.lm_head.output.save()
    says(caught, at="iadd")


def test_replacements_the_model_cannot_use(either: Pair) -> None:
    """The model's own operation fails, and the error names the line that brought the value."""
    with pytest.raises(OpError) as caught, either.model.trace(either.ids()):
        either.layers[1].output[0] = torch.ones(1, 7, either.width + 1)  # mark: replaced
        either.model.lm_head.output.save()
    sizes = f"by one of sizes [1 7 {either.width + 1}]"
    says(caught, f"replaced a value of {either.blocks}.1", sizes, at="replaced")
    assert (
        caught.value.path
        == {"gpt2": "transformer.h.2.ln_1", "llama": "model.layers.2.input_layernorm"}[either.hf.config.model_type]
    )


def test_modules_called_on_what_does_not_fit(either: Pair) -> None:
    with pytest.raises(OpError) as caught, either.model.trace(either.ids()):
        either.model.lm_head(either.layers[1].output[0][..., :5]).save()  # mark: call
    says(caught, "lm_head", at="call")
    with pytest.raises(OpError) as caught:
        either.model.lm_head(torch.ones(1, 2, 5))
    says(caught, "lm_head")
    with pytest.raises(InputError) as caught, either.model.trace(either.ids()):
        either.model.lm_head(3)
    says(caught, "lm_head", "without a tensor")


@pytest.mark.parametrize("value", [None, 1, 1.5, "text", object()])
def test_assigning_what_is_no_tensor(either: Pair, value: object) -> None:
    with pytest.raises(InputError) as caught, either.model.trace(either.ids()):
        either.layers[1].mlp.output = value  # mark: no tensor
    says(caught, "holds a tensor", type(value).__name__, at="no tensor")
    with pytest.raises(InputError) as caught, either.model.trace(either.ids()):
        either.layers[1].output[0] = value
    says(caught, "holds a tensor")


def test_assigning_another_structure(either: Pair) -> None:
    x = torch.zeros(1, 7, either.width)
    with pytest.raises(InputError) as caught, either.model.trace(either.ids()):
        either.layers[1].output = (x, x, x)  # mark: structure
    says(caught, "tuple of 3", at="structure")
    with pytest.raises(InputError) as caught, either.model.trace(either.ids()):
        either.model.get(f"{either.blocks}.1.{either.attention}").output = x
    says(caught, "tuple of 2")
    with pytest.raises(InputError) as caught, either.model.trace(either.ids()):
        either.layers[1].inputs = x
    says(caught, "(args, kwargs)")
    with pytest.raises(ModulePathError) as caught, either.model.trace(either.ids()):
        either.model.output.nothing  # noqa: B018  # mark: field
    says(caught, "logits", at="field")


def test_unknown_modules(either: Pair) -> None:
    with pytest.raises(ModulePathError) as caught, either.model.trace(either.ids()):
        either.layers[1].mpl.output.save()  # mark: unknown
    says(caught, "has no 'mpl'", "Nearest: mlp", at="unknown")


# ---- order ----


def test_writing_to_what_has_run(either: Pair) -> None:
    with pytest.raises(OutOfOrderError) as caught, either.model.trace(either.ids()):
        either.layers[2].output[0].save()  # mark: further
        either.layers[0].output[0] = torch.zeros(1, 7, either.width)  # mark: late write
    says(caught, f"{either.blocks}.0.output", f"{either.blocks}.2.output", at="late write", also="further")
    assert isinstance(caught.value, ValueError) and caught.value.path == f"{either.blocks}.0"


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.layers[0].output[0].__setitem__(0, 1),
        lambda p: p.layers[0].output[0].mul_(2),
        lambda p: p.layers[0].output[0][:, -1].zero_(),
        lambda p: p.layers[0].mlp.output.transpose(0, 1).add_(1),
        lambda p: setattr(p.layers[0], "output", torch.zeros(1, 7, p.width)),
        lambda p: setattr(p.layers[0], "input", torch.zeros(1, 7, p.width)),
        lambda p: p.layers[0].inputs[0].__setitem__(0, torch.zeros(1, 7, p.width)),
        lambda p: p.layers[0].output.__setitem__(0, torch.zeros(1, 7, p.width)),
    ],
    ids=["setitem", "mul_", "view", "transposed view", "output", "input", "inputs", "tuple"],
)
def test_every_kind_of_late_write(either: Pair, write: Callable[[Pair], Any]) -> None:
    with pytest.raises(OutOfOrderError) as caught, either.model.trace(either.ids()):
        out = either.model.lm_head.output.save()  # mark: head
        write(either)
    says(caught, also="head")
    assert caught.value.file == __file__
    assert type(out).__name__ == "Proxy", "nothing is half saved"


def test_an_older_view_that_the_model_has_left(either: Pair) -> None:
    with pytest.raises(OutOfOrderError) as caught, either.model.trace(either.ids()):
        old = either.layers[0].output[0][:, -1]
        either.model.lm_head.output.save()  # mark: moved on
        old[:] = 0  # mark: old view
    says(caught, ".clone()", at="old view", also="moved on")
    with either.model.trace(either.ids()):
        copy = either.layers[0].output[0][:, -1].clone()
        either.model.lm_head.output.save()
        copy[:] = 0
        copy.save()
    assert not copy.any()


def test_the_order_is_one_of_each_invoke(either: Pair) -> None:
    with either.model.trace() as tracer:
        with tracer.invoke(either.ids()):
            either.model.lm_head.output.save()
        with tracer.invoke(either.ids()):
            either.layers[0].output[0][:] = 0
            out = either.model.lm_head.output.save()
    assert out.shape[1] == 7
    with pytest.raises(OutOfOrderError) as caught, either.model.trace() as tracer:
        with tracer.invoke(either.ids()):
            pass
        with tracer.invoke(either.ids()):
            either.layers[2].output[0].save()  # mark: second invoke
            either.layers[1].mlp.output[:] = 0
            either.model.lm_head.output.save()
    says(caught, also="second invoke")


# ---- leaving the block ----


class Boom(Exception):
    """Raised by tests."""


def test_an_exception_in_the_block_comes_out_as_it_is(either: Pair) -> None:
    effects = []
    with pytest.raises(Boom) as caught, either.model.trace(either.ids()):
        hidden = either.layers[1].output[0].save()
        effects.append("before")
        either.layers[2].output[0][:] = 0
        raise Boom("mine")  # mark: boom
    assert str(caught.value) == "mine" and caught.value.__cause__ is None and caught.value.__context__ is None
    assert traceback.extract_tb(caught.tb)[-1].lineno == marked("boom")
    assert effects == ["before"], "what plain Python did stays done"
    with pytest.raises(NotSavedError, match="left by Boom"):
        hidden + 1
    assert "left by Boom" in repr(hidden)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, ZeroDivisionError])
def test_exceptions_of_other_kinds(either: Pair, error: type[BaseException]) -> None:
    with pytest.raises(error), either.model.trace() as tracer, tracer.invoke(either.ids()):
        either.layers[1].output[0].save()
        raise error


def test_an_exception_inside_of_an_invoke_and_of_a_grad_mode(either: Pair) -> None:
    with pytest.raises(Boom), torch.no_grad(), either.model.trace() as tracer:
        with tracer.invoke(either.ids()):
            either.layers[1].output[0].save()
        with tracer.invoke(either.ids()), torch.inference_mode():
            float(either.layers[1].output[0].sum())
            raise Boom


def test_break_continue_and_return_end_the_block(either: Pair) -> None:
    outs = []
    for i in range(3):
        with either.model.trace(either.ids()):
            outs.append(either.model.lm_head.output.save())
            if i == 1:
                break
            continue
    assert len(outs) == 2
    close(outs[0], outs[1])


def test_try_around_a_line_does_not_catch_what_fails_later(either: Pair) -> None:
    reached = False
    with pytest.raises(OpError) as caught, either.model.trace(either.ids()):
        try:
            wrong = either.layers[1].output[0] + torch.ones(5)  # mark: tried
        except RuntimeError:
            pytest.fail("nothing was computed yet")
        reached = True
        wrong.save()
    assert reached
    says(caught, at="tried")


def test_an_error_of_a_forced_value_can_be_caught(either: Pair) -> None:
    with either.model.trace(either.ids()):
        try:
            (either.layers[1].output[0] + torch.ones(5)).sum().item()
        except OpError:
            out = either.model.lm_head.output.save()
    close(out, main(either.run(either.ids()), "lm_head"))


@pytest.mark.parametrize("seed", range(30))
def test_random_blocks_that_raise_at_a_random_line(either: Pair, seed: int) -> None:
    rng = random.Random(seed)
    maker = Maker(either)
    lines = source(maker.make(1000 + seed)).splitlines()
    at = rng.randint(1, len(lines))
    while at < len(lines) and lines[at - 1].endswith(":"):
        at += 1
    indent = re.match(" *", lines[at - 1])
    assert indent is not None
    lines.insert(at, f"{indent[0]}raise Boom")
    names = surroundings(maker) | {"model": either.model, "Boom": Boom}
    with pytest.raises(Boom), torch.no_grad():
        exec("\n".join(lines), names)
    for value in names.values():
        assert not (type(value).__name__ == "Proxy" and value._rec.closed is None)


# ---- files ----


@pytest.fixture
def spoilt(either: Pair, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a model's directory, to be spoilt."""
    return pathlib.Path(shutil.copytree(either.directory, tmp_path / "spoilt"))


def test_a_directory_without_config(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        LanguageModel(tmp_path)
    says(caught, "config.json", str(tmp_path))
    assert isinstance(caught.value, OSError)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"architectures": 3}', "\x00\xff", '{"model_type": "gpt2"'])
def test_a_config_that_is_none(spoilt: pathlib.Path, text: str) -> None:
    (spoilt / "config.json").write_text(text)
    with pytest.raises(ModelLoadError) as caught:
        LanguageModel(spoilt)
    says(caught, "config.json")


def test_an_unsupported_architecture(spoilt: pathlib.Path) -> None:
    config = json.loads((spoilt / "config.json").read_text())
    (spoilt / "config.json").write_text(
        json.dumps(config | {"architectures": ["MambaForCausalLM"], "model_type": "mamba"})
    )
    with pytest.raises(ModelLoadError) as caught:
        LanguageModel(spoilt, native=True)
    says(caught, "MambaForCausalLM", "GPT2LMHeadModel", "LlamaForCausalLM")
    pytest.importorskip("transformers")
    with pytest.raises(ModelLoadError) as caught:  # transformers has it, and finds other weights than its own
        LanguageModel(spoilt)
    says(caught, "lacks", "weights of a MambaForCausalLM")


def test_a_directory_without_weights(spoilt: pathlib.Path) -> None:
    (spoilt / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError) as caught:
        LanguageModel(spoilt, dispatch=True)
    says(caught, "safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.99, -1])
def test_truncated_weights(spoilt: pathlib.Path, keep: float) -> None:
    path = spoilt / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelLoadError) as caught:
        LanguageModel(spoilt, dispatch=True)
    says(caught, "model.safetensors")


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x00" * 8, (1 << 62).to_bytes(8, "little")])
def test_corrupt_headers(spoilt: pathlib.Path, header: bytes) -> None:
    path = spoilt / "model.safetensors"
    path.write_bytes(header + path.read_bytes()[8:])
    with pytest.raises(ModelLoadError) as caught:
        LanguageModel(spoilt, dispatch=True)
    says(caught, "model.safetensors")


def test_wrong_missing_and_surplus_tensors(spoilt: pathlib.Path, either: Pair) -> None:
    path = spoilt / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = next(n for n in tensors if n.endswith(("ln_1.weight", "input_layernorm.weight")))

    def opened(changed: dict[str, torch.Tensor]) -> pytest.ExceptionInfo[NnsightError]:
        safetensors.torch.save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ModelLoadError) as caught:
            LanguageModel(spoilt, dispatch=True)
        return caught

    says(opened({k: v for k, v in tensors.items() if k != name}), name, str(either.width))
    says(opened(tensors | {name: torch.ones(5)}), name, "[5]", f"[{either.width}]")
    says(opened(tensors | {"nobody.knows": torch.ones(2, 3)}), "nobody.knows")
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    assert LanguageModel(spoilt, dispatch=True).dispatched


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "None"}}', "cut"])
def test_a_spoilt_tokenizer(text_pair: Pair, tmp_path: pathlib.Path, text: str) -> None:
    directory = pathlib.Path(shutil.copytree(text_pair.directory, tmp_path / "spoilt"))
    path = directory / "tokenizer.json"
    path.write_text(path.read_text()[:900] if text == "cut" else text)
    model = LanguageModel(directory, dispatch=True)
    with pytest.raises(TokenizerError) as caught:
        model.trace("Rome")
    says(caught, "tokenizer.json")
    with model.trace([1, 2]):
        out = model.lm_head.output.save()
    close(out, main(text_pair.run([1, 2]), "lm_head"))


def test_text_without_a_tokenizer_file(gpt2_pair: Pair) -> None:
    with pytest.raises(NnsightError, match="tokenizer") as caught:
        gpt2_pair.model.trace("Rome")
    says(caught, "tokenizer")


def test_a_name_that_is_nowhere(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError) as caught:
        LanguageModel("nobody/has-this", cache_dir=tmp_path)
    says(caught, "nobody/has-this")
    with pytest.raises(ModelLoadError) as caught:
        LanguageModel(tmp_path / "missing")
    says(caught, "missing")
    for wrong in (3, None, torch.nn.Linear(1, 1)):
        with pytest.raises(InputError) as input_error:
            LanguageModel(wrong)  # type: ignore[arg-type]
        says(input_error, type(wrong).__name__)


def test_options_that_cannot_be(either: Pair) -> None:
    for options, said in (
        ({"dtype": "int8"}, "int8"),
        ({"dtype": torch.int64}, "torch.int64"),
        ({"device_map": "nowhere"}, "nowhere"),
        ({"device_map": {"a": "cpu", "b": "meta"}}, "one device"),
        ({"device_map": "meta"}, "meta"),
        ({"tokenizer": 3}, "int"),
    ):
        with pytest.raises((InputError, ModelLoadError)) as caught:
            LanguageModel(either.directory, **options).tokenizer  # type: ignore[arg-type]  # noqa: B018
        says(caught, said)


# ---- what is over ----


def test_a_closed_model(either: Pair) -> None:
    model = LanguageModel(either.directory, dispatch=True)
    model.close()
    model.close()
    with pytest.raises(HandleError, match="closed"), model.trace(either.ids()):
        model.lm_head.output.save()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_says_so(either: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    child = os.fork()
    if child == 0:
        try:
            with either.model.trace(either.ids()):
                either.model.lm_head.output.save()
            os._exit(1)
        except ForkError as e:
            os._exit(0 if "spawn" in str(e) else 2)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, capfd.readouterr().err
