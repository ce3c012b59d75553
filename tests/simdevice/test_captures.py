"""Models on another device than the CPU, and passes that it does again as they were captured.

Run by ``tests/test_device.py``: see ``plugin.py``.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnsight_go import LanguageModel, OpError, _ffi
from references import Pair, close
from simdevice import plugin
from test_programs import COUNT, FROM, maker, outcome

BEFORE = 2  # runs that go before the one that is captured

Written = Callable[[LanguageModel, int], list[torch.Tensor]]


def counts() -> tuple[int, int]:
    """How often the device that is none has captured and replayed so far."""
    return plugin.COUNTERS.sim_captured(), plugin.COUNTERS.sim_replayed()


only_sim = pytest.mark.skipif(plugin.COUNTERS is None, reason="a GPU does not count what it is told")


@pytest.fixture
def captured(gpt2_pair: Pair) -> Any:
    """The same model once more, whose passes are captured."""
    model = LanguageModel(gpt2_pair.directory, cuda_graphs=True)
    yield model
    model._native.close()


def ids(seed: int, rows: int = 1, tokens: int = 7) -> list[list[int]]:
    return torch.randint(1, 61, (rows, tokens), generator=torch.Generator().manual_seed(seed), device="cpu").tolist()


def vector(seed: int) -> torch.Tensor:
    return torch.randn(48, generator=torch.Generator().manual_seed(seed), device="cpu").to(plugin.DEVICE)


def last_logits(model: LanguageModel, i: int) -> list[torch.Tensor]:
    with torch.no_grad(), model.trace(ids(i)):
        out = model.lm_head.output[:, -1].save()
    return [out]


def views(model: LanguageModel, i: int) -> list[torch.Tensor]:
    with model.trace(ids(i)):
        logits = model.lm_head.output.save()
        last = logits[:, -1].save()
        turned = logits.transpose(1, 2).save()
    assert logits.data_ptr() == turned.data_ptr()
    assert last.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    return [logits, last, turned]


def edit(model: LanguageModel, i: int) -> list[torch.Tensor]:
    added = vector(i)
    with model.trace(ids(i)):
        model.transformer.h[1].output[0][:, -2:] += added
        hidden = model.transformer.h[1].output[0].save()
        model.transformer.h[2].mlp.output = model.transformer.h[2].mlp.output * torch.tensor(0.5 + i)
        out = model.output.logits.save()
    return [hidden, out]


def patching(model: LanguageModel, i: int) -> list[torch.Tensor]:
    found = []
    with model.trace() as tracer:
        with tracer.invoke(ids(i)):
            clean = model.transformer.h[1].output[0][:, 3]
            found.append(model.lm_head.output[:, -1].save())
        for position in (2, 4, 6):
            with tracer.invoke([*ids(i)[0][:4], *(t % 60 + 1 for t in ids(i)[0][4:])]):
                model.transformer.h[1].output[0][:, position] = clean
                found.append(model.lm_head.output[:, -1].save())
    return found


def padded(model: LanguageModel, i: int) -> list[torch.Tensor]:
    with model.trace([ids(i)[0], ids(50 + i, tokens=4)[0]]):
        hidden = model.transformer.h[0].output[0].save()
        out = model.lm_head.output.save()
    return [hidden, out]


def weights(model: LanguageModel, i: int) -> list[torch.Tensor]:
    given = vector(i)
    with model.trace(ids(i)):
        head = model.lm_head.weight[:5].save()
        out = (model.transformer.ln_f.output @ model.transformer.wte.weight.T).save()
        same = (given + 0).save()
    assert head.data_ptr() == model.lm_head.weight.data_ptr()
    return [out, same]


def zeroed(model: LanguageModel, i: int) -> list[torch.Tensor]:
    with model.trace(ids(i)):
        model.transformer.h[0].output[0][:, -1] = 0
        model.transformer.h[1].mlp.output[model.transformer.h[1].mlp.output > 1] = 0
        model.transformer.h[1].output[0][:, :2, 3:5] = 1.5
        model.transformer.h[2].attn.c_proj.input[..., :16].zero_()
        out = model.lm_head.output.save()
    return [out]


def numbers(model: LanguageModel, i: int) -> list[torch.Tensor]:
    factor = torch.tensor(1.5, device="cpu", dtype=torch.float64)
    with model.trace(ids(i)):
        model.transformer.h[0].output[0][:] *= factor
        out = model.lm_head.output.save()
        same = (factor * 2).save()
    assert same == 3
    return [out, same]


def structures(model: LanguageModel, i: int) -> list[torch.Tensor]:
    with torch.inference_mode(), model.trace(ids(i)):
        parts = model.transformer.h[0].output[0].chunk(2, -1)
        top = model.lm_head.output.topk(3).save()
        tokens = model.transformer.wte.input.save()
        both = [parts[1].save(), parts[0].save()]
    assert tokens.is_inference() or not tokens.is_floating_point()
    return [top[0], top[1], tokens, *both]


@pytest.mark.parametrize("trace", [last_logits, views, edit, patching, padded, weights, zeroed, numbers, structures])
def test_a_loop_of_traces(trace: Written, gpt2_pair: Pair, captured: LanguageModel) -> None:
    got = []
    captures, replays = counts() if plugin.COUNTERS else (0, 0)
    for i in range(BEFORE + 4):
        want = trace(gpt2_pair.model, i)
        got.append((want, trace(captured, i)))
    for want, found in got:  # those of earlier traces are still what they were
        assert len(want) == len(found)
        for one, other in zip(want, found, strict=True):
            assert one.device == other.device and one.stride() == other.stride()
            close(other, one, 1e-5)
    assert _ffi.counters()["captures"] == 1
    if plugin.COUNTERS:
        assert counts() == (captures + 1, replays + 4)


def in_the_middle(model: LanguageModel, i: int) -> list[torch.Tensor]:
    with model.trace(ids(i)):
        if model.transformer.h[0].output[0].sum().item() > i:
            model.transformer.h[1].output[0][:] *= 2
        out = model.lm_head.output.save()
    return [out]


def gradients(model: LanguageModel, i: int) -> list[torch.Tensor]:
    with model.trace(ids(i)):
        hidden = model.transformer.h[0].output[0]
        out = model.lm_head.output[:, -1].logsumexp(-1).sum()
        with out.backward():
            grad = hidden.grad.save()
    return [grad]


def listed(model: LanguageModel, i: int) -> list[torch.Tensor]:
    with model.trace(ids(i)):
        model.transformer.h[1].output[0][:, [1, 3]] = 0  # numbers that come from the CPU
        out = model.lm_head.output.save()
    return [out]


def on_the_cpu(model: LanguageModel, i: int) -> list[torch.Tensor]:
    with model.trace(ids(i)):
        out = model.lm_head.output.cpu().save()
    return [out]


def of_the_cpu(model: LanguageModel, i: int) -> list[torch.Tensor]:
    chosen = torch.tensor([i, 5, 7], device="cpu")
    with model.trace(ids(i)):
        out = model.lm_head.output[:, -1, chosen].save()
    return [out]


def changed(model: LanguageModel, i: int) -> list[torch.Tensor]:
    total = vector(i)
    with model.trace(ids(i)):
        total += model.transformer.h[0].output[0][0, -1]
        out = model.lm_head.output.save()
    return [out, total]


def other_numbers(model: LanguageModel, i: int) -> list[torch.Tensor]:
    factor = torch.tensor(1.5 + i, device="cpu")
    with model.trace(ids(i)):
        model.transformer.h[0].output[0][:] *= factor
        out = model.lm_head.output.save()
    return [out]


def cast(model: LanguageModel, i: int) -> list[torch.Tensor]:
    with torch.autocast(plugin.DEVICE, torch.bfloat16), model.trace(ids(i)):
        out = (model.transformer.h[0].output[0] @ torch.eye(48)).save()
    return [out]


def generation(model: LanguageModel, i: int) -> list[torch.Tensor]:
    with model.generate(ids(i), max_new_tokens=4, do_sample=False) as tracer:
        out = tracer.result.save()
    return [out]


@pytest.mark.parametrize(
    "trace", [in_the_middle, gradients, listed, on_the_cpu, of_the_cpu, changed, other_numbers, cast, generation]
)
def test_what_cannot_be_captured(trace: Written, gpt2_pair: Pair, captured: LanguageModel) -> None:
    """Such traces run as they do elsewhere."""
    replays = counts()[1] if plugin.COUNTERS else 0
    for i in range(BEFORE + 3):
        for one, other in zip(trace(gpt2_pair.model, i), trace(captured, i), strict=True):
            assert one.device == other.device
            close(other, one, 1e-5)
    if plugin.COUNTERS:
        assert counts()[1] == replays + (trace is other_numbers)  # the one that was captured


def test_what_becomes_of_results(gpt2_pair: Pair, captured: LanguageModel) -> None:
    for i in range(BEFORE + 4):
        found = views(captured, i)
        for one, want in zip(found, views(gpt2_pair.model, i), strict=True):
            close(one, want, 1e-5)
        for one in found:
            one.zero_().unsqueeze_(0)
        with captured.trace(ids(i)):
            tied = captured.transformer.wte.weight.save()
            tied_row = captured.transformer.wte.weight[0].save()
            captured.lm_head.output.save()
        assert tied_row.shape == (48,)
        tied_row.unsqueeze_(0)
        assert tied.data_ptr() == captured.transformer.wte.weight.data_ptr()


def test_another_stream(gpt2_pair: Pair, captured: LanguageModel) -> None:
    """A pass belongs to the stream that waits for it."""
    for i in range(BEFORE + 2):
        last_logits(captured, i)
    replays = counts()[1] if plugin.COUNTERS else 0
    outer = torch.accelerator.current_stream()
    torch.accelerator.set_stream(torch.Stream(plugin.DEVICE))
    try:
        found = last_logits(captured, 9)[0]
    finally:
        torch.accelerator.set_stream(outer)
    torch.accelerator.synchronize()
    close(found, last_logits(gpt2_pair.model, 9)[0], 1e-5)
    assert not plugin.COUNTERS or counts()[1] == replays


def test_weights_that_change(gpt2_pair: Pair, captured: LanguageModel) -> None:
    for i in range(BEFORE + 2):
        last_logits(captured, i)
    want = last_logits(captured, 5)[0]
    square = captured.transformer.h[1].attn.c_proj.weight
    square.data = square.data.T
    turned = last_logits(captured, 5)[0]
    assert not torch.allclose(turned, want)
    square.data = square.data.T
    for _ in range(BEFORE + 2):
        close(last_logits(captured, 5)[0], want, 1e-5)
    norm = captured.transformer.ln_f
    with torch.no_grad():
        for weight in (norm.weight, norm.bias):
            weight.mul_(2)
    close(last_logits(captured, 5)[0], want * 2, 1e-5)
    old = norm.weight.data, norm.bias.data
    for factor in (2, 0.5):
        norm.weight.data, norm.bias.data = old[0] * factor, old[1] * factor
        for _ in range(BEFORE + 3):
            close(last_logits(captured, 5)[0], want * 2 * factor, 1e-5)


def test_constants_of_other_sizes(gpt2_pair: Pair, captured: LanguageModel) -> None:
    """The lines are the same, and so is the recording."""

    def trace(model: LanguageModel, added: torch.Tensor) -> torch.Tensor:
        with model.trace(ids(0)):
            model.transformer.h[1].output[0][:] += added
            out = model.lm_head.output.save()
        return out

    for i in range(BEFORE + 3):
        added = vector(i) if i != BEFORE + 1 else vector(i).double().expand(7, 48)
        close(trace(captured, added), trace(gpt2_pair.model, added), 1e-5)


@only_sim
def test_memory_is_bounded_and_given_back(gpt2_pair: Pair) -> None:
    def rounds(model: LanguageModel, times: int) -> int:
        for i in range(times):
            for tokens in range(3, 8):
                with model.trace(ids(i, tokens=tokens)):
                    out = model.lm_head.output.save()
                del out
        return plugin.COUNTERS.sim_alive()

    before, handles = plugin.COUNTERS.sim_alive(), _ffi.counters()
    model = LanguageModel(gpt2_pair.directory, cuda_graphs=2)
    held = rounds(model, BEFORE + 2)
    assert rounds(model, 10) <= held
    captures, replays = counts()
    for i in range(4):
        last_logits(model, i)
    assert counts() == (captures + 1, replays + 2)
    model._native.close()
    del model
    assert plugin.COUNTERS.sim_alive() == before
    assert _ffi.counters() == handles


def test_threads(gpt2_pair: Pair, captured: LanguageModel) -> None:
    want = [edit(gpt2_pair.model, i) for i in range(10)]
    wrong: list[Any] = []

    def work() -> None:
        torch.set_default_device(plugin.DEVICE)  # a thread has its own
        for i in range(10):
            try:
                for one, other in zip(want[i], edit(captured, i), strict=True):
                    close(other, one, 1e-5)
            except BaseException as e:
                wrong.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong, wrong


def test_errors_stay_as_they_are(captured: LanguageModel) -> None:
    for i in range(BEFORE + 2):
        with pytest.raises(OpError, match="size") as e, captured.trace(ids(i)):
            model_out = captured.transformer.h[1].output[0] @ vector(0)[:5]
            model_out.save()
        assert "vector(0)[:5]" in str(e.value)
    last_logits(captured, 0)


@pytest.mark.slow
def test_random_programs(gpt2_pair: Pair) -> None:
    """Each done until it is captured, and once more."""
    model = LanguageModel(gpt2_pair.directory, cuda_graphs=True)
    own = dataclasses.replace(gpt2_pair, model=model)
    replays = counts()[1] if plugin.COUNTERS else 1
    for seed in range(FROM, FROM + COUNT // 3):
        program = maker(own).make(seed)
        for _ in range(BEFORE + 2):
            assert outcome(program, own) is None, seed
    assert not plugin.COUNTERS or counts()[1] > replays
    model._native.close()
