"""Builds the engine's libraries: ``python tools/build/native.py [--only NAME]``.

Run with the Python whose torch the libraries are for. Into ``python/nnsight_go/_lib/`` go

    libcgotorch.so    gotorch's C++ half, from the Go module cache, unchanged
    libnng_aten.so    pybind/aten.cc: libtorch for the Go engine
    libnng_cuda.so    pybind/cuda.cc: CUDA graphs for libnng_aten.so, where torch is built with CUDA
    libnng_py.so      pybind/pyobj.cc: Python objects and tensors (for this Python's version)
    libtokenizers.a   the Rust half of engine/token; Go programs link it
    libnnsight_go.so  the Go engine, from capi/
    nnsight-go        the command, from cmd/nnsight-go: the server of remote traces

The first five are kept in a cache of the user, ``$XDG_CACHE_HOME/nnsight-go/<name>/<hash>/``, where
the hash covers all that goes into them: sources, flags, compiler, torch. A new clone takes them from
there, and a branch switched back and forth compiles nothing twice. Go has a cache of its own.

No library holds a path of the machine that built it: torch is found at run time, in the process
that imported it or, from an installed wheel, at ``$ORIGIN/../../torch/lib``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import filecmp
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIB = ROOT / "python" / "nnsight_go" / "_lib"
SCRATCH = ROOT / "build"  # what is not shipped
KEPT = 8  # entries of the cache to keep, of each name
JOBS = int(os.environ.get("NNSIGHT_GO_JOBS") or min(os.cpu_count() or 1, 4))  # a compiler takes about 1 GB

# The engine's libraries lie next to torch in an installed wheel: site-packages/{nnsight_go/_lib,torch/lib}.
RUNPATH = "-Wl,-rpath,$ORIGIN:$ORIGIN/../../torch/lib"
CXXFLAGS = ["-std=c++20", "-O2", "-fPIC"]
VECTORS = ["-ftree-vectorize", "-fopenmp-simd"]  # of loops that say so; needs no OpenMP at run time
TORCH_LIBS = ["-lc10", "-ltorch", "-ltorch_cpu"]


class BuildError(Exception):
    """A step failed; the message is for the person who ran it."""


def say(text: str) -> None:
    print(f"build: {text}", flush=True)


def run(command: list[str | pathlib.Path], **options: object) -> str:
    """Runs a command and gives its standard output; its errors go to the terminal. Raises BuildError."""
    words = [str(c) for c in command]
    try:
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    except FileNotFoundError:
        raise BuildError(f"{words[0]} is not installed (see tools/build/doctor.sh)") from None
    except subprocess.CalledProcessError as e:
        print(e.stdout, end="", file=sys.stderr)
        raise BuildError(f"failed with status {e.returncode}: {' '.join(words[:4])} ...") from None
    return str(done.stdout)


# ---- what goes in ----


@functools.cache
def torch_dir() -> pathlib.Path:
    """The torch package of this Python, found without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"no torch in {sys.executable}: run `make venv`, or pip install 'torch==2.15.*'")
    return pathlib.Path(spec.submodule_search_locations[0])


@functools.cache
def torch_version() -> str:
    found = re.search(r"__version__ = '([^']+)'", (torch_dir() / "version.py").read_text())
    if not found:
        raise BuildError(f"{torch_dir()}/version.py tells no version")
    return found[1]


@functools.cache
def compiler() -> list[str]:
    return (os.environ.get("CXX") or "g++").split()


@functools.cache
def compiler_id() -> str:
    return run([*compiler(), "--version"]).splitlines()[0] + " " + run([*compiler(), "-dumpmachine"])


def module_dir(path: str) -> pathlib.Path:
    """Where the Go module lies, at the version go.mod names; downloads it if need be."""
    return pathlib.Path(json.loads(run(["go", "mod", "download", "-json", path], cwd=ROOT))["Dir"])


# ---- the cache ----


