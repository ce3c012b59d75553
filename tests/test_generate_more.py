"""What the user gives a generation to say: streamers, processors, criteria, stop strings; held to transformers."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from nnsight_go import InputError, LanguageModel, _ffi
from references import gpt2, llama, reference, shared
from test_generate import CONFIGS, IDS, RAGGED, Made, blocks, of_the_engine, padded, theirs_generate

__all__ = ["CONFIGS", "gpt2", "llama"]


@pytest.fixture(scope="module", params=[*CONFIGS, "gpt2 hosted"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    name, _, hosted = request.param.partition(" ")
    directory = tmp_path_factory.mktemp(name)
    theirs = reference(CONFIGS[name])
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(directory)
    return LanguageModel(directory, tokenizer=False, native=False if hosted else None), theirs


Real = tuple[LanguageModel, transformers.PreTrainedModel, Any]


@pytest.fixture(scope="module")
def real() -> Real:
    directory = shared("stories260K")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    return LanguageModel(directory), theirs, transformers.AutoTokenizer.from_pretrained(directory)


class Seen(BaseStreamer):
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.given.append((list(value.shape), value.tolist()))

    def end(self) -> None:
        self.given.append("end")


@pytest.mark.parametrize("rows", [[IDS], RAGGED], ids=["one", "ragged"])
def test_streamer(made: Made, rows: list[list[int]]) -> None:
    model, theirs = made
    mine, want = Seen(), Seen()
    with model.generate(rows, max_new_tokens=6, streamer=mine, pad_token_id=0):
        pass
    theirs_generate(theirs, rows, max_new_tokens=6, streamer=want)
    assert mine.given == want.given
    assert len(mine.given) == 8


def test_streamer_sees_each_step_when_it_has_run(made: Made) -> None:
    model, _ = made
    seen, sizes = Seen(), []
    with model.generate(IDS, max_new_tokens=5, streamer=seen) as tracer:
        for _ in tracer.iter[:]:
            sizes.append(len(seen.given))
    assert sizes == [0, 2, 3, 4, 5]
    assert seen.given[-1] == "end"


def test_text_streamer(real: Real, capsys: pytest.CaptureFixture[str]) -> None:
    model, theirs, tokenizer = real
    ids = tokenizer("Once upon a time", return_tensors="pt")
    theirs.generate(
        **ids, max_new_tokens=40, do_sample=False, streamer=transformers.TextStreamer(tokenizer, skip_prompt=True)
    )
    want = capsys.readouterr().out
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    with model.generate("Once upon a time", max_new_tokens=40, streamer=streamer):
        pass
    assert capsys.readouterr().out == want
    assert len(want) > 60


def test_stream(real: Real) -> None:
    model, _, _ = real
    with model.generate("Once upon a time", max_new_tokens=60):
        output = model.generator.output.save()
    whole = model.tokenizer.decode(output[0], skip_special_tokens=True)
    pieces = list(model.stream("Once upon a time", max_new_tokens=60))
    assert "Once upon a time" + "".join(pieces) == whole
    assert len(pieces) > 40


def test_a_stream_that_is_closed_frees_its_generation(real: Real) -> None:
    model, _, _ = real
    list(model.stream("Once", max_new_tokens=2))  # whatever the model keeps is there now
    gc.collect()
    before = _ffi.counters()
    with model.stream("Once upon", max_new_tokens=50) as stream:
        assert next(stream)
        assert _ffi.counters()["handles"] > before["handles"]
    assert _ffi.counters() == before
    assert list(stream) == []
    stream = model.stream("Once upon", max_new_tokens=50)
    next(stream)
    del stream
    gc.collect()
    assert _ffi.counters() == before
    assert "".join(model.stream("Once", max_new_tokens=3))


def test_stream_refused(made: Made, real: Real) -> None:
    with pytest.raises(InputError, match="2 texts cannot be streamed"):
        real[0].stream(["Once", "upon"], max_new_tokens=3)
    with pytest.raises(InputError, match="does not take temprature"):
        real[0].stream("Once", temprature=3)
    with pytest.raises(InputError, match="without a tokenizer"):
        made[0].stream(IDS, max_new_tokens=3)
    with (
        pytest.raises(InputError, match="inside a trace"),
        real[0].generate("Once", max_new_tokens=2),
    ):
        real[0].stream("Once", max_new_tokens=3)


def shift(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Favours a token that depends on those before; in place, as some do."""
    scores[torch.arange(len(ids)), (ids[:, -1] * 7 + ids.shape[1]) % scores.shape[1]] += 6
    return scores


