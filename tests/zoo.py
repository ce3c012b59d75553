"""Modules of many kinds, real and odd, each with an input: what NNsight is to wrap."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from references import shared

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
ZOO: dict[str, Callable[[], Made]] = {}


def entry(make: Callable[[], Made]) -> Callable[[], Made]:
    """Puts a module into the zoo; its weights are the same each time."""

    def seeded() -> Made:
        torch.manual_seed(0)
        return make()

    ZOO[make.__name__] = seeded
    return seeded


# ---- ResNet-20 for CIFAR-10 (He et al. 2015, shortcuts of option A) ----


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.more = stride, after - before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(out + x)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for i, (before, after) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = [Block(before if k == 0 else after, after, 2 if k == 0 and i > 1 else 1) for k in range(3)]
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.avg_pool2d(x, x.size()[3]).flatten(1))


@entry
def resnet20() -> Made:
    model = ResNet()
    import safetensors.torch

    model.load_state_dict(safetensors.torch.load_file(shared("cifar10-resnet20") / "model.safetensors"), strict=True)
    return model.eval(), (torch.randn(2, 3, 32, 32),), {}


# ---- torch's own ----


@entry
def mlp() -> Made:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (torch.randn(4, 6),), {}


@entry
def lstm() -> Made:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm, self.out = nn.Embedding(20, 8), nn.LSTM(8, 6, 2, batch_first=True), nn.Linear(6, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            states, _ = self.lstm(self.embed(ids))
            return self.out(states)

    return Tagger(), (torch.randint(0, 20, (3, 5)),), {}


@entry
def gru() -> Made:
    return nn.GRU(4, 5, batch_first=True), (torch.randn(2, 7, 4),), {"hx": torch.randn(1, 2, 5)}


@entry
def attention() -> Made:
    x = torch.randn(2, 5, 8)
    return nn.MultiheadAttention(8, 2, batch_first=True).eval(), (x, x, x), {"need_weights": True}


@entry
def transformer() -> Made:
    model = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)
    return model.train(), (torch.randn(2, 5, 8), torch.randn(2, 4, 8)), {}


# ---- of users ----


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mean, self.log_var = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        h = torch.tanh(self.encoder(x))
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return {"x": self.decoder(z), "latent": (mean, log_var), "kind": "vae", "nothing": None}


@entry
def vae() -> Made:
    return VAE(), (torch.randn(4, 6),), {}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)])
        self.middle = nn.Conv2d(8, 8, 3, 1, 1)
        self.up = nn.ModuleDict({"a": nn.ConvTranspose2d(8, 4, 2, 2), "b": nn.ConvTranspose2d(4, 1, 2, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for layer in self.down:
            x = F.relu(layer(x))
            skips.append(x)
        x = F.relu(self.middle(x)) + skips[1]
        return self.up["b"](F.relu(self.up["a"](x)) + skips[0])


@entry
def unet() -> Made:
    return UNet(), (torch.randn(2, 1, 8, 8),), {}


class Experts(nn.Module):
    """A mixture whose tokens are routed one by one, all rows flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            out[rows] = weights[rows, None] * expert(flat[rows])
        return out.view_as(x)


@entry
def experts() -> Made:
    return Experts(), (torch.randn(2, 9, 6),), {}


class Recurrent(nn.Module):
    """A cell that is called once a token."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(torch.cat([x[:, t], h], 1)))
        return self.out(h)


@entry
def recurrent() -> Made:
    return Recurrent(), (torch.randn(3, 4, 4),), {}


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    states: list[torch.Tensor]
    count: int
    missing: torch.Tensor | None = None


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Structured(nn.Module):
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor, flag: bool = False) -> Pair:
            y = self.linear(x) * scale
            return Pair(y, y.sum(-1, keepdim=True) if flag else y * 0.5)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.tied = Structured.Inner(), nn.Linear(4, 4)
        self.again = self.tied  # one module by two names

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Answer:
        first, second = self.inner(x, scale=torch.full((1,), 2.0, device=x.device), flag=True)
        y = self.again(self.tied(first)) + second
        return Answer(y, [first, second], 2)


@entry
def structured() -> Made:
    return Structured(), (torch.randn(3, 4),), {"mask": None}


class Moody(nn.Module):
    """Goes one way or the other, as a coin falls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.coin = random.Random(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.a(x) if self.coin.random() < 0.5 else self.b(x))


@entry
def dropping() -> Made:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3))
    return model.train(), (torch.randn(5, 6),), {}


@entry
def half() -> Made:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).bfloat16(), (torch.randn(2, 6).bfloat16(),), {}


@entry
def scripted() -> Made:
    inner = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    return nn.Sequential(nn.Linear(6, 6), inner, nn.Linear(6, 2)), (torch.randn(2, 6),), {}


# ---- of transformers, with random weights ----


def tiny(name: str) -> Any:
    """A small config of an architecture, and an input of its kind."""
    import transformers as t

    ids = torch.randint(3, 50, (2, 6))
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    match name:
        case "bert":
            return t.BertModel(t.BertConfig(vocab_size=60, **small)), {"input_ids": ids}
        case "t5":
            config = t.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
            return t.T5ForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
        case "vit":
            config = t.ViTConfig(image_size=16, patch_size=8, **small)
            return t.ViTModel(config), {"pixel_values": torch.randn(2, 3, 16, 16)}
        case "whisper":
            config = t.WhisperConfig(
                vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                num_mel_bins=8, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
                max_source_positions=10,
                max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            )  # fmt: skip
            features = torch.randn(2, 8, 20)
            return t.WhisperModel(config), {"input_features": features, "decoder_input_ids": ids[:, :4]}
        case "mamba":
            config = t.MambaConfig(vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=2)
            return t.MambaModel(config), {"input_ids": ids}
        case "clip":
            text = t.CLIPTextConfig(vocab_size=60, eos_token_id=2, **small).to_dict()
            vision = t.CLIPVisionConfig(image_size=16, patch_size=8, **small).to_dict()
            model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
            return model, {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    raise KeyError(name)


def _of_transformers(name: str) -> None:
    def make() -> Made:
        model, inputs = tiny(name)
        return model.eval(), (), inputs

    make.__name__ = name
    entry(make)


for _name in ("bert", "t5", "vit", "whisper", "mamba", "clip"):
    _of_transformers(_name)
