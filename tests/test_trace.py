"""Every documented line of a trace, against plain hooks that do the same to transformers' model."""

from __future__ import annotations

import copy

import einops
import pytest
import torch

from nnsight_go import ModulePathError, OutOfOrderError
from references import Pair, Seen, close, edits, in_place, main, tensors

pytestmark = pytest.mark.usefixtures("nothing_stays")


def block(pair: Pair, index: int) -> str:
    return f"{pair.blocks}.{index}"


def logits(seen: Seen) -> torch.Tensor:
    return main(seen, "lm_head")


# ---- reading ----


def test_hidden_states_are_batch_seq_hidden(either: Pair) -> None:
    ids = either.ids()
    with either.model.trace(ids):
        hidden = either.layers[1].output[0].save()
    assert hidden.shape == (1, len(ids), either.width)
    assert hidden.value.shape == hidden.shape
    close(hidden, main(either.run(ids), block(either, 1)))


def test_reads_come_in_any_order(either: Pair) -> None:
    want = either.run(either.ids())
    with either.model.trace(either.ids()):
        out = either.model.lm_head.output.save()
        late = either.layers[2].output[0].save()
        early = either.layers[0].output[0].save()
        middle = either.layers[1].mlp.output.save()
        again = either.layers[2].output[0].save()
    close(out, logits(want))
    close(late, main(want, block(either, 2)))
    close(early, main(want, block(either, 0)))
    close(middle, main(want, f"{block(either, 1)}.mlp"))
    assert again is late


def test_a_read_of_an_edited_module_shows_the_edit_and_an_earlier_one_does_not(either: Pair) -> None:
    want = either.run(either.ids(), edits({f"{block(either, 1)}.output": in_place(lambda x: x.mul_(0.5))}))
    with either.model.trace(either.ids()):
        either.layers[1].output[0][:] *= 0.5
        out = either.model.lm_head.output.save()
        edited = either.layers[1].output[0].save()
        before = either.layers[0].output[0].save()
    close(edited, main(want, block(either, 1)))
    close(before, main(want, block(either, 0)))
    close(out, logits(want))


def test_input_is_the_first_argument(either: Pair) -> None:
    want = either.run(either.ids())
    attention = f"{block(either, 1)}.{either.attention}"
    with either.model.trace(either.ids()):
        hidden = either.layers[1].input.save()
        row = either.layers[1].input[0].save()
        by_name = either.model.get(attention).input.save()  # Llama passes it by name
        ids = either.model.input.save()
    close(hidden, want[block(either, 1), "input"]["args.0"])
    close(row, want[block(either, 1), "input"]["args.0"][0])
    close(by_name, main(want, attention, "input"))
    close(ids, torch.tensor([either.ids()]))


def test_inputs_are_arguments_and_keywords(either: Pair) -> None:
    want = either.run(either.ids())[block(either, 1), "input"]
    with either.model.trace(either.ids()):
        args, kwargs = either.layers[1].inputs
        got = {k: v.save() for k, v in (tensors(args, "args") | tensors(kwargs, "kwargs")).items()}
    assert set(got) >= set(want)
    for leaf, value in want.items():
        close(got[leaf], value)


def test_the_model_gives_an_object_with_logits(either: Pair) -> None:
    with either.model.trace(either.ids()):
        out = either.model.output
        named = out.logits.save()
        keyed = out["logits"]
        indexed = out[0]
        assert keyed is named and indexed is named
    close(named, logits(either.run(either.ids())))
    assert out.logits is named, "the object holds the tensor after the block"


# ---- writing in place ----


