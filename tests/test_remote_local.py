"""Traces that go through the remote protocol, in this process, give what the engine itself gives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import test_gradient_programs
import test_gradients
import test_invokes
import test_programs
import test_verbs
from nnsight_go import GradientError, InputError, LanguageModel, OpError
from nnsight_go.remote import file
from references import Pair, relative, tensor_of

pytestmark = pytest.mark.usefixtures("nothing_stays")

LOCAL = "local"


@pytest.fixture
def remote(either: Pair) -> Iterator[Pair]:
    """Both small models; their traces go through the protocol."""
    either.model._remote = LOCAL
    yield either
    either.model._remote = None


# ---- what other tests compare with transformers ----


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(remote: Pair, seed: int) -> None:
    failure = test_programs.outcome(test_programs.maker(remote).make(seed), remote)
    assert failure is None, failure


@pytest.mark.parametrize("seed", range(25))
def test_random_programs_with_gradients(remote: Pair, seed: int) -> None:
    failure = test_gradient_programs.outcome(test_gradient_programs.made(remote, seed), remote, seed)
    assert failure is None, failure


@pytest.mark.parametrize(
    "test",
    [
        test_gradients.test_the_documented_block,
        test_gradients.test_the_documented_retain_grad,
        test_gradients.test_every_access_point,
        test_gradients.test_gradients_through_edits,
        test_gradients.test_a_value_of_the_users_own,
        test_gradients.test_an_assigned_tensor_from_outside,
        test_gradients.test_a_leaf_from_outside,
        test_gradients.test_hooks,
        test_gradients.test_several_passes,
        test_gradients.test_retained_gradients_add_up,
        test_gradients.test_second_order,
        test_gradients.test_gradients_across_invokes,
        test_gradients.test_an_invoke_of_the_whole_batch,
        test_gradients.test_standing_edits,
        test_invokes.test_two_prompts,
        test_invokes.test_an_edit_in_one_invoke_is_not_seen_by_others,
        test_invokes.test_a_chain_of_invokes_from_the_last_layer_to_the_first,
        test_invokes.test_an_invoke_without_input_sees_the_whole_batch,
        test_invokes.test_the_whole_batch_of_different_lengths_is_padded_on_the_left,
        test_invokes.test_a_forced_value_decides_about_the_next_invoke,
        test_verbs.test_stop_leaves_the_block,
        test_verbs.test_stop_ends_the_invoke_it_stands_in,
        test_verbs.test_skip_in_one_of_several_invokes,
        test_verbs.test_edits_of_a_skipped_module_and_skips_after_a_value,
        test_verbs.test_values_flow_through_a_session,
        test_verbs.test_result_is_what_the_model_gives,
    ],
    ids=lambda test: test.__name__,
)
def test_as_here(remote: Pair, test: Callable[[Pair], None]) -> None:
    test(remote)


# ---- what is compared with the engine itself ----

Outcome = dict[str, Any]


def both(pair: Pair, program: Callable[[Pair, Any], Outcome]) -> None:
    """Runs a program here and through the protocol: values and the state of the generator are the same."""
    found = []
    for where in (None, LOCAL):
        torch.manual_seed(11)
        out = program(pair, where)
        found.append(out | {"random numbers after it": torch.rand(3)})
    here, there = found
    assert here.keys() == there.keys()
    for name, want in here.items():
        equal(there[name], want, name)


def equal(got: Any, want: Any, name: str) -> None:
    """Asserts that two structures of values are the same."""
    assert type(got) is type(want), name
    if isinstance(want, torch.Tensor):
        assert got.shape == want.shape and got.dtype == want.dtype, name
        assert torch.equal(got.isinf(), want.isinf()), name
        assert not want.numel() or relative(got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)) < 1e-5, name
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), name
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            equal(a, b, f"{name}[{i}]")
    else:
        assert got == want, name


def steps_for(pair: Pair, where: Any, **settings: Any) -> Outcome:
    """A generation whose body runs at each step."""
    states = []
    rows = [pair.ids(5), pair.ids(3, seed=2)]
    settings = {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": []} | settings
    with pair.model.generate(rows, remote=where, **settings) as tracer:
        for _ in tracer.iter[:]:
            tensor_of(pair, f"{pair.blocks}.0")[:, -1] *= 0.9
            states.append(tensor_of(pair, f"{pair.blocks}.1").clone())
        tokens = pair.model.generator.output.save()
    out: Outcome = {"states": states, "tokens": tokens}
    if settings.get("output_scores"):
        out["scores"] = tracer.scores
    return out


def steps_with(pair: Pair, where: Any) -> Outcome:
    """A generation whose body is replayed."""
    states: list[Any] = []
    with pair.model.generate(pair.ids(4), max_new_tokens=5, eos_token_id=[], pad_token_id=0, remote=where) as tracer:
        with tracer.all():
            tensor_of(pair, f"{pair.blocks}.1")[:, -1] *= 1.1
            states.append(pair.model.lm_head.output)
        tokens = pair.model.generator.output.save()
    return {"states": states, "tokens": tokens}


def forced_steps(pair: Pair, where: Any) -> Outcome:
    """A generation that needs values, and passes some on."""
    seen, last = [], []
    with pair.model.generate(pair.ids(4), max_new_tokens=4, eos_token_id=[], pad_token_id=0, remote=where) as tracer:
        before = None
        for step in tracer.iter[:]:
            hidden = tensor_of(pair, f"{pair.blocks}.0")
            seen.append(float(hidden.norm()))
            if before is not None:
                hidden[:, -1] += before * 0.5
            before = hidden[:, -1].clone()
            last.append(before)
            if step == 2:
                tracer.stop()
    return {"seen": torch.tensor(seen), "last": last}


def drawing_between(pair: Pair, where: Any) -> Outcome:
    """A generation that samples, of a program that draws as well."""
    noise = []
    with pair.model.generate(
        pair.ids(4), max_new_tokens=5, do_sample=True, eos_token_id=[], pad_token_id=0, remote=where
    ) as tracer:
        for step in tracer.iter[:]:
            if step != 1:
                hidden = tensor_of(pair, f"{pair.blocks}.0")
                noise.append(torch.randn_like(hidden))
                hidden[:] += 0.01 * noise[-1]
        tokens = pair.model.generator.output.save()
    return {"tokens": tokens, "noise": noise}


def processed(pair: Pair, where: Any, **settings: Any) -> Outcome:
    """A generation with functions of the user's."""

    class Streamer:
        def __init__(self) -> None:
            self.got: list[list[int]] = []

        def put(self, tokens: torch.Tensor) -> None:
            self.got.append(tokens.flatten().tolist())

        def end(self) -> None:
            self.got.append([])

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, : ids.shape[1]] = -torch.inf
        return scores + torch.rand_like(scores)

    def stop(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] >= 7, ids.shape[1] >= 9])

    streamer = Streamer()
    out = steps_for(
        pair,
        where,
        max_new_tokens=8,
        logits_processor=[process],
        stopping_criteria=stop,
        streamer=streamer,
        output_scores=True,
        eos_token_id=60,
        **settings,
    )
    return out | {"streamed": streamer.got}


