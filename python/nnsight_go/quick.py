"""The lines that most blocks are made of, recorded by builtins (``pybind/recording.h``).

Each does what its twin here does where nothing out of the ordinary is the case, and calls that twin where it is.
"""

from __future__ import annotations

from typing import Any

from . import _ffi, known, positions, proxy, recorder, wire
from .envoy import Envoy
from .points import Leaf, Point
from .proxy import Proxy
from .wrapping import NNsight


def twins() -> dict[Any, Any]:
    """The builtins, by the function that each stands for."""
    output: Any = Envoy.output
    calls, twins = _ffi.calls(), {output.fget: "output", Envoy.__getitem__: "item", Proxy.save: "save"}
    twins |= {Proxy.__setitem__: "put", NNsight.trace: "trace"}
    known.prepare(NNsight.trace, Proxy.__setitem__)
    calls["prepare"](
        Proxy, proxy.PLACEHOLDER, Leaf, positions.files, positions.is_users,
        Envoy._read, Proxy.save, Envoy.__getitem__, wire.argument, recorder.Recorder, Point,
    )  # fmt: skip
    return {function: calls[name] for function, name in twins.items()}