@pytest.mark.parametrize(
    "change",
    [
        lambda x, v: x.__setitem__((slice(None), slice(None), slice(None)), 0),
        lambda x, v: x.__setitem__(slice(None), 0.25),
        lambda x, v: x.__setitem__((slice(None), -1, slice(None)), v),
        lambda x, v: x.__setitem__((slice(None), -1), v),
        lambda x, v: x.__setitem__((0, 2), v * 3),
        lambda x, v: x.__setitem__((..., slice(None, None, 2)), -0.5),
        lambda x, v: x.__setitem__((slice(None), [0, 3], slice(4, 9)), 1.0),
        lambda x, v: x.__setitem__(x > 0.5, 0.0),
        lambda x, v: x.__setitem__((slice(None), torch.tensor([1, 2])), v),
        lambda x, v: x[:, 1:3].mul_(-1),
        lambda x, v: x[:, -1].copy_(v),
        lambda x, v: x.add_(v, alpha=2),
        lambda x, v: x.transpose(1, 2)[:, 5].fill_(0.125),
        lambda x, v: x.index_fill_(1, torch.tensor([0]), 0.5),
        lambda x, v: x.masked_fill_(x < 0, 0.1),
    ],
    ids=[
        "zero", "fill", "last token", "last token short", "one row", "stride", "lists", "mask", "index tensor", "mul_",
        "copy_", "add_", "transposed", "index_fill_", "masked_fill_",
    ],
)  # fmt: skip
def test_writes_in_place(either: Pair, change) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    vector = torch.randn(either.width)
    want = either.run(either.ids(), edits({f"{block(either, 1)}.output": in_place(lambda x: change(x, vector))}))
    with either.model.trace(either.ids()):
        hidden = either.layers[1].output[0]
        change(hidden, vector)
        hidden.save()
        out = either.model.lm_head.output.save()
    close(hidden, main(want, block(either, 1)))
    close(out, logits(want))


def test_augmented_assignment_of_a_tensor(either: Pair) -> None:
    path = f"{block(either, 1)}.mlp"
    want = either.run(either.ids(), edits({f"{path}.output": in_place(lambda x: x.mul_(0.5).add_(0.1).sub_(0.2))}))
    with either.model.trace(either.ids()):
        either.layers[1].mlp.output *= 0.5
        either.layers[1].mlp.output += 0.1
        either.layers[1].mlp.output -= 0.2
        got = either.layers[1].mlp.output.save()
        out = either.model.lm_head.output.save()
    close(got, main(want, path))
    close(out, logits(want))


def test_augmented_assignment_of_hidden_states(either: Pair) -> None:
    torch.manual_seed(0)
    vector = torch.randn(either.width)
    change = edits({f"{block(either, 1)}.output": in_place(lambda x: x.mul_(2).add_(vector))})
    want = either.run(either.ids(), change)
    with either.model.trace(either.ids()):
        before = either.layers[1].output[0]
        either.layers[1].output[0] *= 2
        either.layers[1].output[0] += vector
        assert either.layers[1].output[0] is before, "changed in place, not replaced"
        before.save()
        out = either.model.lm_head.output.save()
    close(before, main(want, block(either, 1)))
    close(out, logits(want))


def test_augmented_assignment_of_a_slice(either: Pair) -> None:
    def change(x: torch.Tensor) -> None:
        x[:, -1] *= 3

    want = either.run(either.ids(), edits({f"{block(either, 1)}.output": change}))
    with either.model.trace(either.ids()):
        either.layers[1].output[0][:, -1] *= 3
        out = either.model.lm_head.output.save()
    close(out, logits(want))


# ---- assignment ----


def test_noise(either: Pair) -> None:
    torch.manual_seed(7)
    noisy = edits({f"{block(either, 1)}.output": lambda x: x + 0.1 * torch.randn_like(x)})
    want = either.run(either.ids(), noisy)
    torch.manual_seed(7)
    with either.model.trace(either.ids()):
        noise = 0.1 * torch.randn_like(either.layers[1].output[0])
        either.layers[1].output[0] = either.layers[1].output[0] + noise
        out = either.model.lm_head.output.save()
    close(out, logits(want))


def test_whole_output_of_a_block(either: Pair) -> None:
    torch.manual_seed(0)
    other = torch.randn(1, len(either.ids()), either.width)
    want = either.run(either.ids(), edits({f"{block(either, 1)}.output": lambda x: other}))
    outs = []
    for value in (other, (other,), [other]):
        with either.model.trace(either.ids()):
            either.layers[1].output = value
            read = either.layers[1].output[0].save()
            outs.append(either.model.lm_head.output.save())
        close(read, other)
    for out in outs:
        close(out, logits(want))


