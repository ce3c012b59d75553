"""Look at, save, edit and patch any value inside a language model while it runs.

::

    from nnsight_go import LanguageModel

    model = LanguageModel("openai-community/gpt2", device_map="auto", dispatch=True)
    with model.trace("The Eiffel Tower is in the city of"):
        hidden = model.transformer.h[5].output[0].save()
    print(hidden.shape)  # [batch, seq, hidden]

What a block means is told in ``docs/contract.md``.
"""

from __future__ import annotations

from typing import Any

from . import foreign
from .config import CONFIG
from .edits import Edit, load_edit
from .envoy import Envoy
from .errors import (
    CancelledError,
    ForkError,
    GradientError,
    GraphError,
    HandleError,
    InputError,
    InternalError,
    ModelLoadError,
    ModulePathError,
    NnsightError,
    NotSavedError,
    OpError,
    OutOfOrderError,
    RemoteError,
    StepLoopError,
    TokenizerError,
)
from .graphs import Graph
from .model import LanguageModel
from .remote import is_model_running, status
from .saving import save
from .sessions import session
from .tokenizer import Tokenizer
from .wrapping import NNsight

__version__ = "0.1.0"

__all__ = [
    "CONFIG",
    "CancelledError",
    "Edit",
    "Envoy",
    "ForkError",
    "GradientError",
    "Graph",
    "GraphError",
    "HandleError",
    "InputError",
    "InternalError",
    "LanguageModel",
    "ModelLoadError",
    "ModulePathError",
    "NNsight",
    "NnsightError",
    "NotSavedError",
    "OpError",
    "OutOfOrderError",
    "RemoteError",
    "StepLoopError",
    "Tokenizer",
    "TokenizerError",
    "__version__",
    "is_model_running",
    "load_edit",
    "save",
    "session",
    "status",
]


def __getattr__(name: str) -> Any:
    foreign.refuse(__name__, name)
