"""Names of models become directories: built-in models, the cache, downloads and what can go wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import hubserver
from nnsight_go import hub
from nnsight_go.errors import ModelLoadError

GPT2 = "openai-community/gpt2"
SECRET = "hf_test_secret"
VARIABLES = (
    "HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_TOKEN HUGGING_FACE_HUB_TOKEN HUGGINGFACE_HUB_CACHE HF_HOME XDG_CACHE_HOME"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with random weights, and clutter as real repositories have it."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=2, n_positions=16, vocab_size=11)
    transformers.GPT2LMHeadModel(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}')
    (directory / "tokenizer_config.json").write_text("{}")
    for clutter in ("pytorch_model.bin", "tf_model.h5", "onnx/model.safetensors", "onnx/config.json", "README.md"):
        (directory / clutter).parent.mkdir(exist_ok=True)
        (directory / clutter).write_bytes(b"not wanted")
    return directory


WANTED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="session")
def sharded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in several shards."""
    directory = tmp_path_factory.mktemp("sharded")
    transformers.GPT2LMHeadModel.from_pretrained(model).save_pretrained(directory, max_shard_size="3KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    shutil.copy(model / "tokenizer.json", directory)
    return directory


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[hubserver.HubServer]:
    """A hub of its own and an empty cache for one test."""
    for name in VARIABLES.split():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    impatient = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None})  # it waits before each new try
    monkeypatch.setattr("huggingface_hub.file_download.time", impatient)
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    with hubserver.HubServer() as s:
        monkeypatch.setenv("HF_ENDPOINT", s.url)
        yield s


def files(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir()}


def failure(*args: object, **kwargs: object) -> str:
    """The message of the error that resolving ends in."""
    with pytest.raises(ModelLoadError) as caught:
        hub.resolve(*args, progress=False, **kwargs)  # type: ignore[arg-type]
    assert isinstance(caught.value, OSError)
    assert SECRET not in str(caught.value)
    return str(caught.value)


def test_download_brings_what_is_needed_and_nothing_else(server: hubserver.HubServer, model: Path) -> None:
    commit = server.add(GPT2, model)
    found = hub.resolve(GPT2, progress=False)
    assert found.name == commit
    assert files(found) == WANTED
    for name in WANTED:
        assert (found / name).read_bytes() == (model / name).read_bytes()
    loaded = transformers.GPT2LMHeadModel.from_pretrained(found)
    expected = transformers.GPT2LMHeadModel.from_pretrained(model)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_second_call_needs_no_hub(server: hubserver.HubServer, model: Path) -> None:
    server.add(GPT2, model)
    first = hub.resolve(GPT2, progress=False)
    before = len(server.requests)
    assert hub.resolve(GPT2) == first
    assert len(server.requests) == before, "a model that is in the cache is not asked for"
    server.stop()
    assert hub.resolve(GPT2) == first
    assert hub.resolve(GPT2, local_files_only=True) == first
    assert hub.resolve(GPT2, revision=first.name) == first


def test_shards(server: hubserver.HubServer, sharded: Path) -> None:
    server.add("org/large", {**hubserver.read(sharded), "model-extra.safetensors": b"not of the index"})
    found = hub.resolve("org/large", progress=False)
    assert files(found) == files(sharded)
    server.stop()
    assert hub.resolve("org/large") == found


def test_a_whole_file_comes_before_shards(server: hubserver.HubServer, model: Path, sharded: Path) -> None:
    server.add("org/both", {**hubserver.read(sharded), "model.safetensors": (model / "model.safetensors").read_bytes()})
    found = hub.resolve("org/both", progress=False)
    assert not list(found.glob("model-*"))
    assert not server.asked("model-0")


def test_missing_shards_are_fetched(server: hubserver.HubServer, sharded: Path) -> None:
    server.add("org/large", sharded)
    found = hub.resolve("org/large", progress=False)
    lost = sorted(found.glob("model-*"))[1]
    lost.resolve().unlink()
    lost.unlink()
    server.requests.clear()
    assert hub.resolve("org/large", progress=False) == found
    assert files(found) == files(sharded)
    assert {r.path.rpartition("/")[2] for r in server.asked("/resolve/") if r.method == "GET"} == {lost.name}