def test_whole_output_of_attention(either: Pair) -> None:
    path = f"{block(either, 1)}.{either.attention}"
    want = either.run(either.ids(), edits({f"{path}.output": lambda x: x * 2}))
    with either.model.trace(either.ids()):
        attention = either.model.get(path)
        hidden, weights = attention.output
        assert weights is None
        attention.output = (hidden * 2, None)
        out = either.model.lm_head.output.save()
    close(out, logits(want))


def test_output_of_a_tensor_module(either: Pair) -> None:
    path = f"{block(either, 1)}.mlp"
    want = either.run(either.ids(), edits({f"{path}.output": lambda x: x.tanh() - 1}))
    with either.model.trace(either.ids()):
        either.layers[1].mlp.output = either.layers[1].mlp.output.tanh() - 1
        out = either.model.lm_head.output.save()
    close(out, logits(want))


def test_input_of_a_module(either: Pair) -> None:
    attention = f"{block(either, 1)}.{either.attention}"
    change = edits({f"{attention}.input": lambda x: x * 0.5, f"{block(either, 2)}.input": lambda x: x + 1})
    want = either.run(either.ids(), change)
    with either.model.trace(either.ids()):
        module = either.model.get(attention)
        module.input = module.input * 0.5
        either.layers[2].input = either.layers[2].input + 1
        out = either.model.lm_head.output.save()
        read = either.layers[2].input.save()
    close(read, main(want, block(either, 2), "input"))
    close(out, logits(want))


def test_inputs_of_a_module(either: Pair) -> None:
    want = either.run(either.ids(), edits({f"{block(either, 1)}.input": lambda x: -x}))
    with either.model.trace(either.ids()):
        args, kwargs = either.layers[1].inputs
        either.layers[1].inputs = ((-args[0], *args[1:]), kwargs)
        whole = either.model.lm_head.output.save()
    with either.model.trace(either.ids()):
        either.layers[1].inputs[0][0] = -either.layers[1].inputs[0][0]
        item = either.model.lm_head.output.save()
    close(whole, logits(want))
    close(item, logits(want))


def test_input_in_place_is_the_output_before_it(either: Pair) -> None:
    """A block's input is the same tensor as the output of the block before it."""
    want = either.run(either.ids(), edits({f"{block(either, 2)}.input": in_place(lambda x: x.mul_(0.5))}))
    with either.model.trace(either.ids()):
        before = either.layers[1].output[0].save()
        either.layers[2].input[:] *= 0.5
        out = either.model.lm_head.output.save()
    close(before, main(want, block(either, 1)))
    close(out, logits(want))


def test_token_ids_of_the_embedding(either: Pair) -> None:
    embedding = {"gpt2": "transformer.wte", "llama": "model.embed_tokens"}[either.hf.config.model_type]
    other = torch.tensor([either.ids(seed=5)])
    want = either.run(either.ids(), edits({f"{embedding}.input": lambda x: other}))
    with either.model.trace(either.ids()):
        either.model.get(embedding).input = other
        out = either.model.lm_head.output.save()
    close(out, logits(want))


def test_logits_of_the_models_own_output(either: Pair) -> None:
    want = logits(either.run(either.ids()))
    with either.model.trace(either.ids()):
        either.model.output.logits = either.model.output.logits - 5
        out = either.model.output.logits.save()
    close(out, want - 5)


def test_norm_in_the_middle_of_the_model_object(either: Pair) -> None:
    """An output that is an object: the base model's last hidden state."""
    base = either.blocks.split(".")[0]
    want = either.run(either.ids(), edits({f"{base}.output": lambda x: x * 2}))
    with either.model.trace(either.ids()):
        module = either.model.get(base)
        module.output.last_hidden_state = module.output.last_hidden_state * 2
        out = either.model.lm_head.output.save()
    close(out, logits(want))


# ---- aliasing: the table of the contract ----


def test_a_saved_value_is_the_same_tensor(either: Pair) -> None:
    with either.model.trace(either.ids()):
        x = either.layers[1].output[0]
        s = x.save()
        x[:] = 0
    assert not s.any()


def test_a_clone_keeps_the_old_value(either: Pair) -> None:
    with either.model.trace(either.ids()):
        x = either.layers[1].output[0]
        s = x.clone().save()
        x[:] = 0
        out = either.model.lm_head.output.save()
    close(s, main(either.run(either.ids()), block(either, 1)))
    close(out, logits(either.run(either.ids(), edits({f"{block(either, 1)}.output": torch.zeros_like}))))