def several_invokes(pair: Pair, where: Any) -> Outcome:
    """A generation of several inputs."""
    tokens = []
    with pair.model.generate(max_new_tokens=3, eos_token_id=[], pad_token_id=0, remote=where) as tracer:
        with tracer.invoke(pair.ids(4)):
            kept = tensor_of(pair, f"{pair.blocks}.1")[:, -1].save()
            tokens.append(tracer.result.save())
        with tracer.invoke(pair.ids(6)):
            tensor_of(pair, f"{pair.blocks}.1")[:, -1] = kept
            tokens.append(tracer.result.save())
    return {"tokens": tokens, "kept": kept}


GENERATIONS: dict[str, Callable[[Pair, Any], Outcome]] = {
    "for": steps_for,
    "with": steps_with,
    "values": forced_steps,
    "sampled": functools.partial(steps_for, do_sample=True, top_k=7, num_return_sequences=2),
    "scores": functools.partial(steps_for, do_sample=True, output_scores=True),
    "ended": functools.partial(steps_for, eos_token_id=[3, 17, 25, 40], max_new_tokens=12),
    "drawing": drawing_between,
    "beams": functools.partial(steps_for, num_beams=3, num_return_sequences=2),
    "processed": processed,
    "processed and sampled": functools.partial(processed, do_sample=True),
    "invokes": several_invokes,
}


