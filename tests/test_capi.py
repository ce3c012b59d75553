"""The C ABI as ``capi/nng.h`` states it: wrong handles, null pointers, bytes from strangers, forks, ownership.

The functions are called without the package's own layer, so that nothing is caught before the library sees it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from nnsight_go import _ffi

HEADER = pathlib.Path(__file__).parents[1] / "capi" / "nng.h"
OK, EFAULT, EHANDLE, EFORK, EBUSY = range(5)
NULL = None
BUF, U64, I64, I32, PTR, STR = (
    _ffi.Buf,
    ctypes.c_uint64,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_void_p,
    ctypes.c_char_p,
)

# What stands between a function's name and its error buffer. "out" is a buffer the library fills.
ARGUMENTS: dict[str, list[Any]] = {
    "version": ["out"],
    "counters": ["out"],
    "model_open": [STR, STR, ctypes.POINTER(U64)],
    "model_load": [U64],
    "hosted_new": [STR, ctypes.POINTER(U64)],
    "run_wanted": [U64, ctypes.POINTER(I32), ctypes.POINTER(I32)],
    "run_feed": [U64, ctypes.POINTER(PTR), I64],
    "run_given": [U64, "out", ctypes.POINTER(ctypes.POINTER(PTR)), ctypes.POINTER(I64)],
    "model_train": [U64, I32],
    "model_apart": [U64, I32],
    "model_explain": [U64, STR, I64, I64, "out"],
    "model_perform": [U64, STR, I64, "out"],
    "model_close": [U64],
    "model_describe": [U64, "out"],
    "model_param": [U64, STR, ctypes.POINTER(PTR)],
    "run_new": [U64, STR, I64, ctypes.POINTER(PTR), I64, I32, ctypes.POINTER(U64)],
    "run_more": [U64, STR, I64, ctypes.POINTER(PTR), I64, I32],
    "run_step": [U64, I64, ctypes.POINTER(I32)],
    "run_results": [U64, "out", ctypes.POINTER(ctypes.POINTER(PTR)), ctypes.POINTER(I64)],
    "run_free": [U64],
    "generation_new": [U64, STR, STR, ctypes.POINTER(U64)],
    "generation_step": [U64, STR, I64, ctypes.POINTER(PTR), I64, I32, ctypes.POINTER(U64)],
    "generation_next": [U64, "out"],
    "generation_scores": [U64, ctypes.POINTER(PTR)],
    "generation_choose": [U64, PTR, ctypes.POINTER(PTR), "out"],
    "generation_end": [U64, ctypes.POINTER(I32), I64, ctypes.POINTER(I32)],
    "generation_free": [U64],
    "graph_text": [STR, I64, I32, "out"],
    "tokenizer_open": [STR, ctypes.POINTER(U64)],
    "tokenizer_close": [U64],
    "tokenizer_describe": [U64, "out"],
    "tokenizer_encode": [U64, STR, I64, I32, "out"],
    "tokenizer_ids": [U64, STR, I64, I32, "out"],
    "tokenizer_decode": [U64, ctypes.POINTER(I64), I64, I32, "out"],
    "tokenizer_tokens": [U64, ctypes.POINTER(I64), I64, "out"],
    "tokenizer_lookup": [U64, STR, "out"],
    "tokenizer_vocab": [U64, "out"],
    "stream_new": [U64, I32, ctypes.POINTER(U64)],
    "stream_step": [U64, ctypes.POINTER(I64), I64, I32, "out"],
    "stream_free": [U64],
}
PLAIN: dict[str, list[Any]] = {
    "free": [ctypes.POINTER(BUF)],
    "tensors_free": [ctypes.POINTER(PTR), I64],
    "tensor_free": [PTR],
}


class Library:
    """``libnnsight_go`` with argument types of its own."""

    def __init__(self) -> None:
        _ffi.lib()  # loads torch's libraries before
        self.c = ctypes.CDLL(str(_ffi.directory() / "libnnsight_go.so"))
        buffer = ctypes.POINTER(BUF)
        for name, arguments in ARGUMENTS.items():
            function = getattr(self.c, "nng_" + name)
            function.restype = ctypes.c_int
            function.argtypes = [buffer if a == "out" else a for a in arguments] + [buffer]
        for name, arguments in PLAIN.items():
            function = getattr(self.c, "nng_" + name)
            function.restype, function.argtypes = None, arguments

    def take(self, buffer: Any) -> bytes:
        data = ctypes.string_at(buffer.data, buffer.size) if buffer.data else b""
        self.c.nng_free(ctypes.byref(buffer))
        assert not buffer.data and not buffer.size
        return data

    def __call__(self, name: str, *given: Any) -> tuple[int, Any]:
        """Calls a function; gives its code and the fault, or what it put into its buffer."""
        out, err = BUF(), BUF()
        rest = iter(given)
        arguments = [ctypes.byref(out) if a == "out" else next(rest) for a in ARGUMENTS[name]]
        code = getattr(self.c, "nng_" + name)(*arguments, ctypes.byref(err))
        if code != OK:
            assert not out.data, "a failure leaves every other out-parameter as it was"
            return code, json.loads(self.take(err))
        assert not err.data
        return code, self.take(out)

    def ok(self, name: str, *given: Any) -> Any:
        code, result = self(name, *given)
        assert code == OK, result
        return result

    def counters(self) -> dict[str, int]:
        found: dict[str, int] = json.loads(self.ok("counters"))
        return found

    # The usual sequence, each step with what it hands out.

    def open(self, directory: pathlib.Path, **options: Any) -> int:
        handle = U64()
        self.ok("model_open", str(directory).encode(), json.dumps(options).encode(), ctypes.byref(handle))
        return handle.value

    def tokenizer(self, directory: pathlib.Path) -> int:
        handle = U64()
        self.ok("tokenizer_open", str(directory).encode(), ctypes.byref(handle))
        return handle.value

    def generation(self, model: int, tokens: int = 4) -> int:
        handle = U64()
        neutral = {"temperature": 1, "top_p": 1, "typical_p": 1, "repetition_penalty": 1}
        settings = json.dumps({"max_new_tokens": tokens} | neutral).encode()
        self.ok("generation_new", model, PROMPT, settings, ctypes.byref(handle))
        return handle.value

    def stream(self, tokenizer: int) -> int:
        handle = U64()
        self.ok("stream_new", tokenizer, 1, ctypes.byref(handle))
        return handle.value

    def start(self, model: int, data: bytes, *tensors: torch.Tensor, end: int = 1) -> tuple[int, Any]:
        """Starts a run; gives the code, and the handle or the fault."""
        handle = U64()
        given = (PTR * len(tensors))(*[_ffi.py().nngpy_unwrap(t) for t in tensors])
        pointer = ctypes.cast(given, ctypes.POINTER(PTR))
        code, fault = self("run_new", model, data, len(data), pointer, len(tensors), end, ctypes.byref(handle))
        for p in given:
            _ffi.py().nngpy_tensor_free(p)
        return code, handle.value if code == OK else fault

    def step(self, run: int, budget: int = 0) -> tuple[int, Any]:
        done = I32(-1)
        code, fault = self("run_step", run, budget, ctypes.byref(done))
        return code, done.value if code == OK else fault

    def results(self, run: int) -> tuple[list[Any], list[torch.Tensor]]:
        array, n = ctypes.POINTER(PTR)(), I64(-1)
        data = self.ok("run_results", run, ctypes.byref(array), ctypes.byref(n))
        tensors = [_ffi.py().nngpy_wrap(array[i]) for i in range(n.value)]
        self.c.nng_tensors_free(array, n.value)
        return msgspec.msgpack.decode(data), tensors


def wire(*nodes: list[Any], rows: Any = ((1, 2, 3),)) -> bytes:
    """The wire form of a trace with one invoke, each node given without its invoke, position and mode."""
    return msgspec.msgpack.encode([1, [[rows, None]], [[n[0], 0, -1, 0, *n[1:]] for n in nodes], []])


LOGITS = wire([4, "lm_head", 1, 0, ""], [8, [0, 0]])
PROMPT = b'{"rows": [[1, 2, 3]], "masks": null}'
STEP = wire([4, "lm_head", 1, 0, ""], [8, [0, 0]], rows=None)  # the generation knows its rows


def busy(n: int) -> bytes:
    """A trace that multiplies a given matrix by itself n times."""
    products = [[0, "aten::mm", [[0, i], [0, 0]], None] for i in range(n)]
    return wire([7, 0], *products, [8, [0, n]])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A GPT-2 of one layer with random weights."""
    path: pathlib.Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shapes = {"wte.weight": [16, 8], "wpe.weight": [16, 8]}
    for norm in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        shapes |= {norm + ".weight": [8], norm + ".bias": [8]}
    for layer, i, o in (("attn.c_attn", 8, 24), ("attn.c_proj", 8, 8), ("mlp.c_fc", 8, 32), ("mlp.c_proj", 32, 8)):
        shapes |= {f"h.0.{layer}.weight": [i, o], f"h.0.{layer}.bias": [o]}
    save_file({"transformer." + name: torch.randn(s) for name, s in shapes.items()}, path / "model.safetensors")
    config = {"architectures": ["GPT2LMHeadModel"], "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16}
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 16}))
    vocabulary = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(16)}, "unk_token": "w0"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": vocabulary}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return path