def test_a_view_shows_what_is_written_to_its_base(either: Pair) -> None:
    with either.model.trace(either.ids()):
        x = either.layers[1].output[0]
        v = x[:, -1].save()
        deep = x.transpose(1, 2)[:, 3].save()
        x[:] = 0
    assert not v.any() and not deep.any()


def test_a_write_through_a_view_is_a_write(either: Pair) -> None:
    def change(x: torch.Tensor) -> None:
        x[:, -1] = 2

    want = either.run(either.ids(), edits({f"{block(either, 1)}.output": change}))
    with either.model.trace(either.ids()):
        v = either.layers[1].output[0][:, -1]
        v[:] = 2
        out = either.model.lm_head.output.save()
    close(out, logits(want))


def test_assignment_leaves_the_old_tensor_and_its_proxies(either: Pair) -> None:
    with either.model.trace(either.ids()):
        old = either.layers[1].output[0].save()
        view = old[:, 0].save()
        new = torch.zeros_like(old)
        either.layers[1].output[0] = new
        now = either.layers[1].output[0].save()
        out = either.model.lm_head.output.save()
    clean = main(either.run(either.ids()), block(either, 1))
    close(old, clean)
    close(view, clean[:, 0])
    assert not now.any()
    close(out, logits(either.run(either.ids(), edits({f"{block(either, 1)}.output": torch.zeros_like}))))


def test_what_was_assigned_is_what_stands_there(either: Pair) -> None:
    """After an assignment the access point and the variable are one tensor."""
    with either.model.trace(either.ids()):
        new = (either.layers[1].output[0] * 0).save()
        either.layers[1].output[0] = new
        new += 1
        read = either.layers[1].output[0].save()
        out = either.model.lm_head.output.save()
    assert read is new and bool((new == 1).all())
    close(out, logits(either.run(either.ids(), edits({f"{block(either, 1)}.output": torch.ones_like}))))


def test_saved_tensors_share_storage_as_in_torch(either: Pair) -> None:
    with either.model.trace(either.ids()):
        x = either.layers[1].output[0].save()
        v = x[:, -1].save()
    v.zero_()
    assert not x[:, -1].any() and x.any()


def test_a_constant_from_outside_is_not_changed(either: Pair) -> None:
    constant = torch.ones(1, len(either.ids()), either.width)
    with either.model.trace(either.ids()):
        either.layers[1].output[0] = constant
        either.layers[1].output[0][:] *= 3
        read = either.layers[1].output[0].save()
    assert bool((read == 3).all())
    assert bool((constant == 1).all()), "a small tensor from outside is copied where a line uses it"


# ---- tuples ----


def test_tensor_operations_on_a_tuple_say_which_value_was_meant(gpt2_pair: Pair) -> None:
    h = gpt2_pair.layers
    for wrong in (
        lambda: h[1].output[:, -1],
        lambda: h[1].output * 2,
        lambda: 2 * h[1].output,
        lambda: h[1].output + 1,
        lambda: h[1].output - 1,
        lambda: h[1].output.__setitem__((slice(None), -1), 0),
        lambda: h[1].output.mean(),
        lambda: h[1].output.shape,
        lambda: h[1].attn.output.norm(),
        lambda: -h[1].output,
        lambda: h[1].output @ torch.eye(3),
    ):
        with pytest.raises(ModulePathError, match=r"output is a tuple of [12].*\n(.*\n)*.*output\[0\]"), \
                gpt2_pair.model.trace(gpt2_pair.ids()):  # fmt: skip
            wrong()


def test_a_tuple_is_a_tuple(either: Pair) -> None:
    with either.model.trace(either.ids()):
        out = either.layers[1].output
        assert isinstance(out, tuple) and len(out) == 1
        (hidden,) = out
        assert hidden is out[0] is out[-1]
        assert hidden in out
        assert out[:1] == (hidden,)
        assert (*out, None)[1] is None
        with pytest.raises(IndexError):
            out[1]
        hidden.save()
    assert type(out[0]) is torch.Tensor, "the tuple holds the tensor after the block"
    assert out[0] is hidden