@pytest.mark.parametrize("program", GENERATIONS.values(), ids=list(GENERATIONS))
def test_generations(either: Pair, program: Callable[[Pair, Any], Outcome]) -> None:
    both(either, program)


def collected(pair: Pair, where: Any) -> Outcome:
    """Caches, barriers, containers and a stop."""
    with pair.model.trace(remote=where) as tracer:
        barrier = tracer.barrier(2)
        cache = tracer.cache(modules=[f"{pair.blocks}.0", pair.final], include_inputs=True)
        with tracer.invoke(pair.ids(5)):
            kept = {"a": [tensor_of(pair, f"{pair.blocks}.1")[:, -1]]}.save()  # type: ignore[attr-defined]
            barrier()
        with tracer.invoke([pair.ids(3), pair.ids(4)]):
            barrier()
            tensor_of(pair, f"{pair.blocks}.1")[:, -1] = kept["a"][0]
            logits = pair.model.lm_head.output.save()
            tracer.stop()
        with tracer.invoke():
            whole = pair.model.lm_head.output[:, -1].save()
    entries = cache[f"model.{pair.final}"]
    return {
        "kept": kept["a"],
        "logits": logits,
        "whole": whole,
        "cached": [x for e in entries for x in (e.output, e.input)],
    }


def parameters(pair: Pair, where: Any) -> Outcome:
    """Parameters of the model, and tensors from outside of many kinds."""
    outside = pair.model.lm_head.weight
    with pair.model.trace(pair.ids(5), remote=where):
        h = pair.model.get(pair.final).output
        out = {
            "inside": (h @ pair.model.lm_head.weight.T).save(),
            "outside": (h @ outside.T).save(),
            "shape": tuple(pair.model.lm_head.weight.shape),
            "complex": torch.complex(h, h).save(),
            "double complex": torch.complex(h.double(), h.double()).save(),
            "bool": (h > 0).save(),
            "half": h.half().save(),
            "bfloat16": (h * torch.ones(pair.width, dtype=torch.bfloat16)).bfloat16().save(),
            "none": h[:, :0].save(),
            "number": h.sum().save(),
            "large": (h @ torch.linspace(-1, 1, pair.width * 900).view(pair.width, -1)).save(),
            "view": (h @ torch.linspace(-1, 1, pair.width**2).view(pair.width, -1).T).save(),
            "conjugate": (h * torch.full((pair.width,), 1 + 2j).conj()).save(),
            "index": h[:, torch.tensor([1, 0])].save(),
            "scalar": (h * torch.tensor(2.5)).save(),
            "empty": torch.cat([h, torch.ones(1, 0, pair.width)], 1).save(),
        }
    return out


@pytest.mark.parametrize("program", [collected, parameters], ids=lambda p: p.__name__)
def test_traces(either: Pair, program: Callable[[Pair, Any], Outcome]) -> None:
    both(either, program)


def test_sessions(either: Pair) -> None:
    def program(pair: Pair, where: Any) -> Outcome:
        with pair.model.session(remote=where):
            with pair.model.trace(pair.ids(5)):
                h = tensor_of(pair, f"{pair.blocks}.1")[:, -1]
            with pair.model.generate(pair.ids(5), max_new_tokens=3, eos_token_id=[], pad_token_id=0):
                tensor_of(pair, f"{pair.blocks}.1")[:, -1] = h
                tokens = pair.model.generator.output.save()
        return {"h": h, "tokens": tokens}

    both(either, program)


