"""What schemathesis is told of this protocol: how its bodies are written, and some that are well-formed."""

from __future__ import annotations

import os
import pathlib
import random
from typing import Any

import schemathesis

REQUESTS = [path.read_bytes() for path in sorted(pathlib.Path(os.environ["NNSIGHT_GO_REQUESTS"]).iterdir())]
_draw = random.Random(0)


@schemathesis.serializer("application/vnd.nnsight.tensors")
def tensors(context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Most random bytes are no request: some are, and some were before something happened to them."""
    chosen = _draw.random()
    if chosen < 0.4:
        return body
    request = bytearray(_draw.choice(REQUESTS))
    if chosen < 0.7:
        for _ in range(_draw.randrange(1, 8)):
            request[_draw.randrange(len(request))] = _draw.randrange(256)
    return bytes(request)
