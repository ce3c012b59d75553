"""Generation with every step open, held to transformers' generate and to its cached forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

from nnsight_go import InputError, LanguageModel, NNsight, NotSavedError, OutOfOrderError, StepLoopError
from references import close, gpt2, llama, reference, shared

CONFIGS = {"gpt2": gpt2(n_positions=256), "llama": llama()}
IDS = [3, 1, 4, 1, 5]
RAGGED = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]

Made = tuple[LanguageModel, transformers.PreTrainedModel]
Edit = Callable[[int, torch.Tensor], None]


@pytest.fixture(scope="module", params=[*CONFIGS, "gpt2 hosted"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    name, _, hosted = request.param.partition(" ")
    directory = tmp_path_factory.mktemp(name)
    theirs = reference(CONFIGS[name])
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(directory)
    return LanguageModel(directory, tokenizer=False, native=False if hosted else None), theirs


def of_the_engine(model: LanguageModel) -> None:
    """Skips what transformers' own loop does otherwise."""
    if isinstance(model, NNsight):
        pytest.skip("says what the engine's own generation does")


def blocks(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def padded(rows: list[list[int]], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def theirs_generate(theirs: transformers.PreTrainedModel, rows: list[list[int]], **settings: Any) -> torch.Tensor:
    settings = {"do_sample": False, "pad_token_id": 0} | settings
    ids, mask = padded(rows, settings["pad_token_id"] or 0)
    return theirs.generate(ids, attention_mask=mask, **settings)  # type: ignore[no-any-return,operator]


def steps_of(
    theirs: transformers.PreTrainedModel, rows: list[list[int]], steps: int, edit: Edit | None = None
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Each step of a greedy loop with transformers' cache: hidden states of every block, and logits."""
    ids, mask = padded(rows)
    cache = transformers.DynamicCache(config=theirs.config)
    seen: list[torch.Tensor] = []
    at = [0]

    def hook(module: Any, args: Any, output: Any) -> Any:
        if edit is not None and len(seen) == 1:
            output = output.clone()
            edit(at[0], output)
        seen.append(output)
        return output

    handles = [block.register_forward_hook(hook) for block in blocks(theirs)]
    try:
        new = ids
        for step in range(steps):
            at[0] = step
            seen.clear()
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :]
            with torch.no_grad():
                logits = theirs(new, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1:]
            yield list(seen), logits
            new = logits.argmax(-1)
            mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("rows", [[IDS], [[7]], [IDS, IDS[::-1]], RAGGED], ids=["one", "token", "batch", "ragged"])
def test_greedy_is_transformers(made: Made, rows: list[list[int]]) -> None:
    model, theirs = made
    with model.generate(rows, max_new_tokens=60):
        ids = model.generator.output.save()
    assert torch.equal(ids, theirs_generate(theirs, rows, max_new_tokens=60))


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": [5, 17, 30, 44], "min_new_tokens": 6},
        {"eos_token_id": list(range(0, 61, 3)), "pad_token_id": 60},
        {"max_length": 17},
    ],
    ids=lambda s: next(iter(s)),
)
def test_settings_are_transformers(made: Made, settings: dict[str, Any]) -> None:
    model, theirs = made
    length = {} if "max_length" in settings else {"max_new_tokens": 20}
    with model.generate(RAGGED, **({"pad_token_id": 0} | settings | length)):
        ids = model.generator.output.save()
    assert ids.tolist() == theirs_generate(theirs, RAGGED, **(settings | length)).tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 0, "min_p": 0.1},
        {"top_k": 0, "typical_p": 0.6},
        {"temperature": 1.4, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.2},
    ],
    ids=lambda s: "-".join(s) or "plain",
)
def test_samples_are_transformers_under_a_seed(made: Made, settings: dict[str, Any]) -> None:
    model, theirs = made
    torch.manual_seed(5)
    want = theirs_generate(theirs, RAGGED, max_new_tokens=12, do_sample=True, **settings)
    for _ in range(2):
        torch.manual_seed(5)
        with model.generate(RAGGED, max_new_tokens=12, do_sample=True, pad_token_id=0, **settings):
            ids = model.generator.output.save()
        assert torch.equal(ids, want)


def test_samples_follow_the_distribution(made: Made) -> None:
    model, theirs = made
    with torch.no_grad():
        p = (theirs(torch.tensor([IDS])).logits[0, -1] / 1.5).softmax(-1)
    torch.manual_seed(0)
    with model.generate([IDS] * 4000, max_new_tokens=1, do_sample=True, temperature=1.5, top_k=0, pad_token_id=0):
        ids = model.generator.output.save()
    counts = torch.bincount(ids[:, -1], minlength=len(p)).double()
    expected = 4000 * p.double()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    chi2 = float(((observed - expected) ** 2 / expected.clamp_min(1e-9)).sum())
    freedom = len(observed) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5  # five standard deviations; the seed is fixed