@pytest.fixture
def lib() -> Iterator[Library]:
    """The library; what a test opens it closes, tensors and handles."""
    library = Library()
    gc.collect()  # models that other tests have left are not this one's
    before = library.counters()
    yield library
    assert library.counters() == before


@pytest.fixture
def model(lib: Library, directory: pathlib.Path) -> Iterator[int]:
    handle = lib.open(directory)
    yield handle
    lib.ok("model_close", handle)


# ---- what the library is made of ----


def tool(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_exports_are_those_of_the_header() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    promised = set(re.findall(r"\b(nng_\w+)\(", text))
    assert promised == {"nng_" + name for name in ARGUMENTS | PLAIN}
    shown = tool("nm", "-D", "--defined-only", "--format=posix", str(_ffi.directory() / "libnnsight_go.so"))
    assert {line.split()[0].split("@")[0] for line in shown.splitlines()} == promised


def test_header_stands_alone(tmp_path: pathlib.Path) -> None:
    source = '#include "nng.h"\nint main(void) { nng_buf b = {0, 0}; nng_free(&b); return nng_version(&b, &b); }\n'
    for suffix, compiler in ((".c", ["cc", "-std=c99"]), (".cc", ["c++", "-std=c++11"])):
        (tmp_path / f"use{suffix}").write_text(source)
        warnings = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only"]
        tool(*compiler, *warnings, "-I", str(HEADER.parent), str(tmp_path / f"use{suffix}"))


@pytest.mark.parametrize(
    "name", ["libnnsight_go.so", "libnng_aten.so", "libnng_py.so", "libcgotorch.so", "libnng_cuda.so"]
)
def test_linked_libraries(name: str) -> None:
    if name == "libnng_cuda.so" and not (_ffi.directory() / name).exists():
        pytest.skip("torch is built without CUDA")
    dynamic = tool("readelf", "-dW", str(_ffi.directory() / name))
    system = "c m dl pthread rt gcc_s stdc++".split()
    more = {"libnng_py.so": ["torch_python"], "libnng_cuda.so": ["torch_cuda", "c10_cuda"]}.get(name, [])
    ours = ["c10", "torch", "torch_cpu", "nng_aten", "cgotorch", *more]
    system += ["cudart"] * (name == "libnng_cuda.so")
    allowed = {f"lib{x}.so" for x in ours} | {f"lib{x}.so." for x in system} | {"ld-linux"}
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert needed
    for library in needed:
        assert any(library == a or (a[-1] != "o" and library.startswith(a)) for a in allowed), library
    for path in re.findall(r"R(?:UN)?PATH.*\[(.*)\]", dynamic):
        assert all(p.startswith("$ORIGIN") for p in path.split(":")), path


# ---- handles ----

# A call of each function that takes a handle, the handle left open.
USES: dict[str, list[tuple[str, Callable[[], list[Any]]]]] = {
    "model": [
        ("model_load", list),
        ("model_train", lambda: [0]),
        ("model_describe", list),
        ("model_param", lambda: [b"lm_head.weight", ctypes.byref(PTR())]),
        ("run_new", lambda: [LOGITS, len(LOGITS), NULL, 0, 1, ctypes.byref(U64())]),
        ("generation_new", lambda: [PROMPT, b"{}", ctypes.byref(U64())]),
        ("model_close", list),
    ],
    "generation": [
        ("generation_step", lambda: [STEP, len(STEP), NULL, 0, 1, ctypes.byref(U64())]),
        ("generation_next", list),
        ("generation_scores", lambda: [ctypes.byref(PTR())]),
        ("generation_choose", lambda: [PTR(16), ctypes.byref(PTR())]),
        ("generation_end", lambda: [(I32 * 1)(1), 1, ctypes.byref(I32())]),
        ("generation_free", list),
    ],
    "run": [
        ("run_step", lambda: [0, ctypes.byref(I32())]),
        ("run_more", lambda: [LOGITS, len(LOGITS), NULL, 0, 1]),
        ("run_results", lambda: [ctypes.byref(ctypes.POINTER(PTR)()), ctypes.byref(I64())]),
        ("run_wanted", lambda: [ctypes.byref(I32()), ctypes.byref(I32())]),
        ("run_feed", lambda: [NULL, 0]),
        ("run_given", lambda: [ctypes.byref(ctypes.POINTER(PTR)()), ctypes.byref(I64())]),
        ("run_free", list),
    ],
    "tokenizer": [
        ("tokenizer_describe", list),
        ("tokenizer_encode", lambda: [b"w1", 2, 1]),
        ("tokenizer_ids", lambda: [b"w1", 2, 1]),
        ("tokenizer_decode", lambda: [(I64 * 1)(1), 1, 0]),
        ("tokenizer_tokens", lambda: [(I64 * 1)(1), 1]),
        ("tokenizer_lookup", lambda: [b'["w1"]']),
        ("tokenizer_vocab", list),
        ("stream_new", lambda: [1, ctypes.byref(U64())]),
        ("tokenizer_close", list),
    ],
    "stream": [
        ("stream_step", lambda: [(I64 * 1)(1), 1, 0]),
        ("stream_free", list),
    ],
}


def test_wrong_handles(lib: Library, directory: pathlib.Path, model: int) -> None:
    code, run = lib.start(model, LOGITS)
    assert code == OK
    tokenizer, closed = lib.tokenizer(directory), lib.tokenizer(directory)
    lib.ok("tokenizer_close", closed)
    generation, stream = lib.generation(model), lib.stream(tokenizer)
    live = {"model": model, "run": run, "tokenizer": tokenizer, "generation": generation, "stream": stream}
    forged = [0, 1, 2**64 - 1, 2**63, model + 1, run + 1, tokenizer + 1, closed, *range(2, 40, 7)]
    for kind, uses in USES.items():
        for name, arguments in uses:
            for handle in [h for k, h in live.items() if k != kind] + forged:
                code, fault = lib(name, handle, *arguments())
                assert (code, fault["code"]) == (EHANDLE, "HandleError"), (name, handle)
                assert kind in fault["message"], (name, fault)
    assert lib.step(run) == (OK, 1), "the true ones live"
    lib.ok("run_free", run)
    assert lib("tokenizer_ids", tokenizer, b"w3 w4", 5, 1) == (
        OK,
        b"".join(i.to_bytes(8, sys.byteorder) for i in (3, 4)),
    )
    assert lib("stream_step", stream, (I64 * 2)(3, 4), 2, 1) == (OK, b"w3 w4")
    lib.ok("stream_free", stream)
    lib.ok("tokenizer_close", tokenizer)
    lib.ok("generation_free", generation)


def test_stale_handles_and_second_frees(lib: Library, directory: pathlib.Path) -> None:
    for _ in range(3):
        model, tokenizer = lib.open(directory), lib.tokenizer(directory)
        code, run = lib.start(model, LOGITS)
        assert code == OK
        generation, stream = lib.generation(model), lib.stream(tokenizer)
        lib.ok("generation_free", generation)
        lib.ok("stream_free", stream)
        lib.ok("run_free", run)
        lib.ok("model_close", model)
        lib.ok("tokenizer_close", tokenizer)
        live = {"model": model, "run": run, "tokenizer": tokenizer, "generation": generation, "stream": stream}
        for kind, handle in live.items():
            for name, arguments in USES[kind]:
                code, fault = lib(name, handle, *arguments())
                assert (code, fault["code"]) == (EHANDLE, "HandleError"), name
                assert f"this {kind} has been closed" in fault["message"]


# ---- runs that go on ----

BLOCK = wire([4, "transformer.h.0", 1, 0, "0"], [8, [0, 0]])
# the block set to zero, and the logits after that: nodes 2 to 5
ZEROED = msgspec.msgpack.encode(
    [
        1,
        [],
        [
            [0, 0, -1, 0, "aten::zero_", [[0, 0]], None],
            [4, 0, -1, 0, "lm_head", 1, 0, ""],
            [8, 0, -1, 0, [0, 3]],
            [8, 0, -1, 0, [0, 0]],
        ],
        [],
    ]
)


def test_a_run_goes_on(lib: Library, model: int) -> None:
    lib.ok("model_load", model)
    before = lib.counters()
    code, hasty = lib.start(model, BLOCK, end=0)
    assert code == OK
    assert lib("run_more", hasty, ZEROED, len(ZEROED), NULL, 0, 1)[1]["message"].startswith("this run is not done")
    lib.ok("run_free", hasty)
    code, run = lib.start(model, BLOCK, end=0)
    assert lib.step(run) == (OK, 1)
    saved, (block,) = lib.results(run)
    assert saved == [[1, [0, 0]]]
    assert block.abs().max() > 0
    lib.ok("run_more", run, ZEROED, len(ZEROED), NULL, 0, 1)
    assert lib.step(run) == (OK, 1)
    saved, (logits, zeroed) = lib.results(run)
    assert [node for node, _ in saved] == [4, 5]
    assert zeroed.data_ptr() == block.data_ptr(), "the tensor that was handed over before"
    assert zeroed.abs().max() == 0
    whole = wire(
        [4, "transformer.h.0", 1, 0, "0"], [0, "aten::zero_", [[0, 0]], None], [4, "lm_head", 1, 0, ""], [8, [0, 2]]
    )
    code, alone = lib.start(model, whole)
    assert code == OK
    lib.step(alone)
    assert torch.equal(lib.results(alone)[1][0], logits)
    code, fault = lib("run_more", run, ZEROED, len(ZEROED), NULL, 0, 1)
    assert (code, fault["message"]) == (EHANDLE, "this run has ended")
    for handle in (run, alone):
        lib.ok("run_free", handle)
    assert lib.counters() == before
    assert lib("run_step", run, 0, ctypes.byref(I32()))[0] == EHANDLE


def test_what_is_added_is_held_to_the_rules(lib: Library, model: int) -> None:
    lib.ok("model_load", model)
    before = lib.counters()["tensors"]
    forward = msgspec.msgpack.encode([1, [], [[8, 0, -1, 0, [0, 7]]], []])
    for more in (forward, b"junk", wire([4, "nowhere", 1, 0, ""])):
        code, run = lib.start(model, BLOCK, end=0)
        assert code == OK
        assert lib.step(run) == (OK, 1)
        lib.results(run)
        assert lib("run_more", run, more, len(more), NULL, 0, 0)[0] == EFAULT
        assert lib.counters()["tensors"] == before, "a run that failed has freed what it held"
        lib.ok("run_free", run)


# ---- generations ----


def test_a_generation_is_a_chain_of_runs(lib: Library, model: int) -> None:
    lib.ok("model_load", model)
    before = lib.counters()
    generation = lib.generation(model, tokens=3)
    for step in range(3):
        run = U64()
        lib.ok("generation_step", generation, STEP, len(STEP), NULL, 0, 1, ctypes.byref(run))
        assert lib.step(run.value) == (OK, 1)
        _, (logits,) = lib.results(run.value)
        lib.ok("run_free", run.value)
        drawn = json.loads(lib.ok("generation_next", generation))
        assert logits.shape == (1, 1, 16)
        assert drawn == {"tokens": [int(logits.argmax())], "done": step == 2}
    assert lib("generation_step", generation, STEP, len(STEP), NULL, 0, 1, ctypes.byref(U64()))[0] == EHANDLE
    lib.ok("generation_free", generation)
    assert lib.counters() == before


def test_a_run_outlives_no_generation(lib: Library, model: int) -> None:
    lib.ok("model_load", model)
    before = lib.counters()
    generation, run = lib.generation(model), U64()
    lib.ok("generation_step", generation, STEP, len(STEP), NULL, 0, 1, ctypes.byref(run))
    lib.ok("generation_free", generation)
    code, fault = lib.step(run.value)
    assert (code, fault["message"]) == (EHANDLE, "the generation of this run has ended")
    lib.ok("run_free", run.value)
    assert lib.counters() == before


def test_what_generations_refuse(lib: Library, model: int) -> None:
    before = lib.counters()
    for prompt, settings in ((b"{", b"{}"), (PROMPT, b"["), (PROMPT, b'{"max_new_tokens": 0}'), (b"{}", b"{}")):
        code, fault = lib("generation_new", model, prompt, settings, ctypes.byref(U64()))
        assert (code, fault["code"]) == (EFAULT, "InputError"), (prompt, settings)
    assert lib.counters() == before


def test_graphs_are_printed(lib: Library) -> None:
    text = lib.ok("graph_text", LOGITS, len(LOGITS), 0).decode()
    assert "read lm_head.output" in text
    assert "flowchart" in lib.ok("graph_text", LOGITS, len(LOGITS), 1).decode()
    assert lib("graph_text", b"junk", 4, 0)[1]["code"] == "GraphError"


def test_close_with_a_run_under_way(lib: Library, directory: pathlib.Path) -> None:
    model = lib.open(directory)
    code, run = lib.start(model, LOGITS)
    assert code == OK
    weight = PTR()
    lib.ok("model_param", model, b"lm_head.weight", ctypes.byref(weight))
    lib.ok("model_close", model)
    assert lib.start(model, LOGITS)[0] == EHANDLE
    assert lib.step(run) == (OK, 1)
    _, (logits,) = lib.results(run)
    lib.ok("run_free", run)
    head = _ffi.py().nngpy_wrap(weight)
    _ffi.py().nngpy_tensor_free(weight)
    assert logits.shape == (1, 3, 16) and torch.isfinite(logits).all()
    assert head.shape == (16, 8) and torch.isfinite(head).all(), "what was handed out stays valid"


def test_a_run_belongs_to_one_call_at_a_time(lib: Library, model: int) -> None:
    data = busy(300)
    code, run = lib.start(model, data, torch.eye(512))
    assert code == OK

    def work() -> None:
        while lib.step(run)[0] == EBUSY:  # the other one was there first
            pass

    worker = threading.Thread(target=work)
    worker.start()
    seen = None
    while worker.is_alive() and seen is None:
        time.sleep(0.01)  # by far the longer part, so that the worker gets its turn
        code, fault = lib.step(run, 1)
        if code != OK:
            seen = code, fault
    freed = lib("run_free", run)[0]  # waits for the call under way
    worker.join()
    assert seen is not None and seen[0] == EBUSY and "another thread" in seen[1]["message"]
    assert freed == OK
    assert lib.step(run)[0] == EHANDLE


# ---- arguments ----


def test_null_pointers(lib: Library, directory: pathlib.Path, model: int) -> None:
    tokenizer = lib.tokenizer(directory)
    code, run = lib.start(model, LOGITS)
    assert code == OK and lib.step(run) == (OK, 1)
    generation, stream = lib.generation(model), lib.stream(tokenizer)
    handles = {"model": model, "run": run, "tokenizer": tokenizer, "generation": generation, "stream": stream}
    before = lib.counters()
    for name, arguments in ARGUMENTS.items():
        function = getattr(lib.c, "nng_" + name)
        kind = {"generation_new": "model", "stream_new": "tokenizer"}.get(name, name.split("_")[0])
        first: list[Any] = [handles[kind]] if arguments[0] is U64 else []
        rest = [5 if a in (I64, I32) else NULL for a in arguments[len(first) :]]
        if NULL not in rest:
            continue  # nothing can be left out but the error buffer
        err = BUF()
        assert function(*first, *rest, ctypes.byref(err)) == EFAULT, name
        fault = json.loads(lib.take(err))
        assert fault["code"] == "InputError", fault
        assert function(*first, *rest, NULL) == EFAULT, "nobody wants to know why"
    assert lib.counters() == before
    assert lib.results(run)[0] == [[1, [0, 0]]], "a refused call takes nothing"
    lib.c.nng_free(NULL)
    lib.c.nng_free(ctypes.byref(BUF()))
    lib.c.nng_tensor_free(NULL)
    lib.c.nng_tensors_free(NULL, 3)
    lib.ok("generation_free", generation)
    lib.ok("stream_free", stream)
    lib.ok("run_free", run)
    lib.ok("tokenizer_close", tokenizer)


def test_negative_sizes(lib: Library, directory: pathlib.Path, model: int) -> None:
    tokenizer = lib.tokenizer(directory)
    handle = U64()
    for given in [
        (LOGITS, -1, NULL, 0),
        (LOGITS, len(LOGITS), NULL, -1),
        (NULL, 3, NULL, 0),
        (LOGITS, len(LOGITS), NULL, 2),
    ]:
        code, fault = lib("run_new", model, *given, 1, ctypes.byref(handle))
        assert (code, fault["code"]) == (EFAULT, "InputError")
    assert lib("run_new", model, NULL, 0, NULL, 0, 1, ctypes.byref(handle))[1]["code"] == "GraphError"
    nothing = (PTR * 1)(None)
    code, fault = lib(
        "run_new", model, LOGITS, len(LOGITS), ctypes.cast(nothing, ctypes.POINTER(PTR)), 1, 1, ctypes.byref(handle)
    )
    assert (code, fault["code"]) == (EFAULT, "InputError")
    for name, given in {"tokenizer_ids": (b"w1", -1, 1), "tokenizer_decode": ((I64 * 1)(), -1, 0)}.items():
        assert lib(name, tokenizer, *given)[0] == EFAULT
    lib.c.nng_tensors_free(ctypes.cast(_malloc(8), ctypes.POINTER(PTR)), -5)  # frees the array, and no more
    lib.ok("tokenizer_close", tokenizer)


def _malloc(n: int) -> int:
    malloc = ctypes.CDLL(None).malloc
    malloc.restype, malloc.argtypes = PTR, [ctypes.c_size_t]
    address: int = malloc(n)
    return address


def test_options_and_names(lib: Library, directory: pathlib.Path, model: int) -> None:
    handle, tensor = U64(), PTR()
    path = str(directory).encode()
    for options, says in {b"{": "not JSON", b'{"dtype": "float31"}': "float31", b'{"device": "tpu"}': "tpu"}.items():
        code, fault = lib("model_open", path, options, ctypes.byref(handle))
        if code == OK:  # dtype and device are looked at where weights are
            code, fault = lib("model_load", handle)
            lib.ok("model_close", handle)
        assert code == EFAULT and says in json.dumps(fault)
    for name in (b"", b"no/such/model/here", b"\xff\xfe", str(directory / "config.json").encode(), b"x" * 100_000):
        code, fault = lib("model_open", name, NULL, ctypes.byref(handle))
        assert (code, fault["code"]) == (EFAULT, "ModelLoadError"), name
        assert lib("tokenizer_open", name, ctypes.byref(handle))[0] == EFAULT
    code, fault = lib("model_param", model, b"transformer.wte.wieght", ctypes.byref(tensor))
    assert (code, fault["code"]) == (EFAULT, "ModulePathError") and "transformer.wte.weight" in fault["hint"]


# ---- graphs from strangers ----

SAMPLE = wire(
    [4, "transformer.h.0", 1, 0, "0"],
    [0, "aten::mul", [[0, 0], 2.5], None],
    [1, [0, 1], [2, [4, None, 2, None], [5]]],
    [2, [0, 0], [5], 0.5],
    [5, "transformer.h.0", 1, 0, "0", [0, 1]],
    [0, "aten::topk", [[0, 1]], {"k": 2, "dim": -1}],
    [3, [0, 5], 1],
    [6, "transformer.ln_f", [[0, 1]], None],
    [7, 0],
    [0, "aten::add", [[0, 7], [0, 8]], None],
    [8, [3, "a", [0, 9], "b", [1, [0, 6], 3]]],
    [4, "lm_head", 1, 0, ""],
    [8, [0, 11]],
)


def test_random_bytes(lib: Library, model: int) -> None:
    r = random.Random(1)
    for _ in range(3000):
        data = r.randbytes(r.choice([0, 1, 2, 3, 5, 8, 20, 200]))
        if r.random() < 0.7:  # begins as a graph does, so that more than its head is read
            data = SAMPLE[: r.randrange(12)] + data
        code, fault = lib.start(model, data)
        assert code == EFAULT, data
        assert fault["code"] == "GraphError", (data, fault)


def test_spoilt_graphs(lib: Library, model: int) -> None:
    bias = torch.ones(8)
    code, run = lib.start(model, SAMPLE, bias)
    assert code == OK, run
    assert lib.step(run) == (OK, 1)
    lib.ok("run_free", run)
    lib.ok("model_load", model)
    loaded = lib.counters()
    r = random.Random(2)
    codes: dict[str, int] = {}
    for _ in range(4000):
        data = bytearray(SAMPLE)
        for _ in range(r.choice([1, 1, 2, 4])):
            match r.randrange(4):
                case 0:
                    data[r.randrange(len(data))] = r.randrange(256)
                case 1:
                    del data[r.randrange(len(data)) :][: r.choice([1, 5, 1000])]
                case 2:
                    data[r.randrange(len(data))] ^= 1 << r.randrange(8)
                case 3:
                    at = r.randrange(len(data))
                    data[at:at] = data[r.randrange(len(data)) :][: r.randrange(9)]
            if not data:
                data = bytearray(b"\xc0")
        code, run = lib.start(model, bytes(data), bias)
        if code == OK:
            code, fault = lib.step(run)
            lib.ok("run_free", run)
        else:
            fault = run
        name = "ran" if code == OK else fault["code"]
        codes[name] = codes.get(name, 0) + 1
    assert lib.counters() == loaded
    expected = {"ran", "GraphError", "ModulePathError", "InputError", "OutOfOrderError", "OpError"}
    assert set(codes) <= expected, codes
    assert codes["GraphError"] > 1000 and codes["ran"] > 50 and codes["OpError"] > 20, codes


def test_a_failed_run_can_only_be_freed(lib: Library, model: int) -> None:
    lib.ok("model_load", model)
    before = lib.counters()
    data = wire([4, "lm_head", 1, 0, ""], [0, "aten::no_such_op", [[0, 0]], None], [8, [0, 1]])
    code, run = lib.start(model, data)
    assert code == OK
    code, fault = lib.step(run)
    assert (code, fault["code"], fault["node"]) == (EFAULT, "OpError", 1) and "no operator" in fault["message"]
    assert lib.counters()["tensors"] == before["tensors"], "it has freed its tensors"
    assert lib.step(run)[0] == EHANDLE
    array, n = ctypes.POINTER(PTR)(), I64()
    assert lib("run_results", run, ctypes.byref(array), ctypes.byref(n))[0] == EHANDLE
    lib.ok("run_free", run)


def test_results_move_out(lib: Library, model: int) -> None:
    code, run = lib.start(model, LOGITS)
    assert code == OK
    array, n = ctypes.POINTER(PTR)(), I64()
    code, fault = lib("run_results", run, ctypes.byref(array), ctypes.byref(n))
    assert code == EHANDLE and "not done" in fault["message"]
    assert lib.step(run) == (OK, 1)
    (entry,), (logits,) = lib.results(run)
    assert entry == [1, [0, 0]] and logits.shape == (1, 3, 16)
    assert lib.results(run) == ([], [])
    lib.ok("run_free", run)


def test_steps_are_short(lib: Library, model: int) -> None:
    data = busy(120)
    code, run = lib.start(model, data, torch.eye(512))
    assert code == OK
    took, done = [], 0
    while not done:
        begun = time.perf_counter()
        code, done = lib.step(run, 20)
        assert code == OK
        took.append(time.perf_counter() - begun)
    lib.ok("run_free", run)
    assert len(took) > 2 and sorted(took)[len(took) // 2] < 0.1, took


# ---- processes ----


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_fork(lib: Library, directory: pathlib.Path, model: int) -> None:
    code, run = lib.start(model, LOGITS)
    assert code == OK
    tokenizer, generation = lib.tokenizer(directory), lib.generation(model)
    stream = lib.stream(tokenizer)
    tensor = PTR()
    lib.ok("model_param", model, b"lm_head.weight", ctypes.byref(tensor))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            handles = {"model": model, "run": run, "tokenizer": tokenizer, "generation": generation, "stream": stream}
            calls = [(name, handles[kind], arguments()) for kind, uses in USES.items() for name, arguments in uses]
            told = [lib(name, handle, *arguments) for name, handle, arguments in calls]
            told += [lib("version"), lib("counters")]
            told += [lib("model_open", str(directory).encode(), NULL, ctypes.byref(U64()))]
            told += [lib("tokenizer_open", str(directory).encode(), ctypes.byref(U64()))]
            lib.c.nng_tensor_free(tensor)  # does nothing
            lib.c.nng_tensors_free(ctypes.cast(ctypes.byref(tensor), ctypes.POINTER(PTR)), 1)
            fine = all(
                code == EFORK and fault["code"] == "ForkError" and "spawn" in fault["hint"] for code, fault in told
            )
            status = 0 if fine and len(told) == len(calls) + 4 else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert ended == (child, 0), "the child must be told, not hang"
    assert lib.step(run) == (OK, 1), "the parent goes on"
    lib.ok("run_free", run)
    lib.ok("generation_free", generation)
    lib.ok("stream_free", stream)
    lib.ok("tokenizer_close", tokenizer)
    lib.c.nng_tensor_free(tensor)


def test_a_process_ends_with_nothing_held(directory: pathlib.Path) -> None:
    script = """if True:
        import pathlib, sys
        import test_capi
        lib, directory = test_capi.Library(), pathlib.Path(sys.argv[1])
        assert not any(lib.counters().values())
        model, tokenizer = lib.open(directory, load=True), lib.tokenizer(directory)
        for _ in range(50):
            code, run = lib.start(model, test_capi.SAMPLE, test_capi.torch.ones(8))
            assert code == 0 and lib.step(run) == (0, 1)
            entries, tensors = lib.results(run)
            lib.ok("run_free", run)
        lib.ok("model_close", model)
        lib.ok("tokenizer_close", tokenizer)
        assert not any(lib.counters().values()), lib.counters()
        print("done", len(entries))
    """
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent / "python"), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-c", script, str(directory)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["done", "2"]


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_loading_leaves_torch_its_threads(threads: int | None) -> None:
    script = """if True:
        import sys, torch
        if len(sys.argv) > 1:
            torch.set_num_threads(int(sys.argv[1]))
        from nnsight_go import _ffi
        _ffi.lib()
        (torch.randn(512, 512) @ torch.randn(512, 512)).sum()
        print(torch.get_num_threads())
    """
    here = pathlib.Path(__file__).parent
    given = [str(threads)] if threads else []
    path = os.pathsep.join([str(here.parent / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    ran = subprocess.run(
        [sys.executable, "-c", script, *given],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": path},
    )
    assert ran.returncode == 0, ran.stderr
    want = threads or int(
        subprocess.run(
            [sys.executable, "-c", "import torch; print(torch.get_num_threads())"],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        ).stdout
    )
    assert int(ran.stdout) == want


def test_concurrent_use(lib: Library, model: int) -> None:
    failures: list[Any] = []

    def work(seed: int) -> None:
        try:
            for _ in range(20):
                code, run = lib.start(model, LOGITS if seed % 2 else SAMPLE, *([] if seed % 2 else [torch.ones(8)]))
                assert code == OK, run
                done = 0
                while not done:
                    code, done = lib.step(run, 1)
                    assert code == OK, done
                _, tensors = lib.results(run)
                assert all(t.numel() for t in tensors)
                lib.ok("run_free", run)
        except BaseException as e:
            failures.append(e)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not failures, failures
