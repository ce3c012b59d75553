"""Packed weights: a model that has been used for long gives what it gave at first, whatever is done to its weights."""

from __future__ import annotations

import gc
import pathlib
from collections.abc import Iterator

import pytest
import torch

from nnsight_go import LanguageModel, _ffi
from references import Pair, close, gpt2, llama, pair

WARM = 60  # traces after which all weights of the small models are packed
IDS = torch.randint(0, 500, (1, 40), generator=torch.Generator().manual_seed(1))  # too many for a weight as it lies
CONFIGS = {  # whose weights are large enough
    "gpt2": gpt2(n_embd=264, n_head=4, vocab_size=500),
    "llama": llama(hidden_size=264, intermediate_size=300, vocab_size=500),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small products on several threads wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits(model: LanguageModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with model.trace(ids):
        out = model.lm_head.output.save()
    return out


def tensors() -> int:
    gc.collect()
    return int(_ffi.counters()["tensors"])


def used(directory: pathlib.Path, **options: object) -> LanguageModel:
    """A model that has packed what it may."""
    model = LanguageModel(directory, tokenizer=False, dispatch=True, **options)  # type: ignore[arg-type]
    for _ in range(WARM):
        logits(model)
    return model


@pytest.fixture(scope="module", params=list(CONFIGS))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(CONFIGS[request.param], tmp_path_factory.mktemp("packed"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_with_and_without(both: Pair, dtype: torch.dtype) -> None:
    packed, plain = used(both.directory, dtype=dtype), used(both.directory, dtype=dtype, prepack=False)
    tolerance = 1e-5 if dtype is torch.float32 else 4e-2
    for rows, tokens in ((1, 1), (1, 2), (1, 8), (1, 9), (1, 31), (3, 11)):
        ids = torch.randint(0, 500, (rows, tokens))
        close(logits(packed, ids), logits(plain, ids), tolerance)
        with torch.inference_mode():
            close(logits(packed, ids).clone(), logits(plain, ids).clone(), tolerance)
    with packed.generate(IDS, max_new_tokens=5, min_new_tokens=5, pad_token_id=0):
        ours = packed.generator.output.save()
    with plain.generate(IDS, max_new_tokens=5, min_new_tokens=5, pad_token_id=0):
        theirs = plain.generator.output.save()
    if dtype is torch.float32:
        assert torch.equal(ours, theirs)


def test_copies_are_made_kept_and_given_back(both: Pair) -> None:
    before = tensors()
    plain = used(both.directory, prepack=False)
    loaded = tensors() - before
    model = used(both.directory)
    weights = sum(p.dim() == 2 and p.numel() >= 1 << 16 for p in both.hf.parameters())
    embeddings = not both.hf.config.tie_word_embeddings  # which no product needs
    assert tensors() - before == 2 * loaded + weights - embeddings
    small = used(both.directory, prepack=1 << 20)
    assert 3 * loaded + weights - embeddings < tensors() - before < 3 * loaded + 2 * weights - embeddings
    del plain, model, small
    assert tensors() == before


def test_weights_in_the_users_hands(both: Pair) -> None:
    """No change of a weight goes unnoticed, not one through ``.data``."""
    packed, plain = used(both.directory), LanguageModel(both.directory, tokenizer=False, prepack=False)
    name = next(n for n, p in packed.named_parameters() if p.dim() == 2 and "mlp" in n)
    for model in (packed, plain):
        dict(model.named_parameters())[name].data.mul_(1.5)
    close(logits(packed), logits(plain), 1e-5)
    for model in (packed, plain):
        with torch.no_grad():
            dict(model.named_parameters())[name].mul_(0.5)
    for _ in range(WARM):
        close(logits(packed), logits(plain), 1e-5)


def test_gradients_go_through_the_weights_themselves(both: Pair) -> None:
    grads = []
    for model in (used(both.directory), used(both.directory, prepack=False)):
        with model.trace(IDS):
            hidden = model.get(both.blocks)[0].output[0]
            hidden.requires_grad_(True)
            model.lm_head.output.square().sum().backward()
            grads.append(hidden.grad.save())
    close(grads[0], grads[1], 3e-5)
