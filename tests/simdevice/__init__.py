"""A device that is none (``sim.cc``), for tests of what computes elsewhere than on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
import sys
import types

import torch

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tools" / "build"))

import native  # noqa: E402  (the tools are scripts, found by their directory)

NAME = "sim"


def build() -> pathlib.Path:
    """Compiles the device, or takes it from the user's cache."""
    source, flags = HERE / "sim.cc", ["-O1", "-w", "-shared"]

    def compiled(out: pathlib.Path) -> None:
        command = [*native.compiler(), *native.torch_flags(HERE), *flags, "-o", out / "libsim.so", source]
        native.run([*command, *native.torch_link(native.DEFINED)])

    key = native.digest([*native.common_key(), *flags], [(source.name, source)])
    return native.cached("simdevice", key, compiled) / "libsim.so"


def begin() -> ctypes.CDLL:
    """Makes it the accelerator of torch in this process, which cannot be undone; gives its counters, ``sim_*``."""
    lib = ctypes.CDLL(str(build()))
    for counter in ("sim_launched", "sim_captured", "sim_replayed", "sim_alive"):
        getattr(lib, counter).restype = ctypes.c_int64
    lib.sim_begin()
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    vars(module).update(
        is_available=lambda: True,
        current_device=lambda: 0,
        device_count=lambda: 1,
        device=lambda _: contextlib.nullcontext(),
        get_rng_state=lambda _=None: torch.get_rng_state(),
        set_rng_state=lambda state, _=None: torch.set_rng_state(state),
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        _is_in_bad_fork=lambda: False,
    )
    torch._register_device_module(NAME, module)
    return lib
