"""Traces that run elsewhere: ``model.trace(prompt, remote=True)``.

What a block records is a graph, which is data: it goes to a server as it would go to the engine. ``runs`` and
``generations`` stand where the engine stands for a recorder; ``messages`` and ``file`` are what travels; ``server``
is the way there, and ``local`` one that leads back to this process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import positions, sessions
from ..errors import InputError
from ..positions import here
from .describing import Described, dtype
from .local import InProcess
from .runs import Remote, Transport

if TYPE_CHECKING:
    from ..model import LanguageModel
    from ..runners import Runner
    from .jobs import Job

__all__ = ["Described", "Job", "dtype", "is_model_running", "is_server", "refuse", "runner", "status", "waits"]

LOCAL = "local"


def _wanted(remote: bool | str | None, otherwise: bool | str | None = None) -> bool | str:
    """What the user asked for, or else the session that is open, or else the model."""
    if remote is None and sessions.opened.session is not None:
        remote = sessions.opened.session.remote
    return (otherwise if remote is None else remote) or False


def is_server(remote: bool | str | None) -> bool:
    """Whether it means another process."""
    return bool(remote) and remote != LOCAL


def refuse(remote: bool | str | None) -> None:
    """Raises where a model that is computed by Python is to run elsewhere."""
    if _wanted(remote):
        raise InputError(
            "a wrapped model is a Python module of this process, and cannot run elsewhere",
            hint="Leave `remote` out. GPT-2 and Llama models opened by LanguageModel(name) can run on a server.",
            **positions.fields(here()),
        )


def runner(model: LanguageModel, remote: bool | str | None, blocking: bool = True) -> Remote | None:
    """What runs the traces of a model: None for the engine here.

    Args:
        model: which.
        remote: what the user asked for; None: what the session that is open says, or else the model.
        blocking: wait for values.

    Raises:
        InputError: it says nothing about where, or the model here is in training.
    """
    remote = _wanted(remote, model._remote)
    if not remote:
        return None
    if model._native.training:
        raise InputError(
            "a remote model runs without dropout, and this one is in training",
            hint="Call model.eval() first.",
            **positions.fields(here()),
        )
    return Remote(model._native, model.name_or_path, _transport(model, remote), blocking)


def _transport(model: LanguageModel, remote: bool | str) -> Transport:
    if remote == LOCAL:
        return InProcess(model._native)
    from .server import Server

    return Server(remote if isinstance(remote, str) else None)


def waits(runner: Runner, what: str) -> None:
    """Raises where values are needed at once, and nobody is to wait for them."""
    if isinstance(runner, Remote) and not runner.blocking:
        raise InputError(
            f"{what} is waited for, since what follows uses its values",
            hint="Leave blocking=False out.",
            **positions.fields(here()),
        )


def status(host: str | None = None) -> dict[str, dict[str, Any]]:
    """The models of a server by name, each with its ``architecture``, ``dtype``, ``workers`` and ``waiting`` jobs.

    Args:
        host: ``https://...``; by default ``CONFIG.API.HOST``.

    Raises:
        RemoteError: it cannot be reached, or refuses.
    """
    from .server import Server

    return {str(m.get("name")): m for m in Server(host).models()}


def is_model_running(name: str, host: str | None = None) -> bool:
    """Whether a server has a model, and somebody to run it.

    Args:
        name: of the model.
        host: ``https://...``; by default ``CONFIG.API.HOST``.

    Raises:
        RemoteError: it cannot be reached, or refuses.
    """
    return bool(status(host).get(name, {}).get("workers"))


def __getattr__(name: str) -> Any:
    if name == "Job":  # it brings in an HTTP client, which takes its time
        from .jobs import Job

        return Job
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