def test_torch_functions_of_a_tuple_fail_clearly(gpt2_pair: Pair) -> None:
    with pytest.raises((ModulePathError, TypeError)), gpt2_pair.model.trace(gpt2_pair.ids()):
        torch.relu(gpt2_pair.layers[1].output)


# ---- modules on values ----


def test_logit_lens(either: Pair) -> None:
    want = either.run(either.ids())
    head, norm = either.hf.get_submodule("lm_head"), either.hf.get_submodule(either.final)
    with either.model.trace(either.ids()):
        lens = [either.model.lm_head(either.model.get(either.final)(layer.output[0])).save() for layer in either.layers]
        last = either.model.lm_head(either.model.get(either.final)(either.layers[1].output[0][:, -1])).save()
    for i, got in enumerate(lens):
        with torch.no_grad():
            close(got, head(norm(main(want, block(either, i)))))
    close(last, lens[1][:, -1])


def test_modules_called_outside_of_a_trace_compute_at_once(either: Pair) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, either.width)
    for path in ("lm_head", either.final, f"{block(either, 1)}.mlp"):
        with torch.no_grad():
            close(either.model.get(path)(x), either.hf.get_submodule(path)(x))


def test_a_called_module_is_no_access_of_its_own(either: Pair) -> None:
    path = f"{block(either, 2)}.mlp"
    mlp = either.hf.get_submodule(path)
    want = either.run(either.ids(), edits({f"{path}.output": torch.zeros_like}))
    with either.model.trace(either.ids()):
        called = either.layers[2].mlp(either.layers[0].output[0]).save()
        either.layers[1].output[0][:] *= 1  # not out of order: the call went nowhere
        either.layers[2].mlp.output[:] = 0
        out = either.model.lm_head.output.save()
    with torch.no_grad():
        close(called, mlp(main(want, block(either, 0))))
    close(out, logits(want))


def test_whole_blocks_can_be_called(either: Pair) -> None:
    """A block applied to what it gets anyway gives what it gives."""
    want = either.run(either.ids())
    with either.model.trace(either.ids()):
        args, kwargs = either.layers[1].inputs
        again = either.layers[1](*args, **kwargs)
        hidden = again[0].save()
    close(hidden, main(want, block(either, 1)))


