"""Traces that run elsewhere: ``model.trace(prompt, remote=True)``.

What a block records is a graph, which is data: it goes to a server as it would go to the engine. ``runs`` and
``generations`` stand where the engine stands for a recorder; ``messages`` and ``file`` are what travels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import positions, sessions
from ..errors import InputError
from ..positions import here
from .local import InProcess
from .runs import Remote

if TYPE_CHECKING:
    from ..model import LanguageModel

LOCAL = "local"


def refuse(remote: bool | str | None) -> None:
    """Raises where a model that is computed by Python is to run elsewhere."""
    if _wanted(remote):
        raise InputError(
            "a wrapped model is a Python module of this process, and cannot run elsewhere",
            hint="Leave `remote` out. GPT-2 and Llama models opened by LanguageModel(name) can run on a server.",
            **positions.fields(here()),
        )


def _wanted(remote: bool | str | None) -> bool | str:
    """What the user asked for, or else the session that is open."""
    if remote is None and sessions.opened.session is not None:
        remote = sessions.opened.session.remote
    return remote or False


def runner(model: LanguageModel, remote: bool | str | None) -> Remote | None:
    """What runs the traces of a model: None for the engine here.

    Args:
        model: which.
        remote: what the user asked for; None: what the session that is open says, or else the model.

    Raises:
        InputError: it says nothing about where.
    """
    remote = _wanted(remote)
    if not remote:
        return None
    if model._native.training:
        raise InputError(
            "a remote model runs without dropout, and this one is in training",
            hint="Call model.eval() first.",
            **positions.fields(here()),
        )
    if remote == LOCAL:
        return Remote(model._native, model.name_or_path, InProcess(model._native))
    raise InputError(f"remote={remote!r}", **positions.fields(here()))