@pytest.mark.parametrize("rows", [[IDS], RAGGED], ids=["one", "ragged"])
def test_every_step_is_transformers(made: Made, rows: list[list[int]]) -> None:
    model, theirs = made
    got: list[tuple[list[torch.Tensor], torch.Tensor]] = []
    with model.generate(rows, max_new_tokens=8) as tracer:
        for step in tracer.iter[:]:
            hidden = [block.output[0].save() for block in blocks(model)]
            logits = model.lm_head.output.save()
            assert logits.shape == (len(rows), 1, 61)
            assert hidden[0].shape[1] == (1 if step else max(map(len, rows)))
            got.append((hidden, logits))
    assert len(got) == 8
    real = padded(rows)[1].bool()
    for step, (hidden, logits) in enumerate(steps_of(theirs, rows, 8)):
        for mine, want in zip(got[step][0], hidden, strict=True):
            close(mine[real] if step == 0 else mine, want[real] if step == 0 else want)
        close(got[step][1], logits)


def test_edits_of_a_step_stay_in_the_cache(made: Made) -> None:
    model, theirs = made

    def edit(step: int, hidden: torch.Tensor) -> None:
        if step in (0, 3):
            hidden[:, -1] *= 0.2

    want = [logits for _, logits in steps_of(theirs, RAGGED, 8, edit)]
    by_for: list[torch.Tensor] = []
    with model.generate(RAGGED, max_new_tokens=8) as tracer:
        for step in tracer.iter[:]:
            edit(step, blocks(model)[1].output[0])
            by_for.append(model.lm_head.output)
    with model.generate(RAGGED, max_new_tokens=8) as tracer:
        by_with = [].save()
        with tracer.iter[[0, 3]]:
            blocks(model)[1].output[0][:, -1] *= 0.2
        with tracer.all():
            by_with.append(model.lm_head.output)
    plain = [logits for _, logits in steps_of(theirs, RAGGED, 8)]
    assert len(by_for) == len(by_with) == 8
    for step in range(8):
        close(by_for[step], want[step])
        close(by_with[step], want[step])
    assert (want[5] - plain[5]).abs().max() > 1e-3


def test_an_edit_of_the_logits_chooses_the_token(made: Made) -> None:
    model, _ = made
    with model.generate([IDS, IDS], max_new_tokens=4) as tracer:
        for step in tracer.iter[:]:
            model.lm_head.output[0, -1, 7 + step] = 1e6
        ids = model.generator.output.save()
    assert ids[0, -4:].tolist() == [7, 8, 9, 10]
    assert ids[1, -4:].tolist() != [7, 8, 9, 10]


@pytest.mark.parametrize(
    ("which", "steps"),
    [
        (slice(2, 5), [2, 3, 4]),
        (slice(None), list(range(6))),
        (3, [3]),
        ([0, 2], [0, 2]),
        (slice(None, None, 2), [0, 2, 4]),
        (-1, [5]),
        (slice(-3, None), [3, 4, 5]),
        ([1, 40], [1]),
    ],
    ids=str,
)
def test_selections(made: Made, which: Any, steps: list[int]) -> None:
    model, _ = made
    seen = []
    with model.generate(IDS, max_new_tokens=6) as tracer:
        for step in tracer.iter[which]:
            seen.append(step)
            blocks(model)[2].output[0][:] = 0
        zero = [].save()
        ids = tracer.result.save()
    assert seen == steps
    with model.generate(IDS, max_new_tokens=6) as tracer:
        zero = [].save()
        with tracer.iter[which]:
            blocks(model)[2].output[0][:] = 0
        with tracer.all():
            zero.append(blocks(model)[2].output[0])
        again = tracer.result.save()
    assert [i for i, h in enumerate(zero) if not h.any()] == steps
    assert torch.equal(ids, again)


def test_counters_dicts_and_conditions(made: Made) -> None:
    model, _ = made
    norms: dict[int, torch.Tensor] = {}
    count = 0
    with model.generate(IDS, max_new_tokens=5) as tracer:
        before = None
        for step in tracer.iter[:]:
            h = blocks(model)[0].output[0][:, -1]
            count += 1
            if before is not None and h.norm() > before.norm():
                norms[step] = h.norm()
            before = h
    assert count == 5
    assert all(isinstance(n, torch.Tensor) for n in norms.values())


def test_documented_lines(made: Made) -> None:
    model, _ = made
    with model.generate(IDS, max_new_tokens=6) as tracer:
        hidden_states = list().save()  # noqa: C408  (the documented line)
        with tracer.all():
            blocks(model)[1].output[0][:, -1, :] *= 0.9
            hidden_states.append(blocks(model)[-1].output)
        last = model.generator.output.save()
    assert len(hidden_states) == 6
    assert all(isinstance(item, tuple) and type(item[0]) is torch.Tensor for item in hidden_states)
    assert last.shape == (1, 11)


def test_names_of_a_replayed_body_are_the_last_step(made: Made) -> None:
    model, _ = made
    each = []
    with model.generate(IDS, max_new_tokens=4) as tracer:
        for _ in tracer.iter[:]:
            each.append(model.lm_head.output)
    with model.generate(IDS, max_new_tokens=4) as tracer, tracer.all():
        kept = model.lm_head.output.save()
    close(kept, each[-1])


