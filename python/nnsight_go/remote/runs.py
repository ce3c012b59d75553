"""What stands in the engine's place for a recording that runs elsewhere.

Each time values are needed, a request has the whole program so far: a server keeps nothing of a trace, and
computes it again from the start, which gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..native import become
from ..runners import Rows, Wants
from .messages import Answer, Later, Message, Part, Request

if TYPE_CHECKING:
    from ..native import Native
    from ..proxy import Proxy
    from ..sessions import Session
    from .generations import RemoteGeneration
    from .jobs import Job


class Transport(Protocol):
    """The way to what performs requests."""

    @property
    def where(self) -> object:
        """What tells it from other ways, to be compared."""

    @property
    def uploads(self) -> Callable[[str, torch.Tensor], None] | None:
        """Takes a large tensor's hash and itself, and has it there; None where it travels in the request."""

    def perform(self, request: bytes) -> bytearray:
        """Has a request done, waits, and gives the response.

        Raises:
            NnsightError: it failed, with the user's line where that is known; or there is no way.
        """

    def submit(self, request: bytes, adopt: Sequence[Proxy], device: torch.device) -> Job:
        """Leaves a request there without waiting for it; these proxies become its values, on a device."""


class Remote:
    """A model that is computed elsewhere; the one here knows what its modules are.

    Args:
        native: the one here, whose weights are not used.
        name: what the other one is called there.
        transport: the way there.
        blocking: wait for the values of a trace at its end.

    Attributes:
        job: that of the trace, where nobody waits for its values.
    """

    def __init__(self, native: Native, name: str, transport: Transport, blocking: bool = True) -> None:
        self.native, self.name, self.transport, self.blocking = native, name, transport, blocking
        self.job: Job | None = None
        self.session: Session | None = None  # that its traces belong to

    def begin(self, graph: bytes, constants: Sequence[torch.Tensor | Later], end: bool) -> RemoteRun:
        """Starts a run of a graph in wire form; ``end``: nothing will be added to it."""
        return RemoteRun(self, graph, constants, end)

    def generation(self, rows: Rows, masks: Rows | None, settings: dict[str, Any], wants: Wants) -> RemoteGeneration:
        """Begins to generate."""
        from .generations import RemoteGeneration

        return RemoteGeneration(self, rows, masks, settings, wants)

    def message(self) -> Message:
        """A request that has nothing in it yet. What comes before it in its session is done then."""
        if self.session is not None:
            self.session.flush()
        return Message(self.native, self.transport.uploads)

    def answer(self, request: bytes) -> Answer:
        """Has a request done."""
        return Answer(self.transport.perform(request), self.native.device)


class Program:
    """Parts of a graph that were recorded one after the other, and the tensors that they number."""

    def __init__(self, graph: bytes, constants: Sequence[torch.Tensor | Later], end: bool) -> None:
        self.part = Part([graph], list(constants), end)

    def more(self, graph: bytes, constants: Sequence[torch.Tensor | Later], end: bool) -> None:
        """Adds what the program says next."""
        self.part.graphs.append(graph)
        self.part.constants += constants
        self.part.end = end

    def free(self) -> None:
        """Nothing: there is nothing of it elsewhere between two requests."""


def given(values: list[torch.Tensor], adopt: Sequence[Proxy] | None) -> list[torch.Tensor]:
    """Values as a run gives them: these proxies become them, if there are some."""
    if adopt is None:
        return values
    become(list(adopt), values)
    return []


class RemoteRun(Program):
    """A trace that runs elsewhere."""

    def __init__(self, remote: Remote, graph: bytes, constants: Sequence[torch.Tensor | Later], end: bool) -> None:
        super().__init__(graph, constants, end)
        self._remote = remote

    def results(self, adopt: Sequence[Proxy] | None) -> list[torch.Tensor]:
        """The values that were asked for last, or, with ``adopt``, nothing: these proxies become them."""
        remote = self._remote
        message = remote.message()
        self.part.want = ["results"]
        request = message.encode(Request(remote.name, "trace", [message.step(self.part)]))
        if adopt is not None and not remote.blocking:
            remote.job = remote.transport.submit(request, adopt, remote.native.device)
            return []
        return given(remote.answer(request).results(0), adopt)