def cache_root() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "nnsight-go"


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock file, so that two builds of one thing do not both do the work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def digest(texts: Iterable[str], files: Iterable[tuple[str, pathlib.Path]]) -> str:
    """A hash of texts and of named files' contents."""
    h = hashlib.sha256()
    for text in texts:
        h.update(f"{len(text)} {text}\n".encode())
    for name, path in sorted(files):
        data = path.read_bytes()
        h.update(f"{name} {len(data)}\n".encode() + data)
    return h.hexdigest()[:24]


def cached(name: str, key: str, build: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """The cache's folder for name and key; if there is none, build fills one, which appears whole or not at all."""
    kind = cache_root() / name
    entry = kind / key
    with locked(cache_root() / f"{name}.lock"):
        if not entry.is_dir():
            kind.mkdir(parents=True, exist_ok=True)
            say(f"{name} ...")
            start = time.monotonic()
            with tempfile.TemporaryDirectory(dir=kind, prefix=".new-") as temporary:
                out = pathlib.Path(temporary) / "out"
                out.mkdir()
                build(out)
                out.rename(entry)
            say(f"{name} built in {time.monotonic() - start:.0f} s")
        os.utime(entry)  # the entry was used now
        entries = [e for e in kind.iterdir() if not e.name.startswith(".")]
        for old in sorted(entries, key=lambda e: e.stat().st_mtime, reverse=True)[KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
    return entry


def put(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file where the bytes differ, by renaming: a process that has the old one mapped keeps it."""
    if target.is_file() and not target.is_symlink() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    temporary.chmod(0o644 if target.suffix == ".a" else 0o755)
    temporary.replace(target)
    say(f"-> {target.relative_to(ROOT)}")


# ---- the libraries ----


def torch_flags(sources: pathlib.Path) -> list[str]:
    """Flags to compile against torch; paths in messages are cut to what is the same everywhere."""
    include = torch_dir() / "include"
    return [
        *CXXFLAGS,
        f"-ffile-prefix-map={include}=torch",
        f"-ffile-prefix-map={sources}=.",
        "-isystem",
        str(include),
        "-isystem",
        str(include / "torch" / "csrc" / "api" / "include"),
    ]


DEFINED = "-Wl,-z,defs"  # a symbol nobody has is an error here, not when a user loads the library


def torch_link(*extra: str) -> list[str]:
    return [f"-L{torch_dir() / 'lib'}", *TORCH_LIBS, *extra, RUNPATH]


def common_key() -> list[str]:
    return [*CXXFLAGS, *TORCH_LIBS, RUNPATH, compiler_id(), torch_version()]


def cgotorch() -> pathlib.Path:
    """gotorch's C++ half. Its nine files take about 13 s each."""
    module = module_dir("github.com/wangkuiyi/gotorch")
    sources = sorted((module / "cgotorch").glob("*.cc"))
    headers = sorted((module / "cgotorch").glob("*.h"))
    flags = ["-DWITHOUT_CUDA", "-w"]  # not our code: its warnings help nobody

    def build(out: pathlib.Path) -> None:
        def one(source: pathlib.Path) -> pathlib.Path:
            start = time.monotonic()
            obj = out.parent / f"{source.stem}.o"
            run([*compiler(), *torch_flags(module), *flags, f"-I{module}", "-c", source, "-o", obj])
            say(f"  cgotorch/{source.name} {time.monotonic() - start:.0f} s")
            return obj

        with ThreadPoolExecutor(JOBS) as pool:
            objects = list(pool.map(one, sources))
        run([*compiler(), "-shared", "-o", out / "libcgotorch.so", *objects, *torch_link(DEFINED)])

    key = digest([*common_key(), *flags], [(p.name, p) for p in sources + headers])
    return cached("cgotorch", key, build) / "libcgotorch.so"


def bridge(name: str, source: str, flags: list[str], link: list[str], more: list[str]) -> pathlib.Path:
    """A library of one file of pybind/, with the headers beside it; more stands in the cache's key for flags."""
    pybind = ROOT / "pybind"
    warnings = ["-Wall", "-Wextra"]

    def build(out: pathlib.Path) -> None:
        compile_ = [*compiler(), *torch_flags(ROOT), *flags, *warnings]
        run([*compile_, "-shared", "-o", out / f"lib{name}.so", pybind / source, *torch_link(*link)])

    inputs = [pybind / source, *pybind.glob("*.h")]
    named = [pathlib.Path(word).name for word in link]  # a library may lie anywhere
    key = digest([*common_key(), *warnings, *named, *more], [(p.name, p) for p in inputs])
    return cached(name, key, build) / f"lib{name}.so"


def nng_aten() -> pathlib.Path:
    return bridge("nng_aten", "aten.cc", VECTORS, [DEFINED], VECTORS)


def nng_cuda() -> pathlib.Path | None:
    """CUDA graphs; None where torch is built without CUDA, or the headers are missing that its own include."""
    packages = torch_dir().parent
    nvidia = packages / "nvidia"
    runtimes = sorted(nvidia.glob("*/lib/libcudart.so.*"))
    headers = [*sorted(nvidia.glob("*/include")), packages / "triton" / "backends" / "nvidia" / "include"]
    if not (torch_dir() / "lib" / "libtorch_cuda.so").is_file() or not runtimes:
        return None
    for header in ("cuda_runtime_api.h", "crt/host_config.h"):
        if not any((folder / header).is_file() for folder in headers):
            say(f"without CUDA graphs: {header} is missing (pip install nvidia-cuda-runtime nvidia-cuda-crt)")
            return None
    flags = [f for folder in headers for f in ("-isystem", str(folder), f"-ffile-prefix-map={folder}=cuda")]
    link = ["-ltorch_cuda", "-lc10_cuda", str(runtimes[-1]), DEFINED]
    return bridge("nng_cuda", "cuda.cc", flags, link, [runtimes[-1].name])


def nng_py() -> pathlib.Path:
    include = sysconfig.get_path("include")
    if not (pathlib.Path(include) / "Python.h").is_file():
        raise BuildError(f"Python.h is not in {include} (see tools/build/doctor.sh)")
    # Never libpython: the symbols come from the interpreter that loads us, which may be linked statically.
    # So this library alone may leave symbols open.
    link = ["-ltorch_python"]
    prefix = [f"-ffile-prefix-map={include}=python"]
    return bridge("nng_py", "pyobj.cc", [*prefix, "-isystem", include], link, [*prefix, sys.version])


def tokenizers() -> pathlib.Path:
    """The Rust archive, by the crate's own build.sh."""
    crate = ROOT / "engine" / "token" / "tokenizers-rs"
    upstream = module_dir("github.com/daulet/tokenizers") / "src" / "lib.rs"

    def build(out: pathlib.Path) -> None:
        environment = {
            **os.environ,
            "CARGO_TARGET_DIR": str(cache_root() / "cargo"),
            "CARGO_TERM_PROGRESS_WHEN": "never",
        }
        run([crate / "build.sh", out], env=environment)

    files = [(str(p.relative_to(crate)), p) for p in crate.rglob("*") if p.is_file() and "target" not in p.parts]
    key = digest([run(["cargo", "--version"], cwd=crate)], [*files, ("daulet.rs", upstream)])
    return cached("tokenizers", key, build) / "libtokenizers.a"


def go_sources(*tops: str) -> list[pathlib.Path]:
    """Every file that may go into what is built from some folders: all Go packages, and what lies beside their files."""
    found: list[pathlib.Path] = []
    for top in (*tops, "engine", "internal", "pybind", "go.mod", "go.sum"):
        for path in [ROOT / top, *(ROOT / top).rglob("*")]:
            beside = top != "pybind" and "testdata" not in path.parts
            if (beside or path.suffix in (".go", ".h", ".mod", ".sum")) and path.is_file():
                found.append(path)
    return [p for p in found if not p.name.endswith("_test.go")]


def go_built(name: str, folder: str, mode: list[str], link: str, inputs: list[pathlib.Path]) -> None:
    """What Go builds from a folder. Needs the other libraries. Go's cache decides what is compiled."""
    tools = ROOT / "tools" / "build"
    env = json.loads(run([tools / "env.sh", "--python", sys.executable, "--json"]))
    env["NNSIGHT_GO_CC"] = run(["go", "env", "CC"], cwd=ROOT).strip()
    flags = ["-trimpath", *mode, "-ldflags", f"-s -w '-extld={tools / 'link.sh'}' -extldflags '-Wl,--gc-sections {link}'"]

    # go build takes two seconds to find that nothing changed; this takes none.
    files = [*go_sources(folder.split("/")[0]), tools / "link.sh", *inputs]
    texts = [run(["go", "version"], cwd=ROOT), os.environ.get("GOFLAGS", ""), *flags, json.dumps(env, sort_keys=True)]
    key = digest(texts, [(str(p.relative_to(ROOT)), p) for p in files])
    out, stamp = SCRATCH / "go" / name, SCRATCH / "go" / f"{name}.key"
    if not (out.is_file() and stamp.is_file() and stamp.read_text() == key):
        say(f"{name} ...")
        start = time.monotonic()
        stamp.unlink(missing_ok=True)
        run(["go", "build", *flags, "-o", out, f"./{folder}"], cwd=ROOT, env={**os.environ, **env})
        stamp.write_text(key)
        say(f"{name} built in {time.monotonic() - start:.0f} s")
    put(out, LIB / name)


def nnsight_go() -> None:
    """The Go engine as a C library."""
    exports = ROOT / "tools" / "build" / "exports.map"
    link = f"-Wl,-z,defs -Wl,--version-script={exports}"
    go_built("libnnsight_go.so", "capi", ["-buildmode=c-shared"], link, [exports])


def command() -> None:
    """The command, which serves models without Python."""
    go_built("nnsight-go", "cmd/nnsight-go", [], "", [])


def keep_archive(archive: pathlib.Path) -> None:
    """Puts the Rust archive where Go programs find it.

    Go does not notice a changed archive behind an unchanged flag. In a checkout ``nnsight-go env``
    therefore follows build/archive to the cache's folder, whose name changes with the contents.
    """
    put(archive, LIB / archive.name)
    link = SCRATCH / "archive"
    if not link.is_symlink() or link.resolve() != archive.parent:
        SCRATCH.mkdir(exist_ok=True)
        temporary = SCRATCH / f".archive.{os.getpid()}"
        temporary.symlink_to(archive.parent)
        temporary.replace(link)


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds the engine's libraries into python/nnsight_go/_lib.")
    names = ["cgotorch", "nng_aten", "nng_cuda", "nng_py", "tokenizers", "nnsight_go", "command"]
    parser.add_argument("--only", choices=names, help="only this one")
    only = parser.parse_args().only
    start = time.monotonic()
    os.nice(5)  # a build should not make the machine unusable
    try:
        with locked(SCRATCH / ".native.lock"):
            for make in (cgotorch, nng_aten, nng_cuda, nng_py):
                if only not in (None, make.__name__):
                    continue
                made, place = make(), LIB / f"lib{make.__name__}.so"
                if made is None:
                    place.unlink(missing_ok=True)
                else:
                    put(made, place)
            if only in (None, "tokenizers"):
                keep_archive(tokenizers())
            if only in (None, "nnsight_go"):
                nnsight_go()
            if only in (None, "command"):
                command()
    except BuildError as e:
        say(f"FAILED: {e}")
        return 1
    say(f"libraries are ready ({time.monotonic() - start:.1f} s, torch {torch_version()})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