def test_part_of_a_model_is_completed(server: hubserver.HubServer, model: Path, tmp_path: Path) -> None:
    """As left by a program that fetched the config and the weights, but not the tokenizer."""
    commit = server.add(GPT2, model)
    root = tmp_path / "cache" / "models--openai-community--gpt2"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, snapshot)
    server.fail["/api/"] = 500
    assert hub.resolve(GPT2, progress=False) == snapshot, "what is there is better than nothing"
    assert hub.resolve(GPT2, local_files_only=True) == snapshot
    server.fail.clear()
    assert hub.resolve(GPT2, progress=False) == snapshot
    assert files(snapshot) == WANTED


def test_a_model_without_tokenizer_is_whole(server: hubserver.HubServer, model: Path) -> None:
    bare = {k: v for k, v in hubserver.read(model).items() if k in ("config.json", "model.safetensors")}
    server.add("org/bare", bare)
    found = hub.resolve("org/bare", progress=False)
    server.requests.clear()
    assert hub.resolve("org/bare", progress=False) == found
    assert not server.requests


def test_offline(server: hubserver.HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(GPT2, model)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = failure(GPT2)
    assert (
        "not in the local cache" in message and "HF_HUB_OFFLINE is set" in message and f"hf download {GPT2}" in message
    )
    assert not server.requests
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "local_files_only is set" in failure(GPT2, local_files_only=True)
    assert not server.requests
    found = hub.resolve(GPT2, progress=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.resolve(GPT2) == found
    (found / "model.safetensors").unlink()
    assert "only in part" in failure(GPT2)


def test_revisions(server: hubserver.HubServer, model: Path) -> None:
    main = server.add(GPT2, model)
    tagged = server.add(GPT2, {**hubserver.read(model), "generation_config.json": b'{"eos_token_id": 1}'}, "v1.0")
    pull = server.add(GPT2, {**hubserver.read(model), "generation_config.json": b'{"eos_token_id": 2}'}, "refs/pr/1")
    assert hub.resolve(GPT2, progress=False).name == main
    assert hub.resolve(GPT2, revision="v1.0", progress=False).name == tagged
    assert hub.resolve(GPT2, revision=pull, progress=False).name == pull
    assert hub.resolve(GPT2, revision="refs/pr/1", progress=False).name == pull
    assert (hub.resolve(GPT2, revision="v1.0") / "generation_config.json").read_bytes() == b'{"eos_token_id": 1}'
    message = failure(GPT2, revision="v9")
    assert f"{GPT2} has no revision v9" in message and "/tree/main" in message
    for bad in ("", "../main", "/main"):
        assert "cannot be a revision" in failure(GPT2, revision=bad)


def test_token(server: hubserver.HubServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("org/private", model, token=SECRET)
    message = failure("org/private")
    assert "there is no model org/private" in message and "it is private" in message and "hf auth login" in message
    message = failure("org/private", token="hf_wrong")
    assert "your token does not reach it" in message
    assert all(r.authorization is None for r in server.requests[:1])
    server.requests.clear()
    hub.resolve("org/private", token=SECRET, progress=False)
    assert {r.authorization for r in server.requests} == {f"Bearer {SECRET}"}
    server.requests.clear()
    monkeypatch.setenv("HF_TOKEN", SECRET)
    server.add("org/second", model, token=SECRET)
    hub.resolve("org/second", progress=False)
    assert {r.authorization for r in server.requests} == {f"Bearer {SECRET}"}
    server.requests.clear()
    server.add("org/third", model)
    hub.resolve("org/third", token=False, progress=False)
    assert {r.authorization for r in server.requests} == {None}


def test_gated(server: hubserver.HubServer, model: Path) -> None:
    server.add("org/gated", model, token=SECRET, gated=True)
    for token in (None, "hf_no_rights"):
        message = failure("org/gated", token=token)
        assert "org/gated is gated" in message and f"Accept them at {server.url}/org/gated" in message
    assert files(hub.resolve("org/gated", token=SECRET, progress=False)) == WANTED


@pytest.mark.parametrize("fault", ["cut", "short"])
def test_a_download_that_breaks_off_leaves_nothing_to_trip_over(
    server: hubserver.HubServer, model: Path, tmp_path: Path, fault: str
) -> None:
    server.add(GPT2, model)
    if fault == "cut":
        server.cut["model.safetensors"] = (1000, 100)
    else:
        server.short["model.safetensors"] = 1000
    message = failure(GPT2)
    assert "broke off" in message and "ry again" in message
    left = [p for p in files(tmp_path / "cache") if "incomplete" in p or p.endswith("model.safetensors")]
    assert not left
    assert "only in part" in failure(GPT2, local_files_only=True)
    server.cut.clear()
    server.short.clear()
    found = hub.resolve(GPT2, progress=False)
    assert (found / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_hiccup_is_got_over(server: hubserver.HubServer, model: Path) -> None:
    server.add(GPT2, model)
    server.cut["model.safetensors"] = (4000, 2)
    found = hub.resolve(GPT2, progress=False)
    assert (found / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert [r.method for r in server.asked("model.safetensors")] == ["HEAD", "GET", "GET", "GET"]


def test_no_network(server: hubserver.HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.stop()
    message = failure(GPT2)
    assert f"{server.url} cannot be reached" in message and "HF_ENDPOINT" in message and "Connect" in message
    for bad in ("ftp://x", "nonsense", "http://[::", "http://"):
        monkeypatch.setenv("HF_ENDPOINT", bad)
        assert "is no address" in failure(GPT2)


def test_hub_out_of_order(server: hubserver.HubServer, model: Path) -> None:
    server.add(GPT2, model)
    server.fail["config.json"] = 500
    assert "(status 500)" in failure(GPT2)
    server.fail = {"/api/": 403}
    message = failure(GPT2, token=SECRET)
    assert "(status 403)" in message or "refused" in message


def test_repositories_that_are_no_models(server: hubserver.HubServer, model: Path, sharded: Path) -> None:
    whole = hubserver.read(model)
    server.add("org/pickled", {k: v for k, v in whole.items() if k != "model.safetensors"})
    message = failure("org/pickled")
    assert "no whole safetensors" in message and "pickle" in message and "save_pretrained" in message
    server.add("org/onnx", {"config.json": b"{}", "onnx/model.safetensors": b"x"})
    assert "It holds config.json, onnx/model.safetensors" in failure("org/onnx")
    server.add("org/data", {"train.csv": b"x", "README.md": b"x"})
    assert "holds no config.json" in failure("org/data")
    shards = hubserver.read(sharded)
    lost = next(k for k in shards if k.startswith("model-00002"))
    server.add("org/torn", {k: v for k, v in shards.items() if k != lost})
    assert lost in failure("org/torn")
    index = json.dumps({"weight_map": {"w": "../../../secret.safetensors"}}).encode()
    server.add("org/hostile", {"config.json": b"{}", "model.safetensors.index.json": index})
    assert "no whole safetensors" in failure("org/hostile")
    assert not server.asked("secret")


def test_unknown_names(server: hubserver.HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_built_in_root", lambda: tmp_path / "models")
    (tmp_path / "models" / "landmarks").mkdir(parents=True)
    assert "there is no model org/nothing" in failure("org/nothing")
    assert "Did you mean nnsight-go/landmarks?" in failure("landmark")
    message = failure("nnsight-go/landmark")
    assert "comes with this package" in message and "nnsight-go/landmarks" in message
    before = len(server.requests)
    for bad in ("", "a b", "org/na--me", "org/..", "ü/x"):
        assert "neither a directory nor the name of a model" in failure(bad)
    assert len(server.requests) == before


def test_paths(server: hubserver.HubServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.resolve(str(model)) == model
    assert hub.resolve(model) == model
    monkeypatch.chdir(model.parent)
    assert hub.resolve(model.name).resolve() == model.resolve()
    assert hub.resolve("./" + model.name).resolve() == model.resolve()
    monkeypatch.setenv("HOME", str(model.parent))
    assert hub.resolve("~/" + model.name) == model
    (tmp_path / "my-model").mkdir()
    assert f"the directory {tmp_path}/my-modle does not exist" in failure(f"{tmp_path}/my-modle")
    assert "my-model" in failure(f"{tmp_path}/my-modle")
    for path in ("./x", "../x", "~/x", "a/b/c", "x/", "./x/y"):
        assert "does not exist" in failure(path)
    assert "does not exist" in failure(Path("org/name")), "a Path is never the name of a model"
    assert "is a file" in failure(str(model / "config.json"))
    assert not server.requests


def test_built_in_models(server: hubserver.HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_built_in_root", lambda: tmp_path)
    (tmp_path / "landmarks").mkdir()
    (tmp_path / "card.md").touch()
    assert hub.built_in_models() == ["nnsight-go/landmarks"]
    assert hub.resolve("nnsight-go/landmarks") == tmp_path / "landmarks"
    for name in ("nnsight-go/", "nnsight-go/..", "nnsight-go/landmarks/", "nnsight-go/../" + tmp_path.name):
        with pytest.raises(ModelLoadError):
            hub.resolve(name)
    assert not server.requests


def test_the_built_in_model_answers_as_gpt2(server: hubserver.HubServer) -> None:
    names = hub.built_in_models()
    if not names:
        pytest.skip("no built-in model stands in python/nnsight_go/models")
    directory = hub.resolve(names[0])
    server.add(GPT2, directory)
    found = hub.resolve(GPT2, progress=False)
    assert (found / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same as huggingface_hub's, for each variable set in turn."""
    for name in [*VARIABLES.split(), "HF_HUB_CACHE"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOMEWHERE", "/some/where")
    script = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    for name, value in [
        ("UNRELATED", ""),
        ("XDG_CACHE_HOME", "/x"),
        ("HF_HOME", "~/h"),
        ("HUGGINGFACE_HUB_CACHE", "/old"),
        ("HF_HUB_CACHE", "$SOMEWHERE/c"),
    ]:
        monkeypatch.setenv(name, value)
        theirs = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        assert str(hub.cache_root()) == theirs.strip()


def test_cache_dir(server: hubserver.HubServer, model: Path, tmp_path: Path) -> None:
    server.add(GPT2, model)
    found = hub.resolve(GPT2, cache_dir=tmp_path / "other", progress=False)
    assert found.is_relative_to(tmp_path / "other")
    assert not (tmp_path / "cache").exists()


def test_a_hostile_ref_leads_nowhere(server: hubserver.HubServer, tmp_path: Path) -> None:
    root = tmp_path / "cache" / "models--org--name"
    (root / "refs").mkdir(parents=True)
    (root / "snapshots").mkdir()
    for text in ("..", "../../..", "", "main"):
        (root / "refs" / "main").write_text(text)
        assert "not in the local cache" in failure("org/name", local_files_only=True)


def test_progress(server: hubserver.HubServer, model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    server.add("org/loud", model)
    hub.resolve("org/loud")
    assert "Fetching" in capfd.readouterr().err
    server.add("org/silent", {**hubserver.read(model), "vocab.json": b"{}"})
    hub.resolve("org/silent", progress=False)
    assert capfd.readouterr().err == ""


def test_a_full_disk(server: hubserver.HubServer, model: Path, tmp_path: Path) -> None:
    """A cache that cannot be written: its place is taken by a file."""
    server.add(GPT2, model)
    (tmp_path / "file").touch()
    message = failure(GPT2, cache_dir=tmp_path / "file" / "cache")
    assert "cannot be written to the cache" in message and "HF_HUB_CACHE" in message


def test_a_model_at_hand_opens_without_the_library(server: hubserver.HubServer, model: Path) -> None:
    """Importing huggingface_hub takes longer than opening a model."""
    server.add(GPT2, model)
    hub.resolve(GPT2, progress=False)
    script = (
        "import importlib.util, sys, types\n"
        "package = types.ModuleType('nnsight_go'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['nnsight_go'] = package\n"
        "from nnsight_go import hub\n"
        f"hub.resolve({GPT2!r})\n"
        "assert 'huggingface_hub' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, os.path.dirname(hub.__file__)], check=True)


def test_nobody_listens_but_this_machine() -> None:
    with hubserver.HubServer() as s:
        assert s.url.startswith("http://127.0.0.1:")
        port = int(s.url.rpartition(":")[2])
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "a stopped hub frees its port"
