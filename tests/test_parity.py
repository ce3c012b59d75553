"""Native models against transformers: the same directory gives the same numbers at every access point."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from nnsight_go import LanguageModel
from references import Seen, gpt2, hooked, llama, prompt, reference, relative, shared, tensors

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 150}


# name: config, tokens of the longest prompt
CONFIGS: dict[str, tuple[transformers.PreTrainedConfig, int]] = {
    "gpt2": (gpt2(), 9),
    "gpt2-untied": (gpt2(n_embd=35, n_head=5, n_inner=21, tie_word_embeddings=False, resid_pdrop=0.0), 9),
    "gpt2-one-head": (gpt2(n_embd=20, n_head=1, activation_function="relu", layer_norm_epsilon=1e-6), 9),
    "gpt2-scaled-by-layer": (gpt2(scale_attn_by_inverse_layer_idx=True, activation_function="gelu"), 9),
    "gpt2-unscaled": (gpt2(scale_attn_weights=False, activation_function="gelu_pytorch_tanh"), 9),
    "gpt2-long": (gpt2(n_positions=600), 512),
    "llama": (llama(), 9),
    "llama-tied-biased": (
        llama(num_key_value_heads=6, tie_word_embeddings=True, attention_bias=True, mlp_bias=True, pad_token_id=0),
        9,
    ),
    "llama-own-head-dim": (llama(head_dim=10, num_attention_heads=3, num_key_value_heads=1), 9),
    "llama-wide-heads": (llama(num_attention_heads=2, num_key_value_heads=1, head_dim=260), 9),
    "llama-long": (llama(head_dim=20), 512),
    "llama-llama3-rope": (llama(head_dim=64, rope_parameters=LLAMA3), 300),
    "llama-linear-rope": (llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}), 200),
    "llama-yarn-rope": (llama(head_dim=64, rope_parameters=YARN), 200),
    "llama-gelu": (llama(hidden_act="gelu_new"), 9),
}

Made = tuple[pathlib.Path, PreTrainedModel]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Made]]:
    """Gives a model of CONFIGS by name: its directory and transformers' model."""
    cache: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in cache:
            directory = tmp_path_factory.mktemp(name)
            model = reference(CONFIGS[name][0])
            model.save_pretrained(directory)
            cache[name] = directory, model
        return cache[name]

    yield make
    cache.clear()


def read(model: LanguageModel, wanted: Seen) -> Seen:
    """Reads and saves every access point of wanted; call it inside an invoke, use the result after the block."""
    found: Seen = {}
    for path, port in wanted:
        module = model.get(path) if path else model
        if port == "input":
            args, kwargs = module.inputs
            leaves = tensors(args, "args") | tensors(kwargs, "kwargs")
        else:
            leaves = tensors(module.output)
        found[path, port] = {leaf: value.save() for leaf, value in leaves.items()}
    return found