def test_values_go_from_step_to_step(made: Made) -> None:
    model, _ = made
    with model.generate(IDS, max_new_tokens=4) as tracer:
        first = blocks(model)[0].output[0][:, -1:]
        with tracer.iter[1:]:
            blocks(model)[0].output[0][:] = first
        states = [].save()
        with tracer.all():
            states.append(blocks(model)[0].output[0])
    for state in states[1:]:
        assert torch.equal(state, states[0][:, -1:])


def test_steps_that_never_come(made: Made) -> None:
    model, _ = made
    with model.generate(IDS, max_new_tokens=8):
        free = model.generator.output.save()
    end = int(free[0, len(IDS) + 2])
    first = free[0, len(IDS) :].tolist().index(end)
    kept, seen = [], []
    with model.generate(IDS, max_new_tokens=8, eos_token_id=end) as tracer:
        with tracer.iter[first + 3 :]:
            kept.append(model.lm_head.output)
        for step in tracer.iter[:]:
            seen.append(step)
        ids = tracer.result.save()
        after = True
    assert kept == []
    assert seen == list(range(first + 1))
    assert after
    assert ids.shape[1] == len(IDS) + first + 1


def test_what_a_replay_cannot_do(made: Made) -> None:
    model, _ = made

    def forced(tracer: Any) -> None:
        with tracer.all():
            print(float(model.lm_head.output.max()))

    def carried(tracer: Any) -> None:
        total = torch.zeros(())
        with tracer.all():
            total = total + model.lm_head.output.max()

    def counted(tracer: Any) -> None:
        count = 0
        with tracer.all():
            model.lm_head.output.save()
            count += 1

    def filled(tracer: Any) -> None:
        found = {}
        with tracer.all():
            found["x"] = model.lm_head.output

    for program in (forced, carried, counted, filled):
        with (
            pytest.raises(StepLoopError, match="recorded once for all its steps") as error,
            model.generate(IDS, max_new_tokens=3) as tracer,
        ):
            program(tracer)
        assert "for step in tracer.iter" in (error.value.hint or "")
    with model.generate(IDS, max_new_tokens=3) as tracer:
        i = block = None
        with tracer.all():
            for i, block in enumerate(blocks(model)):  # bound before they are used: nothing is carried
                block.output[0][:] += i
    assert i == 2
    assert block is not None


def test_stop(made: Made) -> None:
    model, _ = made
    seen = []
    with model.generate(IDS, max_new_tokens=8) as tracer:
        ids = tracer.result.save()
        for step in tracer.iter[:]:
            seen.append(blocks(model)[0].output[0])
            if step == 2:
                tracer.stop()
    assert len(seen) == 3
    assert type(seen[-1]) is torch.Tensor
    assert ids.shape == (1, len(IDS) + 3)


def test_tokens_inside_the_block(made: Made) -> None:
    model, _ = made
    with model.generate(IDS, max_new_tokens=3) as tracer:
        output = model.generator.output
        assert output.shape == (1, len(IDS) + 3)
        with pytest.raises(OutOfOrderError, match="has run"):
            _ = model.lm_head.output
        unsaved = tracer.result
    with pytest.raises(NotSavedError, match="tokens of this generation were not saved"):
        _ = unsaved + 1


def test_refused(made: Made) -> None:
    model, _ = made
    of_the_engine(model)
    context = model._native.description["context"]
    much = pytest.raises(InputError, match=f"the model's context holds {context}")
    with much, model.generate(IDS, max_new_tokens=context):
        model.generator.output.save()
    with pytest.raises(InputError, match="does not take temprature"):
        model.generate(IDS, temprature=1)
    with pytest.raises(InputError, match="0 new tokens"):
        model.generate(IDS, max_new_tokens=0)
    with pytest.raises(InputError, match="top_p is 3"), model.generate(IDS, max_new_tokens=2, top_p=3.0):
        model.generator.output.save()
    with pytest.raises(InputError, match="names no steps"), model.generate(IDS, max_new_tokens=2) as tracer:
        tracer.iter["a"]
    with pytest.raises(InputError, match="only inside of a generation"):
        _ = model.generator.output


def test_real_models_write_what_transformers_writes() -> None:
    directory = shared("stories260K")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    model = LanguageModel(directory)
    with model.generate("Once upon a time", max_new_tokens=200):
        output = model.generator.output.save()
    ids = torch.tensor([model.tokenizer.encode("Once upon a time")])
    want = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False)
    assert torch.equal(output, want)
    assert model.tokenizer.decode(output[0]).startswith("<s> Once upon a time, there was a little girl")


def test_real_names() -> None:
    directory = shared("makemore-names")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    model = LanguageModel(directory)
    rows = [[1, 5, 9], [3], [2, 4]]
    with model.generate(rows, max_new_tokens=12, do_sample=False):
        output = model.generator.output.save()
    assert torch.equal(output, theirs_generate(theirs, rows, max_new_tokens=12, pad_token_id=None))