def lessen(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(scores < scores.mean(-1, keepdim=True), -30.0) * 1.5


SETTINGS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"do_sample": True, "temperature": 0.8, "top_k": 7},
    {"do_sample": True, "top_k": 0, "top_p": 0.7, "repetition_penalty": 1.2},
    {"eos_token_id": list(range(0, 61, 3)), "pad_token_id": 60, "min_new_tokens": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: next(iter(s), "greedy"))
def test_processors_and_scores_are_transformers(made: Made, settings: dict[str, Any]) -> None:
    model, theirs = made
    processors = [shift, lessen]
    settings = {"pad_token_id": 0, "max_new_tokens": 12} | settings
    torch.manual_seed(3)
    want: Any = theirs_generate(
        theirs,
        RAGGED,
        logits_processor=transformers.LogitsProcessorList(processors),
        output_scores=True,
        return_dict_in_generate=True,
        **settings,
    )
    torch.manual_seed(3)
    with model.generate(RAGGED, logits_processor=processors, output_scores=True, **settings) as tracer:
        ids = model.generator.output.save()
    assert torch.equal(ids, want.sequences)
    assert len(tracer.scores) == len(want.scores)
    for mine, theirs_one in zip(tracer.scores, want.scores, strict=True):
        torch.testing.assert_close(mine, theirs_one, rtol=1e-4, atol=1e-4)
    with model.generate(RAGGED, **settings):
        plain = model.generator.output.save()
    assert not torch.equal(plain[:, : ids.shape[1]], ids[:, : plain.shape[1]]), "the processors change something"


def test_processors_see_edits_and_compute_aside(made: Made) -> None:
    model, _ = made
    seen = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append((ids.tolist(), scores.argmax(-1).tolist()))
        return scores + torch.rand(()) * 0 + torch.ones_like(scores)

    with model.generate(IDS, max_new_tokens=3, logits_processor=look) as tracer:
        for step in tracer.iter[:]:
            model.lm_head.output[0, -1, 7 + step] = 1e6
        ids = tracer.result.save()
    assert ids[0].tolist() == [*IDS, 7, 8, 9]
    assert seen == [([[*IDS, 7, 8][: 5 + step]], [7 + step]) for step in range(3)]


def test_scores_of_an_edit(made: Made) -> None:
    model, _ = made
    heads = []
    with model.generate(IDS, max_new_tokens=3, output_scores=True) as tracer:
        for _ in tracer.iter[:]:
            blocks(model)[1].output[0][:] *= 0.5
            heads.append(model.lm_head.output)
    for score, head in zip(tracer.scores, heads, strict=True):
        assert torch.equal(score, head[:, -1])
    with (
        pytest.raises(InputError, match="keeps no scores"),
        model.generate(IDS, max_new_tokens=2) as tracer,
    ):
        _ = tracer.scores


