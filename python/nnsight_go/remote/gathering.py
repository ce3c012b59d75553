"""Traces of a session that a server runs as one job: ``with model.session(remote=True):``.

A trace that has ended waits for the others. A later one names its values by their place in the job. Whoever needs one
of them, and whatever cannot wait, has sent what there is until then.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import NnsightError
from ..native import become
from ..proxy import Proxy
from .messages import Later, Part, Place, Request, Step

if TYPE_CHECKING:
    from ..recorder import Recorder
    from .jobs import Job
    from .runs import Remote

MOST = 1 << 10  # traces of one job: a session of more has several


@dataclasses.dataclass(slots=True)
class _Trace:
    """A trace that waits: what it says, the proxies that want its values, and what is told of them."""

    part: Part
    adopt: list[weakref.ref[Proxy]]
    rec: Recorder

    def wanted(self) -> tuple[list[int], list[Proxy]]:
        """Those proxies that somebody still holds, and which of the trace's values they want."""
        held = [(i, proxy) for i, ref in enumerate(self.adopt) if (proxy := ref()) is not None]
        return [i for i, _ in held], [proxy for _, proxy in held]


class Gathered:
    """The traces of a session that wait.

    Args:
        remote: where they run.
    """

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._traces: list[_Trace] = []
        self._places: dict[int, Place] = {}  # of values, by the id of their proxy

    def goes_with(self, remote: Remote) -> bool:
        """Whether traces that run there may go into the same job."""
        mine = self._remote
        same = mine.native is remote.native and mine.name == remote.name
        return same and mine.transport.where == remote.transport.where

    def add(self, rec: Recorder, part: Part, adopt: Sequence[Proxy]) -> None:
        """Has a trace wait that has ended. Its values will be those of ``adopt`` that somebody holds then."""
        step = len(self._traces)
        for constant in part.constants:
            if isinstance(constant, Later):
                constant.let_go()
        self._traces.append(_Trace(part, [weakref.ref(proxy) for proxy in adopt], rec))
        self._places.update((id(proxy), Place(step, number)) for number, proxy in enumerate(adopt))
        if len(self._traces) == MOST:
            self.flush()

    def later(self, proxy: Proxy) -> Later:
        """What stands for a value of a trace that waits."""
        return Later(proxy, self._places[id(proxy)])

    def flush(self) -> None:
        """Has all of them done, and waits. Their proxies become tensors.

        Raises:
            NnsightError: one of them failed; no proxy has become anything, and none ever will.
        """
        traces = self._take()
        if not traces:
            return
        try:
            request, wanted = self._request(traces)
            values = self._remote.answer(request).all_results()
            become([proxy for _, proxies in wanted for proxy in proxies], values)
        except BaseException as error:
            _fail(traces, error)
            raise
        for trace in traces:
            trace.rec.arrived()

    def submit(self) -> Job | None:
        """Leaves them as a job that nobody waits for, if there are some."""
        traces = self._take()
        if not traces:
            return None
        try:
            request, wanted = self._request(traces)
            adopt = [proxy for _, proxies in wanted for proxy in proxies]
            job = self._remote.transport.submit(request, adopt, self._remote.native.device)
        except BaseException as error:
            _fail(traces, error)
            raise
        saved = {id(x) for trace in traces for x in trace.rec.saved_proxies()}
        which = [i for i, proxy in enumerate(adopt) if id(proxy) in saved]
        for number, trace in enumerate(traces):
            trace.rec.waits_for(job, which, number)
        return job

    def abandon(self, why: str) -> None:
        """Forgets them: nothing of them runs."""
        for trace in self._take():
            trace.rec.close(why)

    def _take(self) -> list[_Trace]:
        traces, self._traces, self._places = self._traces, [], {}
        return traces

    def _request(self, traces: list[_Trace]) -> tuple[bytes, list[tuple[list[int], list[Proxy]]]]:
        """All of them as a request, and what is wanted of each."""
        message = self._remote.message()
        steps: list[Step] = []
        wanted = [trace.wanted() for trace in traces]
        for trace, (numbers, _) in zip(traces, wanted, strict=True):
            trace.part.want = ["results"]
            step = message.step(trace.part)
            step.unsent = sorted(set(range(len(trace.adopt))) - set(numbers))
            steps.append(step)
        alone = len(steps) == 1 and not steps[0].unsent  # then others may share its pass
        return message.encode(Request(self._remote.name, "trace" if alone else "session", steps)), wanted


def _fail(traces: list[_Trace], error: BaseException) -> None:
    """Ends traces whose job has failed, and says of which of them an error is."""
    if isinstance(error, NnsightError) and error.step is not None and 0 <= error.step < len(traces):
        traces[error.step].rec.count(error)
        error.step = None  # it is no step of a generation
    for trace in traces:
        trace.rec.close(f"the job of its session failed with {type(error).__name__}")
