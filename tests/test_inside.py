"""Values inside modules: queries, keys, values, scores, pattern and output of each head; every operator's result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from nnsight_go import LanguageModel, ModulePathError
from nnsight_go.inside import HEADS
from references import close, gpt2, llama, reference, relative

CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "gpt2": gpt2(),
    "gpt2-scaled": gpt2(scale_attn_by_inverse_layer_idx=True),
    "llama": llama(),
    "llama-wide": llama(num_attention_heads=2, num_key_value_heads=1, head_dim=260),
}
IDS, SHORT = [3, 1, 4, 1, 5, 9], [2, 7, 1]

Made = tuple[LanguageModel, transformers.PreTrainedModel]


@pytest.fixture(scope="module", params=list(CONFIGS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model and transformers' own with attention step by step, whose patterns can be had."""
    directory = tmp_path_factory.mktemp(request.param)
    reference(CONFIGS[request.param]).save_pretrained(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    return LanguageModel(directory, tokenizer=False), theirs


def attention(model: Any, layer: int) -> Any:
    return model.transformer.h[layer].attn if hasattr(model, "transformer") else model.model.layers[layer].self_attn


def projection(model: Any, layer: int) -> Any:
    own = attention(model, layer)
    return own.c_proj if hasattr(model, "transformer") else own.o_proj


def patterns(theirs: transformers.PreTrainedModel, ids: list[int]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return theirs(torch.tensor([ids]), output_attentions=True).attentions  # type: ignore[no-any-return]


def test_the_pattern_is_transformers(made: Made) -> None:
    model, theirs = made
    with model.trace(IDS):
        ours = [attention(model, i).heads.pattern.output.save() for i in range(3)]
        logits = model.lm_head.output.save()
    for got, want in zip(ours, patterns(theirs, IDS), strict=True):
        assert got.shape == want.shape
        close(got, want)
    close(logits, theirs(torch.tensor([IDS])).logits.detach())


def test_the_steps_fit_together(made: Made) -> None:
    model, _ = made
    with model.trace(IDS):
        heads = attention(model, 1).heads
        q, k, v, scores, pattern, z = (getattr(heads, name).output.save() for name in HEADS)
        into = projection(model, 1).input.save()
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    raw = q @ k.transpose(-1, -2)
    seen = torch.ones(len(IDS), len(IDS)).tril().bool()
    assert torch.isneginf(scores[:, :, ~seen]).all()
    ratio = (scores / raw)[:, :, seen]  # one scale for all
    close(ratio, ratio.median().expand_as(ratio), 1e-3)
    close(pattern, scores.softmax(-1))
    close(z, pattern @ v)
    close(into, z.transpose(1, 2).flatten(2))


def test_fused_and_step_by_step_agree(made: Made) -> None:
    model, _ = made
    with model.trace(IDS):
        fused = [getattr(attention(model, 2).heads, name).output.save() for name in "qkvz"]
        operator = attention(model, 2).source.scaled_dot_product_attention_0.output.save()
    with model.trace(IDS):
        steps = [getattr(attention(model, 2).heads, name).output.save() for name in "qkvz"]
        attention(model, 2).heads.pattern.output.save()
    for one, other in zip(fused, steps, strict=True):
        close(one, other)
    assert torch.equal(operator, fused[-1])


def test_a_head_set_to_zero(made: Made) -> None:
    model, theirs = made
    with model.trace(IDS):
        attention(model, 1).heads.z.output[:, 1] = 0
        logits = model.lm_head.output.save()
    with model.trace(IDS):
        attention(model, 1).heads.pattern.output[:, 1] = 0
        by_pattern = model.lm_head.output.save()
    width = attention(theirs, 1).head_dim

    def silence(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        out = args[0].clone()
        out[..., width : 2 * width] = 0
        return (out,)

    handle = projection(theirs, 1).register_forward_pre_hook(silence)
    with torch.no_grad():
        want = theirs(torch.tensor([IDS])).logits
    handle.remove()
    close(logits, want)
    close(by_pattern, want)
    assert relative(logits, theirs(torch.tensor([IDS])).logits.detach()) > 1e-3


def test_a_pattern_of_ones_own(made: Made) -> None:
    model, _ = made
    with model.trace(IDS):
        heads = attention(model, 0).heads
        heads.pattern.output = torch.eye(len(IDS)).expand_as(heads.pattern.output).clone()
        z, v = heads.z.output.save(), heads.v.output.save()
    close(z, v.repeat_interleave(z.shape[1] // v.shape[1], 1))


def test_scores_before_the_softmax(made: Made) -> None:
    model, _ = made
    with model.trace(IDS):
        heads = attention(model, 0).heads
        heads.scores.output[..., 0] = float("-inf")
        heads.scores.output[..., 0, 0] = 0  # the first has nothing else to look at
        pattern = heads.pattern.output.save()
    assert (pattern[:, :, 1:, 0] == 0).all()
    close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))


def test_each_invoke_sees_its_own(made: Made) -> None:
    model, theirs = made
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            attention(model, 1).heads.pattern.output[:] = 0
        with tracer.invoke(SHORT):
            first = attention(model, 1).heads.pattern.output.save()
        with tracer.invoke([IDS, SHORT]):
            both = attention(model, 1).heads.pattern.output.save()
    short, long = patterns(theirs, SHORT)[1], patterns(theirs, IDS)[1]
    assert first.shape == short.shape
    close(first, short)
    close(both[:1], long)
    close(both[1:, :, 3:, 3:], short)  # padded on the left


def test_a_pattern_after_a_value_was_needed(made: Made) -> None:
    model, theirs = made
    with model.trace(IDS):
        h = attention(model, 0).output[0]
        assert h.abs().sum().item() > 0  # so far attention is one operator
        pattern = attention(model, 1).heads.pattern.output.save()
        kept = h.save()
    close(pattern, patterns(theirs, IDS)[1])
    with model.trace(IDS):
        want = attention(model, 0).output[0].save()
    close(kept, want)


def test_what_the_other_way_of_computing_lacks(made: Made) -> None:
    model, _ = made
    with pytest.raises(ModulePathError, match="done step by step") as error, model.trace(IDS):
        attention(model, 1).heads.pattern.output.save()
        attention(model, 1).source.scaled_dot_product_attention_0.output.save()
    assert error.value.hint is not None
    assert "heads.z" in error.value.hint


def test_every_operator_can_be_read(made: Made) -> None:
    model, _ = made
    values, sizes = {}, {}
    with model.trace() as tracer:
        for ids in (IDS, SHORT):
            with tracer.invoke(ids):
                for path, module in model.named_modules():
                    for name in module.source:
                        value = getattr(module.source, name).output
                        sizes[len(ids), path, name] = value.shape, value.dtype
                        values[len(ids), path, name] = value.save()
    assert len(values) > 2 * 3 * 15
    for key, value in values.items():
        assert (value.shape, value.dtype) == sizes[key], key
    with model.trace(SHORT):
        alone = {
            (path, name): getattr(module.source, name).output.save()
            for path, module in model.named_modules()
            for name in module.source
        }
    for (path, name), value in alone.items():
        close(values[len(SHORT), path, name], value)


def test_an_operators_result_can_be_replaced(made: Made) -> None:
    model, _ = made
    block = model.transformer.h[1] if hasattr(model, "transformer") else model.model.layers[1]
    norm = block.ln_2 if hasattr(model, "transformer") else block.post_attention_layernorm
    with model.trace(IDS):
        middle = block.source.add_0.output  # the residual stream between attention and MLP
        middle[:, -1] = 0.5
        out = block.output[0].save()
        middle = middle.save()
    close(out, middle + block.mlp(norm(middle)))
    with model.trace() as tracer:
        with tracer.invoke(SHORT):
            untouched = block.output[0].save()
        with tracer.invoke(IDS):
            block.source.add_0.output = middle * 1
            replaced = block.output[0].save()
    close(replaced, out)
    with model.trace(SHORT):
        alone = block.output[0].save()
    close(untouched, alone)


def test_names(made: Made) -> None:
    model, _ = made
    own = attention(model, 0)
    text = repr(own.source)
    assert text.splitlines()[0].endswith("calls")
    assert [line.split()[0] for line in text.splitlines()[1:]] == list(own.source)
    assert list(own.source)[-1] == "flatten_0"
    assert len(own.source) == len(dir(own.source))
    assert model.get(f"{own.path}.heads.q").path == f"{own.path}.heads.q"
    assert not any("heads" in path for path, _ in model.named_modules())
    with pytest.raises(ModulePathError, match="calls no operator 'flaten_0'") as error:
        _ = own.source.flaten_0
    assert (error.value.hint or "").startswith("Nearest: flatten_0")
    with pytest.raises(ModulePathError, match="has no 'heads'"):
        _ = model.lm_head.heads
    with pytest.raises(ModulePathError, match="no input"), model.trace(IDS):
        _ = own.heads.q.input
    with model.scan(IDS):
        shape = own.heads.pattern.output.shape
    assert shape[-2:] == (len(IDS), len(IDS))


def test_the_cache_takes_them(made: Made) -> None:
    model, theirs = made
    with model.trace(IDS) as tracer:
        cache = tracer.cache(modules=[attention(model, 2).heads.pattern, f"{attention(model, 2).path}.heads.z"])
    close(cache[f"model.{attention(model, 2).path}.heads.pattern"].output, patterns(theirs, IDS)[2])
    assert len(cache) == 2