def long_or_five(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    return (ids[:, -1] % 5 == 0) | torch.full((len(ids),), ids.shape[1] >= 16)


@pytest.mark.parametrize("eos", [None, [3, 11, 42, 7, 19]], ids=["no-eos", "eos"])
@pytest.mark.parametrize("form", ["tensor", "bool"])
def test_stopping_criteria_are_transformers(made: Made, eos: Any, form: str) -> None:
    model, theirs = made

    def at_nine(ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        return ids.shape[1] >= 9

    criterion: Any = long_or_five if form == "tensor" else at_nine
    settings = {"max_new_tokens": 25, "eos_token_id": eos, "pad_token_id": 60}
    want = theirs_generate(theirs, RAGGED, stopping_criteria=transformers.StoppingCriteriaList([criterion]), **settings)
    with model.generate(RAGGED, stopping_criteria=criterion, **settings):
        ids = model.generator.output.save()
    assert torch.equal(ids, want)
    assert ids.shape[1] < 5 + 25


def test_what_the_users_functions_do_wrong(made: Made) -> None:
    model, _ = made
    of_the_engine(model)

    def run(**given: Any) -> None:
        with model.generate(RAGGED, max_new_tokens=3, **given):
            pass

    def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    gc.collect()
    before = _ffi.counters()
    for given, error, says in [
        ({"logits_processor": fails}, ZeroDivisionError, None),
        ({"logits_processor": lambda ids, scores: None}, InputError, "returned None"),
        ({"logits_processor": lambda ids, scores: scores[:1]}, InputError, r"these scores are \[1 61\]"),
        ({"logits_processor": [3]}, InputError, "has int 3, which cannot be called"),
        ({"stopping_criteria": fails}, ZeroDivisionError, None),
        ({"stopping_criteria": lambda ids, scores: torch.zeros(2, 3)}, InputError, r"a tensor \[2, 3\] for 3"),
        ({"streamer": "x"}, InputError, r"no streamer: it has no put\(\)"),
        ({"stop_strings": "x"}, InputError, "without a tokenizer"),
        ({"stop_strings": [""]}, InputError, "no strings to stop at"),
        ({"num_return_sequences": 3}, InputError, "would all be the same"),
        ({"num_return_sequences": 0}, InputError, "no such number"),
        ({"num_beams": 0}, InputError, "num_beams=0 says nothing"),
        ({"num_beams": 2, "early_stopping": "soon"}, InputError, "early_stopping='soon' says nothing"),
        ({"num_beams": 2, "do_sample": True}, InputError, "a beam search does not sample"),
        ({"num_beams": 2, "num_return_sequences": 3}, InputError, "num_return_sequences is 3, and there are 2 beams"),
        ({"num_beams": 2, "streamer": Seen()}, InputError, "a beam search takes no streamer"),
        ({"num_beams": 2, "stopping_criteria": fails}, InputError, "takes no stopping_criteria and stop_strings"),
    ]:
        with pytest.raises(error, match=says):
            run(**given)
    gc.collect()
    assert _ffi.counters()["handles"] == before["handles"]


@pytest.mark.parametrize(
    "strings", ["little", ["a girl", "She lov"], [".", "zzz"], ["time, t", "upon a time"], "\n", "zzz"], ids=str
)
def test_stop_strings_are_transformers(real: Real, strings: Any) -> None:
    model, theirs, tokenizer = real
    ids = tokenizer("Once upon a time", return_tensors="pt")
    want = theirs.generate(**ids, max_new_tokens=70, do_sample=False, stop_strings=strings, tokenizer=tokenizer)
    with model.generate("Once upon a time", max_new_tokens=70, stop_strings=strings):
        output = model.generator.output.save()
    assert torch.equal(output, want)
    with model.generate("Once upon a time", max_new_tokens=70, stop_strings=strings, tokenizer=tokenizer):
        again = model.generator.output.save()
    assert torch.equal(again, want)
    assert (output.shape[1] < ids["input_ids"].shape[1] + 70) == (strings != "zzz")


def test_stop_strings_end_rows_apart(real: Real) -> None:
    model, theirs, _ = real
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared("stories260K"), padding_side="left")
    prompts = ["Once upon a time", "The dog"]
    rows = [tokenizer(p)["input_ids"] for p in prompts]
    ids, mask = padded(rows)
    settings: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "stop_strings": ["girl", "."]}
    want = theirs.generate(ids, attention_mask=mask, pad_token_id=0, tokenizer=tokenizer, **settings)
    with model.generate(prompts, pad_token_id=0, **settings):
        output = model.generator.output.save()
    assert torch.equal(output, want)


