"""Lets programs written for nnsight run on this package as they are.

::

    import nnsight_go.as_nnsight

    from nnsight import LanguageModel  # this package's

Import it before anything imports ``nnsight``. From then on ``nnsight`` and its modules name what this package
has; a name that it does not have is an error that says why. ``docs/nnsight.md`` compares all names.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

import nnsight_go

from . import barrier, cache, edits, foreign, inside, tracing

# The version of nnsight whose names are told here.
VERSION = "0.8.1"


def apply(data: Any, fn: Callable[[Any], Any], cls: type) -> Any:
    """Tuples, lists, dicts and slices with ``fn`` applied to every ``cls`` in them."""
    if isinstance(data, cls):
        return fn(data)
    if isinstance(data, tuple | list):
        return type(data)(apply(item, fn, cls) for item in data)
    if isinstance(data, dict):
        return {key: apply(item, fn, cls) for key, item in data.items()}
    if isinstance(data, slice):
        return slice(*(apply(item, fn, cls) for item in (data.start, data.stop, data.step)))
    return data


def fetch_attr(object: Any, target: str) -> Any:
    """``fetch_attr(model, "transformer.h.0")``: an attribute of an attribute."""
    for name in filter(None, target.split(".")):
        object = object[int(name)] if name.isdigit() else getattr(object, name)
    return object


# What each module of nnsight (0.7 and 0.8, and `models` of the older ones) has here under its own names.
_MODULES: dict[str, dict[str, Any]] = {
    "": {
        "CONFIG": nnsight_go.CONFIG,
        "Envoy": nnsight_go.Envoy,
        "LanguageModel": nnsight_go.LanguageModel,
        "NNsight": nnsight_go.NNsight,
        "Object": torch.Tensor,
        "TransformersModel": nnsight_go.LanguageModel,
        "is_model_running": nnsight_go.is_model_running,
        "save": nnsight_go.save,
        "session": nnsight_go.session,
        "status": nnsight_go.status,
        "__version__": f"{VERSION}+nnsight.go",
    },
    "intervention": {"Envoy": nnsight_go.Envoy},
    "intervention.backends": {},
    "intervention.backends.remote": {"RemoteError": nnsight_go.RemoteError},
    "intervention.barrier": {"Barrier": barrier.Barrier},
    "intervention.cache": {"Cache": cache.Cache, "CacheView": cache.View, "Entry": cache.Entry},
    "intervention.editing": {"EditingTracer": edits.Editing},
    "intervention.envoy": {"Envoy": nnsight_go.Envoy},
    "intervention.errors": {},
    "intervention.interleaver": {"OutOfOrderError": nnsight_go.OutOfOrderError},
    "intervention.source": {"Source": inside.Source},
    "intervention.tracer": {"InterleavingTracer": tracing.Tracer, "Invoker": tracing.Invoker},
    "intervention.tracing": {},
    "intervention.tracing.base": {},
    "intervention.tracing.editing": {"EditingTracer": edits.Editing},
    "intervention.tracing.globals": {"Object": torch.Tensor, "save": nnsight_go.save},
    "intervention.tracing.invoker": {"Invoker": tracing.Invoker},
    "intervention.tracing.tracer": {
        "Barrier": barrier.Barrier,
        "Cache": cache.Cache,
        "InterleavingTracer": tracing.Tracer,
    },
    "modeling": {},
    "modeling.base": {"NNsight": nnsight_go.NNsight},
    "modeling.language": {"LanguageModel": nnsight_go.LanguageModel},
    "modeling.transformers": {"TransformersModel": nnsight_go.LanguageModel},
    "models": {},
    "models.LanguageModel": {"LanguageModel": nnsight_go.LanguageModel},
    "models.NNsightModel": {"NNsight": nnsight_go.NNsight},
    "ndif": {},
    "schema": {},
    "schema.config": {"CONFIG": nnsight_go.CONFIG},
    "tracing": {},
    "tracing.hint": {"Object": torch.Tensor},
    "tracing.tracer": {"save": nnsight_go.save},
    "util": {"apply": apply, "fetch_attr": fetch_attr},
}


class _Module(types.ModuleType):
    """A module of nnsight, with this package's things in it."""

    def __getattr__(self, name: str) -> NoReturn:
        foreign.refuse(self.__name__, name, "nnsight_go, which stands in for nnsight, does not have it")


class _Finder(importlib.abc.MetaPathFinder):
    """Says why a module of nnsight cannot be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("nnsight."):
            return None
        last = fullname.rpartition(".")[2]
        why = {name.lower(): said for name, said in foreign.PACKAGE.items()}.get(last.lower(), "")
        raise ModuleNotFoundError(
            f"No module named {fullname!r}: nnsight_go stands in for nnsight{'; ' if why else ''}{why}",
            name=fullname,
        )


def _install() -> None:
    there = sys.modules.get("nnsight")
    if isinstance(there, _Module):
        return
    if there is not None:
        raise ImportError(
            "nnsight has been imported already, so nnsight_go cannot stand in for it: "
            "import nnsight_go.as_nnsight before the first `import nnsight`"
        )
    made = {}
    for path, names in _MODULES.items():
        name = f"nnsight.{path}".rstrip(".")
        module = made[path] = _Module(name, f"{name}, as nnsight_go has it.")
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__spec__, module.__path__, module.__package__ = spec, [], name
        module.__dict__.update(names)
        module.__dict__["__all__"] = [n for n in names if not n.startswith("_")]
        if path:
            parent, _, last = path.rpartition(".")
            made[parent].__dict__[last] = module
    for module in made.values():
        sys.modules[module.__name__] = module
    sys.meta_path.insert(0, _Finder())


_install()