class SparseAutoencoder(torch.nn.Module):
    """As people train them on a residual stream."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(width, features)
        self.decoder = torch.nn.Linear(features, width)
        self.seen: list[torch.Size] = []

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.encoder(x - self.decoder.bias))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(x.shape)
        features = self.encode(x)
        return self.decoder(features), features


def test_a_sparse_autoencoder_of_the_users(either: Pair) -> None:
    torch.manual_seed(0)
    sae = SparseAutoencoder(either.width, 96).eval()
    path = block(either, 1)

    def change(x: torch.Tensor) -> torch.Tensor:
        features = sae(x)[1]
        features[..., 3] = 2.0
        return sae.decoder(features)

    want = either.run(either.ids(), edits({f"{path}.output": change}))
    sae.seen.clear()
    with torch.no_grad(), either.model.trace(either.ids()):
        _, features = sae(either.layers[1].output[0])
        kept = features.clone().save()
        features[..., 3] = 2.0
        either.layers[1].output[0] = sae.decoder(features)
        out = either.model.lm_head.output.save()
    assert sae.seen == [torch.Size([1, len(either.ids()), either.width])]
    close(out, logits(want))
    with torch.no_grad():
        close(kept, sae(main(either.run(either.ids()), path))[1])


def test_einops(either: Pair) -> None:
    hidden = main(either.run(either.ids()), block(either, 1))
    with either.model.trace(either.ids()):
        x = either.layers[1].output[0]
        heads = einops.rearrange(x, "b t (h d) -> b h t d", h=3).save()
        mean = einops.reduce(x, "b t d -> b d", "mean").save()
        tiled = einops.repeat(mean, "b d -> b t d", t=2).save()
        scores = einops.einsum(x, x, "b i d, b j d -> b i j").save()
    close(heads, einops.rearrange(hidden, "b t (h d) -> b h t d", h=3))
    close(mean, einops.reduce(hidden, "b t d -> b d", "mean"))
    close(tiled, einops.repeat(mean, "b d -> b t d", t=2))
    close(scores, einops.einsum(hidden, hidden, "b i d, b j d -> b i j"))


def test_copies_of_a_value(either: Pair) -> None:
    with either.model.trace(either.ids()):
        x = either.layers[1].output[0]
        deep = copy.deepcopy(x).save()
        x[:] = 0
    close(deep, main(either.run(either.ids()), block(either, 1)))


# ---- grad modes and random numbers ----


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_around_the_block(either: Pair, mode) -> None:  # type: ignore[no-untyped-def]
    with mode(), either.model.trace(either.ids()):
        hidden = either.layers[1].output[0]
        hidden[:, -1] *= 2
        out = either.model.lm_head.output.save()
    change = edits({f"{block(either, 1)}.output": in_place(lambda x: x[:, -1].mul_(2))})
    close(out.detach().clone(), logits(either.run(either.ids(), change)))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_grad_mode_belongs_to_the_line(either: Pair) -> None:
    weight = torch.ones(either.width, requires_grad=True)
    with either.model.trace(either.ids()):
        hidden = either.layers[1].output[0].detach()
        with torch.no_grad():
            without = (hidden * weight).save()
        within = (hidden * weight).save()
    assert not without.requires_grad
    assert within.requires_grad
    within.sum().backward()
    close(weight.grad, hidden_sum(either))


def hidden_sum(pair: Pair) -> torch.Tensor:
    return main(pair.run(pair.ids()), block(pair, 1)).sum((0, 1))


def test_inference_tensors_come_out_of_inference_mode(either: Pair) -> None:
    with torch.inference_mode(), either.model.trace(either.ids()):
        out = either.model.lm_head.output.save()
    assert out.is_inference()


def test_seeds_in_the_middle_of_a_block(either: Pair) -> None:
    def first(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(11)
        x = x + torch.randn_like(x)
        return torch.nn.functional.dropout(x, 0.3, training=True)

    def second(x: torch.Tensor) -> torch.Tensor:
        noise = torch.zeros_like(x).normal_(0, 0.1)
        torch.manual_seed(12)
        return x + noise + torch.randn(either.width) + torch.rand_like(x).uniform_(-1, 1)

    torch.manual_seed(0)
    change = edits({f"{block(either, 0)}.output": first, f"{block(either, 1)}.output": second})
    want = either.run(either.ids(), change)
    after = torch.rand(3)
    torch.manual_seed(0)
    with either.model.trace(either.ids()):
        either.layers[0].output[0] = first(either.layers[0].output[0])
        either.layers[1].output[0] = second(either.layers[1].output[0])
        out = either.model.lm_head.output.save()
    close(out, logits(want))
    close(torch.rand(3), after)


def test_draws_that_depend_on_values(either: Pair) -> None:
    want = logits(either.run(either.ids()))[:, -1].softmax(-1)
    torch.manual_seed(5)
    tokens = torch.multinomial(want, 20, replacement=True)
    torch.manual_seed(5)
    with either.model.trace(either.ids()):
        got = torch.multinomial(either.model.lm_head.output[:, -1].softmax(-1), 20, replacement=True).save()
    close(got, tokens)


def test_asking_for_sizes_names_nothing(either: Pair) -> None:
    blocks, ids = either.layers, either.ids()
    want = either.run(ids, edits({f"{either.blocks}.1.mlp.output": in_place(lambda x: x.mul_(0.5))}))
    with either.model.trace(ids):
        late = blocks[2].output[0]
        assert late.shape[-1] == either.width
        assert (late.dtype, late.ndim, len(late), late.size(0)) == (torch.float32, 3, 1, 1)
        blocks[1].mlp.output = blocks[1].mlp.output * 0.5
        logits = either.model.lm_head.output.save()
    close(logits, main(want, "lm_head"))
    for use in (lambda x: x + 1, lambda x: x.save(), lambda x: float(x.mean())):
        with pytest.raises(OutOfOrderError, match="has already run"), either.model.trace(ids):
            late = blocks[2].output[0]
            assert late.shape
            use(late)
            blocks[1].mlp.output = blocks[1].mlp.input * 0
    with pytest.raises(OutOfOrderError, match="has already run"), either.model.trace(ids):
        _ = blocks[2].output[0]  # named
        blocks[1].mlp.output = blocks[1].mlp.input * 0