def test_return_sequences_are_transformers(made: Made) -> None:
    model, theirs = made
    settings = {"max_new_tokens": 9, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(2)
    want = theirs_generate(theirs, RAGGED, **settings)
    torch.manual_seed(2)
    with model.generate(RAGGED, pad_token_id=0, **settings) as tracer:
        with tracer.all():
            hidden = blocks(model)[0].output[0].save()
        first = model.lm_head.output.save()
        ids = tracer.result.save()
    assert torch.equal(ids, want)
    assert ids.shape[0] == hidden.shape[0] == first.shape[0] == 9
    assert len({tuple(row) for row in ids[:3].tolist()}) == 3


MANY_ENDS = {"eos_token_id": list(range(0, 61, 4)), "pad_token_id": 60}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 3},
        {"num_beams": 4, **MANY_ENDS},
        {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True, **MANY_ENDS},
        {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0, **MANY_ENDS},
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": -1.0, **MANY_ENDS},
        {"num_beams": 2, "length_penalty": 0.0, "min_new_tokens": 6, **MANY_ENDS},
        {"num_beams": 4, "eos_token_id": 17, "pad_token_id": 0, "num_return_sequences": 4, "length_penalty": 0.2},
        {"num_beams": 3, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, **MANY_ENDS},
        {"num_beams": 3, "logits_processor": [shift, lessen], "num_return_sequences": 3},
    ],
    ids=lambda s: "-".join(k.removeprefix("num_") for k in s if "token_id" not in k),
)
@pytest.mark.parametrize("rows", [[IDS], RAGGED], ids=["one", "ragged"])
def test_beams_are_transformers(made: Made, rows: list[list[int]], settings: dict[str, Any]) -> None:
    model, theirs = made
    settings = {"max_new_tokens": 14, "pad_token_id": 0} | settings
    changed = dict(settings)
    if "logits_processor" in settings:
        changed["logits_processor"] = transformers.LogitsProcessorList(settings["logits_processor"])
    want: Any = theirs_generate(theirs, rows, output_scores=True, return_dict_in_generate=True, **changed)
    with model.generate(rows, output_scores=True, **settings) as tracer:
        ids = model.generator.output.save()
    assert ids.tolist() == want.sequences.tolist()
    assert len(tracer.scores) == len(want.scores)
    for mine, theirs_one in zip(tracer.scores, want.scores, strict=True):
        torch.testing.assert_close(mine, theirs_one, rtol=1e-4, atol=1e-3)


def test_beams_are_rows_of_every_step(made: Made) -> None:
    model, theirs = made

    def halve(module: Any, args: Any, output: Any) -> Any:
        return output * 0.5

    handle = blocks(theirs)[1].register_forward_hook(halve)
    try:
        want = theirs_generate(theirs, RAGGED, max_new_tokens=10, num_beams=3)
    finally:
        handle.remove()
    sizes = []
    with model.generate(RAGGED, max_new_tokens=10, num_beams=3, pad_token_id=0) as tracer:
        for step in tracer.iter[:]:
            hidden = blocks(model)[1].output[0]
            hidden[:] *= 0.5
            sizes.append((tuple(hidden.shape), tuple(model.lm_head.output.shape)))
            assert step == len(sizes) - 1
        ids = tracer.result.save()
    assert sizes == [((9, 5, 48), (9, 1, 61))] + [((9, 1, 48), (9, 1, 61))] * 9
    assert torch.equal(ids, want)
    assert not torch.equal(ids, theirs_generate(theirs, RAGGED, max_new_tokens=10, num_beams=3))


def test_beams_of_a_real_model(real: Real) -> None:
    model, theirs, tokenizer = real
    ids = tokenizer("Once upon a time", return_tensors="pt")
    settings: dict[str, Any] = {"max_new_tokens": 60, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    want = theirs.generate(**ids, **settings)
    with model.generate("Once upon a time", **settings):
        output = model.generator.output.save()
    assert torch.equal(output, want)


@pytest.mark.parametrize("form", ["for", "with"])
@pytest.mark.parametrize("steps", [slice(None), slice(2, 4), slice(1, None, 2)], ids=str)
def test_tokens_of_each_step(made: Made, form: str, steps: slice) -> None:
    model, theirs = made
    seen = Seen()
    theirs_generate(theirs, RAGGED, max_new_tokens=6, streamer=seen)
    want = [ids for _, ids in seen.given[:6]][steps]  # the last of them are drawn and seen by no step
    tokens: list[Any] = []
    with model.generate(RAGGED, max_new_tokens=6, pad_token_id=0) as tracer:
        if form == "for":
            for _ in tracer.iter[steps]:
                tokens.append(model.generator.streamer.output)
        else:
            with tracer.iter[steps]:
                blocks(model)[1].output[0][:] *= 1
                tokens.append(model.generator.streamer.output)
    assert [t.tolist() for t in tokens] == want


def test_tokens_of_a_step_are_a_value(made: Made) -> None:
    model, _ = made
    with model.generate(IDS, max_new_tokens=3) as tracer:
        first = model.generator.streamer.output
        assert first.shape == (1, len(IDS))
        assert int(first[0, 0]) == IDS[0]
        first[0, 0] = 1  # of the tensor, not of the text
        for _ in tracer.iter[1:]:
            last = (model.generator.streamer.output * 1).save()
        output = tracer.result.save()
    assert first[0].tolist() == [1, *IDS[1:]]
    assert last.tolist() == [output[0, -2]]
    assert output[0, : len(IDS)].tolist() == IDS
    with pytest.raises(InputError, match="only inside of a generation"):
        _ = model.generator.streamer.output