def test_text(text_pair: Pair) -> None:
    def program(pair: Pair, where: Any) -> Outcome:
        return {"text": "".join(pair.model.stream("Rome", max_new_tokens=6, do_sample=True, remote=where))}

    both(text_pair, program)


def test_models_called_at_once(either: Pair) -> None:
    def program(pair: Pair, where: Any) -> Outcome:
        return {"logits": pair.model.trace(pair.ids(), trace=False, remote=where).logits}

    both(either, program)


# ---- errors ----


def test_errors_name_the_users_line(remote: Pair) -> None:
    with pytest.raises(OpError) as caught, remote.model.trace(remote.ids()):
        h = tensor_of(remote, f"{remote.blocks}.0")
        (h @ torch.ones(2, 2)).save()
    assert caught.value.file == __file__ and "ones(2, 2)" in str(caught.value)
    with remote.model.trace(remote.ids()):  # caught in the middle
        h = tensor_of(remote, f"{remote.blocks}.0")
        wrong = h @ torch.ones(2, 2)
        with pytest.raises(OpError):
            float(wrong.sum())
        out = h.mean().save()
    assert out.dim() == 0
    with (
        pytest.raises(OpError) as caught,
        remote.model.generate(remote.ids(), max_new_tokens=3, eos_token_id=[], pad_token_id=0) as tracer,
    ):
        for step in tracer.iter[:]:
            if step == 1:
                (tensor_of(remote, f"{remote.blocks}.0") @ torch.ones(2, 2)).save()
    assert caught.value.step == 1 and caught.value.file == __file__


def test_what_cannot_travel(remote: Pair) -> None:
    with pytest.raises(InputError, match="sparse"), remote.model.trace(remote.ids()):
        h = tensor_of(remote, f"{remote.blocks}.0")
        torch.sparse.mm(torch.eye(h.shape[1]).to_sparse(), h[0]).save()
    for p in remote.model.parameters():
        p.requires_grad_()
    try:
        weight = remote.model.get(remote.final).weight
        with pytest.raises(GradientError, match="keeps its gradient there"), remote.model.trace(remote.ids()):
            (remote.model.get(remote.final).output * weight).sum().backward()
            remote.model.lm_head.output.save()
    finally:
        for p in remote.model.parameters():
            p.requires_grad_(False)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * 2


def test_functions_with_a_backward_of_their_own(remote: Pair) -> None:
    model = remote.model
    with model.trace(remote.ids()):
        h = tensor_of(remote, f"{remote.blocks}.0")
        out = Double.apply(h).save()  # type: ignore[no-untyped-call]
        h = h.save()
    assert torch.equal(out, h * 2)
    with pytest.raises(GradientError, match="no gradient flows through it"), model.trace(remote.ids()):
        h = tensor_of(remote, f"{remote.blocks}.0")
        model.get(f"{remote.blocks}.1").output[0][:] = Double.apply(h)  # type: ignore[no-untyped-call]
        model.lm_head.output.sum().backward()


# ---- files ----


def test_files_are_safetensors(tmp_path: Any) -> None:
    from safetensors.torch import load, save

    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.tensor(True),
        "c": torch.zeros(0, 3),
        "d": torch.arange(7, dtype=torch.int8),
        "e": torch.randn(2, dtype=torch.float64),
        "f": torch.randn(3).bfloat16(),
    }
    theirs = load(file.encode(tensors))
    ours = file.File(bytearray(save(tensors)))
    for name, tensor in tensors.items():
        assert torch.equal(theirs[name], tensor) and torch.equal(ours[name], tensor)
    big = file.File(bytearray(file.encode({"big": torch.ones(1000), "small": torch.ones(10)})))
    assert big["big"].data_ptr() == big["big"].data_ptr(), "it is memory of the file"
    assert big["small"].data_ptr() != big["small"].data_ptr()


def test_nothing_of_the_model_is_mapped() -> None:
    model = LanguageModel("nnsight-go/landmarks")
    with model.scan("a"):
        assert model.lm_head.output.shape[0] == 1
    assert not model.dispatched
