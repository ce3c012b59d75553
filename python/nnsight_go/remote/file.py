"""Files of tensors in memory: what requests and responses are (safetensors).

A codec of its own, since the one of the ``safetensors`` package copies every tensor twice, knows some dtypes
less and takes no tensor for bytes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

from ..errors import InputError, RemoteError

MEDIA = "application/vnd.nnsight.tensors"
"""Content type of requests and responses."""

# The format's names of dtypes.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.complex128: "C128",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

# A tensor that takes this part of a response is memory of it; one that takes less is a copy, since it would keep
# the whole response alive.
_SHARES = 8


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


_entries = msgspec.json.Decoder(dict[str, _Entry])


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it travels: on the CPU, contiguous, without history.

    Raises:
        InputError: it has a layout or dtype that no file has.
    """
    if tensor.layout != torch.strided or tensor.dtype not in _NAMES:
        dtype, layout = (str(x).removeprefix("torch.") for x in (tensor.dtype, tensor.layout))
        raise InputError(
            f"a {layout} tensor of {dtype} cannot be sent to a server",
            hint="Convert it, to_dense() or float(), before the trace uses it.",
        )
    with torch._C.DisableTorchFunction(), torch.no_grad():
        return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a plain tensor, which must outlive them."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b"").cast("B")


def encode(tensors: Mapping[str, torch.Tensor | bytes]) -> bytes:
    """A file of tensors; bytes are those of a tensor of uint8 ``[n]``.

    Raises:
        InputError: a tensor cannot be sent.
    """
    items: list[tuple[int, str, str, list[int], Any]] = []
    kept = []  # copies on the CPU live until their bytes are in the file
    for name, x in tensors.items():
        if isinstance(x, bytes):
            items.append((1, name, "U8", [len(x)], x))
        else:
            kept.append(x := plain(x))
            items.append((x.element_size(), name, _NAMES[x.dtype], list(x.shape), memory(x)))
    items.sort(key=lambda item: -item[0])  # the widest first: every tensor lies at a multiple of its element's size
    head, at = {}, 0
    for _, name, dtype, shape, data in items:
        head[name] = _Entry(dtype, shape, (at, at + len(data)))
        at += len(data)
    text = msgspec.json.encode(head)
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, *(item[-1] for item in items)))


class File:
    """A file of tensors that came from a server. Its bytes are not trusted, and must not change.

    Raises:
        RemoteError: it is none.
    """

    def __init__(self, data: bytearray) -> None:
        self._data = data
        try:
            if len(data) < 8:
                raise ValueError(f"it has {len(data)} bytes")
            start = 8 + int.from_bytes(data[:8], "little")
            if start > len(data):
                raise ValueError(f"its header claims {start - 8} bytes, and {len(data)} are there")
            self._entries = _entries.decode(memoryview(data)[8:start])
        except (ValueError, msgspec.MsgspecError) as error:
            raise malformed(str(error)) from None
        self._start = start

    def _place(self, name: str) -> tuple[torch.dtype, list[int], int, int]:
        """Dtype and sizes of a tensor, and where its bytes begin and end."""
        entry = self._entries.get(name)
        if entry is None:
            raise malformed(f"it has no tensor {name!r}")
        dtype, (begin, end) = _DTYPES.get(entry.dtype), entry.data_offsets
        if dtype is None or any(n < 0 for n in entry.shape) or end - begin != math.prod(entry.shape) * dtype.itemsize:
            raise malformed(f"tensor {name!r} is {entry.dtype} {entry.shape}, and takes {end - begin} bytes")
        if not 0 <= begin <= end <= len(self._data) - self._start:
            raise malformed(f"tensor {name!r} ends behind the end of the file")
        return dtype, entry.shape, self._start + begin, self._start + end

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor of the file: a copy, or memory of the file itself where it is a large part of that."""
        dtype, shape, begin, end = self._place(name)
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        if begin % dtype.itemsize or (end - begin) * _SHARES < len(self._data):
            return torch.frombuffer(self._data[begin:end], dtype=dtype).reshape(shape)
        return torch.frombuffer(self._data, dtype=dtype, count=math.prod(shape), offset=begin).reshape(shape)

    def bytes(self, name: str) -> bytes:
        """What a tensor of bytes holds."""
        _, _, begin, end = self._place(name)
        return bytes(memoryview(self._data)[begin:end])


def malformed(why: str) -> RemoteError:
    """The error of a response that makes no sense."""
    return RemoteError(
        f"what the server answered is not well formed: {why}",
        hint="Client and server must speak the same version of the protocol (docs/remote-protocol.md).",
    )
