"""The engine's view of weights against the reference libraries': values, sharing, and what is refused."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from nnsight_go import _ffi
from nnsight_go.errors import ModelLoadError

CONFIG = transformers.GPT2Config(
    n_embd=8, n_head=2, n_layer=2, n_positions=16, vocab_size=11, bos_token_id=0, eos_token_id=0
)


class Opened:
    """A model of the engine and its parameters."""

    def __init__(self, directory: Path) -> None:
        self.handle = ctypes.c_uint64()
        lib = _ffi.lib()
        _ffi.check(lib.nng_model_open, str(directory).encode(), b"{}", ctypes.byref(self.handle))
        self.description = json.loads(_ffi.call(lib.nng_model_describe, self.handle))

    def param(self, name: str) -> torch.Tensor:
        tensor = ctypes.c_void_p()
        _ffi.check(_ffi.lib().nng_model_param, self.handle, name.encode(), ctypes.byref(tensor))
        try:
            wrapped: torch.Tensor = _ffi.py().nngpy_wrap(tensor)
            return wrapped
        finally:
            _ffi.py().nngpy_tensor_free(tensor)

    def params(self) -> dict[str, torch.Tensor]:
        return {p["name"]: self.param(p["name"]) for p in self.description["params"]}


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[Opened]:
    model = Opened(directory)
    try:
        yield model
    finally:
        _ffi.check(_ffi.lib().nng_model_close, model.handle)


def gpt2(seed: int = 0) -> transformers.GPT2LMHeadModel:
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(CONFIG).eval()


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrites the tensors of a directory."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    gpt2().save_pretrained(tmp_path)
    return tmp_path


def mapped(path: Path) -> list[range]:
    """Addresses at which a file is mapped in this process."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            low, high = line.split()[0].split("-")
            found.append(range(int(low, 16), int(high, 16)))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard", ["1GB", "2KB"])
def test_values_are_those_of_the_file(tmp_path: Path, dtype: torch.dtype, shard: str) -> None:
    model = gpt2().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "2KB")
    with opened(tmp_path) as m:
        params = m.params()
        for name, expected in model.state_dict().items():
            assert params[name].dtype == dtype
            assert torch.equal(params[name], expected), name
        assert params["lm_head.weight"].data_ptr() == params["transformer.wte.weight"].data_ptr()


def test_tensors_lie_in_the_file_and_outlive_the_model(directory: Path) -> None:
    file = directory / "model.safetensors"
    before = file.read_bytes()
    with opened(directory) as m:
        assert not mapped(file), "opening maps nothing"
        weight = m.param("transformer.h.0.mlp.c_fc.weight")
        (place,) = mapped(file)
        assert weight.data_ptr() in place
        with torch.no_grad():
            weight.zero_()
        assert not m.param("transformer.h.0.mlp.c_fc.weight").any(), "both are the model's own"
    assert mapped(file) == [place]
    assert not weight.any()
    del weight
    gc.collect()
    assert not mapped(file), "the last tensor takes the mapping with it"
    assert file.read_bytes() == before


def test_a_closed_model_leaves_nothing_mapped(directory: Path) -> None:
    with opened(directory) as m:
        m.param("lm_head.weight")
        assert mapped(directory / "model.safetensors")
    assert not mapped(directory / "model.safetensors")


def without_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in [n for n in tensors if n.startswith("transformer.")]:
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


def old_masks(tensors: dict[str, torch.Tensor]) -> None:
    for i in range(CONFIG.n_layer):
        tensors[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16)
        tensors[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)


def head_copied(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()


def head_alone(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")


def everything_old(tensors: dict[str, torch.Tensor]) -> None:
    old_masks(tensors)
    without_prefix(tensors)


@pytest.mark.parametrize("change", [without_prefix, old_masks, head_copied, head_alone, everything_old])
def test_checkpoints_of_other_times_open_as_in_transformers(
    directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    edit(directory, change)
    expected = transformers.GPT2LMHeadModel.from_pretrained(directory).state_dict()
    with opened(directory) as m:
        params = m.params()
        assert params.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(params[name], value), name


def test_the_base_model_saved_alone(tmp_path: Path) -> None:
    model = gpt2()
    model.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    with opened(tmp_path) as m:
        for name, value in model.state_dict().items():
            assert torch.equal(m.param(name), value), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("transformer.ln_f.bias"), ["missing: transformer.ln_f.bias [8]"]),
        (lambda t: t.update(extra=torch.ones(2, 3)), ["surplus: extra [2 3]"]),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.ones(17, 8)}),
            ["wrong shape: transformer.wpe.weight has [17 8], the config asks for [16 8]"],
        ),
        (lambda t: t.clear(), ["missing: transformer.wte.weight [11 8]", "and "]),
    ],
)
def test_other_tensors_than_the_config_asks_for(
    directory: Path, change: Callable[[dict[str, torch.Tensor]], Any], says: list[str]
) -> None:
    edit(directory, change)
    with pytest.raises(ModelLoadError) as caught, opened(directory):
        pass
    for text in [*says, str(directory)]:
        assert text in str(caught.value)


def test_a_checkpoint_of_pickles_says_how_to_convert_it(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with (
        pytest.raises(ModelLoadError, match=r"(?s)no safetensors.*pytorch_model.bin.*save_pretrained"),
        opened(directory),
    ):
        pass


def reference(file: Path) -> dict[str, torch.Tensor] | None:
    """What the reference implementation reads, or None where it refuses the file."""
    try:
        with safe_open(file, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError):
        return None


@st.composite
def damage(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """One way to spoil a file."""
    kind = draw(st.sampled_from(["byte", "number", "word", "cut", "grow", "length"]))
    at = draw(st.integers(0, 10**6))
    value = draw(st.integers(0, 255))
    number = draw(st.sampled_from([b"0", b"1", b"-1", b"8", b"1e3", b"4294967296", b"9223372036854775808", b"null"]))
    word = draw(st.sampled_from([b'"', b"[", b"}", b"\\u0000", b"\xff", b"F32", b"dtype", b'"shape": [1], ']))

    def spoil(data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        header, body = data[8 : 8 + size], data[8 + size :]
        place = at % len(header)
        if kind == "cut":
            return data[: at % len(data)]
        if kind == "grow":
            return data + bytes(value)
        if kind == "length":
            return struct.pack("<Q", max(0, size + value - 128)) + header + body
        if kind == "byte":
            header = header[:place] + bytes([value]) + header[place + 1 :]
        elif kind == "word":
            header = header[:place] + word + header[place:]
        else:
            starts = [
                i for i in range(1, len(header)) if header[i : i + 1].isdigit() and not header[i - 1 : i].isdigit()
            ]
            start = starts[at % len(starts)]
            end = start
            while header[end : end + 1].isdigit():
                end += 1
            header = header[:start] + number + header[end:]
        return struct.pack("<Q", len(header)) + header + body

    return spoil


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spoil=damage())
def test_spoilt_files_open_only_where_the_reference_reads_the_same(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, spoil: Callable[[bytes], bytes]
) -> None:
    place = tmp_path_factory.mktemp("spoilt")
    try:
        shutil.copy(directory / "config.json", place)
        file = place / "model.safetensors"
        file.write_bytes(spoil((directory / "model.safetensors").read_bytes()))
        expected = reference(file)
        try:
            with opened(place) as m:
                assert expected is not None, "the reference refuses this file"
                params = m.params()
                for name, value in expected.items():
                    assert torch.equal(params[name].view(torch.uint8), value.view(torch.uint8)), name
        except ModelLoadError as error:
            assert str(place) in str(error)
    finally:
        shutil.rmtree(place)
