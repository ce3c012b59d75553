"""Names of nnsight that this package does not have, and what to do without each.

An error about one of them says more than that the name is unknown; ``docs/nnsight.md`` has the whole list.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from . import positions
from .errors import InputError
from .positions import here

_NO_CODE = "no code travels to a server, so versions of packages do not matter"
_BY_NAME = "a server knows a model by its name"
_ONE_STEP = "a trace runs the model once, so there is no next step; `with model.generate(prompt) as tracer:` has more"
_MACHINERY = "it belongs to how nnsight runs a trace; nothing here has its duty"
_GONE = "nnsight itself dropped it in 0.5; plain Python does it inside a block"

# Names of the package.
PACKAGE: dict[str, str] = {
    "VisionLanguageModel": "models of images are not in this version",
    "DiffusionModel": "diffusion models are not in this version",
    "VLLM": "vLLM does not run under this package, which has an engine of its own",
    "TransformersModel": "LanguageModel is its class for text generation",
    "Tracer": "`model.trace(...)` makes one; there is no class to subclass",
    "Object": "values in a block are tensors: annotate them as torch.Tensor",
    "ExceptionWrapper": "errors keep their own class, and name your line",
    "NNsightDeprecationWarning": "nothing here is deprecated",
    "deprecated": "nothing here is deprecated",
    "register": "no source code travels to a server: a trace is a graph",
    "ndif_status": "nnsight_go.status(host) lists the models of a server",
    "compare": _NO_CODE,
    "login": "CONFIG.set_default_api_key(key) keeps a key",
    "whoami": "a key has no name here",
    "get_local_env": _NO_CODE,
    "get_remote_env": _NO_CODE,
    "NdifStatus": "nnsight_go.status(host) gives plain dictionaries",
    **dict.fromkeys(("apply", "log", "local", "cond", "iter", "stop", "trace"), _GONE),
    **dict.fromkeys(("list", "dict", "int", "float", "str", "bool", "tuple"), _GONE),
    **dict.fromkeys(("Interleaver", "Mediator", "Batcher", "Backend", "Globals", "eproperty"), _MACHINERY),
    **dict.fromkeys(("Patch", "Patcher", "DEFAULT_PATCHER", "WithBlockNotFoundError"), _MACHINERY),
}

# Attributes of modules and models.
MODULE: dict[str, str] = {
    "pipe": "there are no pipelines; `with model.generate(prompt):` writes text",
    "iter": "in a block, `tracer.iter` chooses steps",
    "all": "in a block, `tracer.all()` is every step",
    "export_edits": "an edit is written to a file with model.edits[0].save(path)",
    "import_edits": "an edit is read with nnsight_go.load_edit(path) and applied with model.with_edits(edit)",
    "interleave": _MACHINERY,
    "interleaver": _MACHINERY,
    "interleaving": _MACHINERY,
    "to_model_key": _BY_NAME,
    "from_model_key": _BY_NAME,
    "load_adapter": "adapters are not in this version",
    "pipeline": "there is no pipeline; model.tokenizer makes token ids",
    "_module": "the engine runs the model itself: there is no torch.nn.Module behind it",
    "_model": "the engine runs the model itself: there is no torch.nn.Module behind it",
}

# Attributes of tracers.
TRACER: dict[str, str] = {
    "next": _ONE_STEP,
    "backend": "`tracer.job` is the job of a trace with blocking=False",
    "collect": "vLLM does not run under this package",
    "local": "plain Python in a block runs here anyway",
    "log": "print() works in a block",
    "apply": _GONE,
    "cond": _GONE,
    **dict.fromkeys(("args", "kwargs", "fn", "info", "mediators", "asynchronous", "batcher"), _MACHINERY),
    **dict.fromkeys(("capture", "parse", "build", "compile", "execute", "push", "pull"), _MACHINERY),
}

# Options that nnsight's calls take, with the values that ask for nothing. `...` stands for every value.
TRACE: dict[str, Any] = {
    "backend": (None,),
    "blocking": ...,
    "fn": (None,),
    "job_id": (None,),
    "scan": ...,  # sizes are always checked here
    "tracer_cls": (None,),
    "validate": ...,
    "verbose": ...,
}
OPENING: dict[str, Any] = {
    "attn_implementation": (None, "sdpa"),
    "automodel": (None,),
    "config_model": (None,),
    "envoys": (None,),
    "import_edits": (False,),
    "low_cpu_mem_usage": ...,
    "meta_buffers": ...,
    "peft": (None,),
    "task": (None, "text-generation"),
    "tokenizer_kwargs": (None, {}),
    "trust_remote_code": ...,  # no code of a model is ever run
}


def refuse(module: str, name: str, otherwise: str = "") -> NoReturn:
    """Raises what ``module.name`` and ``from module import name`` raise for a name that is not there.

    To be called right in a module's ``__getattr__``.
    """
    why = PACKAGE.get(name, otherwise)
    said = f": {why}" if why else ""
    frame = sys._getframe(2)
    if frame.f_lasti >= 0 and frame.f_code.co_code[frame.f_lasti] == dis.opmap["IMPORT_FROM"]:
        # An AttributeError would be replaced by an ImportError that does not say why.
        raise ImportError(f"cannot import name {name!r} from {module!r}{said}", name=module)
    raise AttributeError(f"module {module!r} has no attribute {name!r}{said}", name=name)


def options(call: str, given: dict[str, Any], known: Mapping[str, Any]) -> None:
    """Takes the options of nnsight out of keyword arguments.

    Raises:
        InputError: one asks for something that is not available.
    """
    for name in [name for name in given if name in known]:
        value, harmless = given.pop(name), known[name]
        if harmless is not ... and not any(value is h or value == h for h in harmless):
            raise InputError(
                f"{call} cannot do {name}={value!r} in this version",
                hint=f"Leave it out; it may be {' or '.join(map(repr, harmless))}.",
                **positions.fields(here()),
            )