def agree(got: Seen, want: Seen, tolerance: float = 1e-4) -> None:
    """Fails on the first access point, in forward order, that differs."""
    for point, leaves in want.items():
        for leaf, value in leaves.items():
            if leaf.startswith("kwargs.") and leaf not in got[point] and point[0] in ("", "model", "transformer"):
                continue  # masks and positions given to the whole model: the engine makes its own
            assert leaf in got[point], f"{point} lacks {leaf!r}: {list(got[point])}"
            mine = got[point][leaf]
            assert mine.shape == value.shape, (point, leaf, mine.shape, value.shape)
            assert mine.dtype == value.dtype, (point, leaf, mine.dtype, value.dtype)
            if value.is_floating_point():
                assert relative(mine, value) <= tolerance, (point, leaf, relative(mine, value))
            else:
                assert torch.equal(mine, value), (point, leaf)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_access_point_of_one_prompt(made: Callable[[str], Made], name: str) -> None:
    directory, hf = made(name)
    config, tokens = CONFIGS[name]
    ids = prompt(config, tokens)
    want = hooked(hf, input_ids=torch.tensor([ids]))
    model = LanguageModel(str(directory))
    with model.trace(ids):
        got = read(model, want)
    agree(got, want)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_access_point_of_prompts_of_mixed_lengths(made: Callable[[str], Made], name: str) -> None:
    directory, hf = made(name)
    config, tokens = CONFIGS[name]
    prompts = [prompt(config, n, seed=n) for n in (tokens, 1, tokens // 2)]
    wants = [hooked(hf, input_ids=torch.tensor([ids])) for ids in prompts]
    model = LanguageModel(str(directory))
    gots = []
    with model.trace() as tracer:
        for ids, want in zip(prompts, wants, strict=True):
            with tracer.invoke(ids):
                gots.append(read(model, want))
    for got, want in zip(gots, wants, strict=True):
        agree(got, want)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-llama3-rope"])
def test_an_invoke_equals_its_prompt_alone(made: Callable[[str], Made], name: str) -> None:
    directory, hf = made(name)
    config, tokens = CONFIGS[name]
    prompts = [prompt(config, n, seed=n) for n in (3, tokens, 1)]
    points = hooked(hf, input_ids=torch.tensor([prompts[0]]))
    model = LanguageModel(str(directory))
    together, alone = [], []
    with model.trace() as tracer:
        for ids in prompts:
            with tracer.invoke(ids):
                together.append(read(model, points))
    for ids in prompts:
        with model.trace(ids):
            alone.append(read(model, points))
    for got, want in zip(together, alone, strict=True):
        agree(got, want, tolerance=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama", "llama-tied-biased", "llama-llama3-rope"])
def test_prompts_padded_on_the_left_in_one_invoke(made: Callable[[str], Made], name: str) -> None:
    directory, hf = made(name)
    config, _ = CONFIGS[name]
    prompts = [prompt(config, n, seed=n) for n in (7, 3, 5)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    want = hooked(hf, input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    model = LanguageModel(str(directory))
    with model.trace(prompts):
        logits = model.lm_head.output.save()
        blocks = {
            path: model.get(path).output[0].save() for path, port in want if port == "output" and path[-2:-1] == "."
        }
    assert blocks
    real = mask.bool()
    assert relative(logits[real], want["lm_head", "output"][""][real]) <= 1e-4
    for path, value in blocks.items():
        assert relative(value[real], want[path, "output"]["0"][real]) <= 1e-4, path


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-llama3-rope"])
def test_bfloat16_is_close(made: Callable[[str], Made], name: str) -> None:
    directory, hf = made(name)
    config, tokens = CONFIGS[name]
    ids = prompt(config, min(tokens, 32))
    half = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    want = hooked(half, input_ids=torch.tensor([ids]))
    model = LanguageModel(str(directory), dtype=torch.bfloat16)
    with model.trace(ids):
        got = read(model, want)
    # an activation kept in fewer digits by a fused operation shows up as a few units of 2^-8
    agree(got, want, tolerance=4e-2)
    exact = hooked(hf, input_ids=torch.tensor([ids]))["lm_head", "output"][""]
    mine, theirs = got["lm_head", "output"][""], want["lm_head", "output"][""]
    assert relative(mine, exact) <= 1.5 * relative(theirs, exact) + 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_checkpoint(made: Callable[[str], Made], name: str) -> None:
    directory, hf = made(name)
    model = LanguageModel(str(directory), dispatch=True)
    want = hf.state_dict()
    got = model.state_dict()
    assert list(got) == list(want)
    for key, value in want.items():
        assert torch.equal(got[key], value), key
    modules = dict(model.named_modules())
    assert list(modules) == [path for path, _ in hf.named_modules()]


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "quick_gelu", "relu2", "silu", "swish", "tanh", "mish"])
def test_activation_functions(tmp_path: pathlib.Path, activation: str) -> None:
    hf = reference(gpt2(activation_function=activation, n_layer=1))
    hf.save_pretrained(tmp_path)
    ids = prompt(hf.config, 6)
    want = hooked(hf, input_ids=torch.tensor([ids]))
    model = LanguageModel(str(tmp_path))
    with model.trace(ids):
        got = read(model, want)
    agree(got, want)


def test_nano_sort_sorts_everything() -> None:
    model = LanguageModel(str(shared("gpt-nano-sort")), dispatch=True)
    rows = [list(letters) for letters in itertools.product(range(3), repeat=6)]
    state = rows
    for _ in range(6):
        with model.trace(state):
            last = model.lm_head.output[:, -1].argmax(-1).save()
        state = [[*row, token] for row, token in zip(state, last.tolist(), strict=True)]
    right = sum(row[6:] == sorted(row[:6]) for row in state)
    assert right == 729


def test_nano_sort_matches_its_authors_activations() -> None:
    directory = shared("gpt-nano-sort")
    want = load_file(directory / "reference_activations.safetensors")
    model = LanguageModel(str(directory))
    with model.trace(want["idx"].long()):
        h = model.transformer.h
        got = {
            "tok_emb": model.transformer.wte.output.save(),
            "pos_emb": model.transformer.wpe.output.save(),
            "x": model.transformer.drop.output.save(),
            "ln1": h[0].ln_1.output.save(),
            "qkv": h[0].attn.c_attn.output.save(),
            "y": h[0].attn.c_proj.input.save(),
            "yProj": h[0].attn.output[0].save(),
            "attnResid": (h[0].attn.output[0] + h[0].input).save(),
            "ln2": h[0].ln_2.output.save(),
            "fc": h[0].mlp.c_fc.output.save(),
            "gelu": h[0].mlp.act.output.save(),
            "mlp": h[0].mlp.output.save(),
            "block0": h[0].output[0].save(),
            "block1": h[1].output[0].save(),
            "block2": h[2].output[0].save(),
            "ln_f": model.transformer.ln_f.output.save(),
            "lm_head": model.output.logits.save(),
        }
    for i, name in enumerate("qkv"):
        part = got["qkv"].split(48, dim=2)[i].unflatten(-1, (3, 16)).transpose(1, 2)
        assert (part - want[name]).abs().max() <= 1e-5, name
    for name, value in got.items():
        assert value.shape == want[name].shape, name
        assert (value - want[name]).abs().max() <= 1e-5, name


def test_stories_tell_what_transformers_tells() -> None:
    directory = shared("stories260K")
    hf = AutoModelForCausalLM.from_pretrained(directory).eval()
    model = LanguageModel(str(directory), dispatch=True)
    ids = [1, 403, 407, 261, 378]
    start = torch.tensor([ids])
    want = hf.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=200, do_sample=False, eos_token_id=-1
    )
    for _ in range(200):
        with model.trace(ids):
            token = model.lm_head.output[0, -1].argmax(-1).save()
        ids = [*ids, int(token)]
    assert ids == want[0].tolist()
