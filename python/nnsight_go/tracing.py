"""The blocks: ``with model.trace(prompt):`` and ``with tracer.invoke(prompt):``."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import foreign, inputs, positions, saving, sessions, torchmap
from . import remote as remotely
from .barrier import Barrier
from .cache import Cache, conversion, gather
from .errors import InputError
from .graphs import Graph
from .positions import here
from .recorder import OF_SESSION, Recorder, current
from .steps import Chosen, Steps
from .stopping import Stop
from .stored import Recording, apart

if TYPE_CHECKING:
    from .envoy import Envoy
    from .model import LanguageModel
    from .remote.jobs import Job
    from .runners import Runner


class Tracer:
    """One trace of a model: what its block records runs when the block ends.

    Use it as a context manager, once.
    """

    _mode = torchmap.Mode()  # has no state: one does for all

    def __init__(
        self,
        model: LanguageModel,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: type[Recorder] = Recorder,
        runner: Runner | None = None,
    ) -> None:
        self.model = model
        self._input = inputs.read(model._tokenizer_for_text, args, kwargs) if args or kwargs else None
        self._recorder = kind(model._native)
        self._recorder.edits = model._edits
        if runner is not None:
            self._recorder.runner = runner
        self._used = False

    @property
    def _has_input(self) -> bool:
        return self._input is not None

    def __enter__(self) -> Tracer:
        if current.recorder is not None:
            raise InputError(
                "a trace cannot begin inside another one",
                hint="Traces of several inputs are invokes of one: `with tracer.invoke(...):`.",
                **positions.fields(here()),
            )
        if self._used:
            raise InputError("a trace runs once", hint="Call model.trace(...) again.", **positions.fields(here()))
        self._used = True
        saving.mount()
        if sessions.opened.session is not None:
            remotely.waits(self._recorder.runner, "a trace of a session")
            sessions.opened.session.begins(self._recorder)
        if self._input is not None:
            self._recorder.open_invoke(*self._input)
        self._mode.__enter__()
        current.recorder = self._recorder
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        rec = self._recorder
        self._mode.__exit__()
        try:
            stopped = rec.stopped = isinstance(error, Stop) and error.recorder is rec
            if kind is None or stopped:
                if rec.edits:
                    rec.close_invoke()
                rec.invoke = -1
                rec.finish()
            else:
                rec.close(f"its block was left by {kind.__name__}")
        except BaseException as e:
            rec.close(f"its trace failed with {type(e).__name__}")
            raise
        finally:
            current.recorder = None
        return stopped

    def stop(self) -> NoReturn:
        """Leaves the block there and then: the lines behind it are not run. In an invoke, it ends that invoke.

        Raises:
            InputError: the block is not open.
        """
        if current.recorder is not self._recorder:
            raise InputError(
                "a trace is stopped from inside its block, and this line stands outside of it",
                hint="Call it in `with model.trace(prompt) as tracer:`.",
                **positions.fields(here()),
            )
        raise Stop(self._recorder)

    @property
    def job(self) -> Job:
        """The job of a trace with ``blocking=False``, once its block has ended: ``id``, ``status``, ``result()``.

        Raises:
            InputError: there is none.
        """
        job = self._recorder.runner.job
        if job is None:
            raise InputError(
                "this trace has no job: nothing of it waits on a server",
                hint="A block with remote=..., blocking=False that saves something has one when it has ended; "
                "the traces of a session have one together, `session.job`.",
                **positions.fields(here()),
            )
        return job

    @property
    def result(self) -> Any:
        """What the model gives: ``model.output``."""
        return self.model.output

    @property
    def iter(self) -> Steps:
        """The steps of the trace by number, ``for step in tracer.iter[:]:``. It has one, step 0."""
        return Steps()

    def all(self) -> Chosen:
        """Every step: ``tracer.iter[:]``."""
        return Steps()[:]

    def __getattr__(self, name: str) -> NoReturn:
        said = f": {foreign.TRACER[name]}" if name in foreign.TRACER else ""
        raise AttributeError(f"a tracer has no {name!r}{said}", name=name, obj=self)

    @property
    def graph(self) -> Graph:
        """What has been recorded so far; after the block, the whole trace."""
        rec = self._recorder
        rec.settle()
        if any(c.version == OF_SESSION for c in rec.captures):
            raise InputError(
                "this trace uses values of an earlier one of its session, which only their job knows",
                hint="Look at the graph of the same trace outside of a session, or of one that runs here.",
                **positions.fields(here()),
            )
        constants = [c.sent for c in rec.captures]
        recording = Recording(
            [v.wire() for v in rec.invokes],
            list(rec.nodes),
            constants,
            tuple(c.version if c.sent is c.original else -1 for c in rec.captures),
            apart(constants, rec.native.device),
        )
        return Graph(recording, rec.facts())

    def explain(self) -> str:
        """What the engine computes for the trace, as text: forward passes, modules that never run, shared tokens.

        Of what has been recorded so far; after the block, of the whole trace. Nothing runs. A wrapped module's
        forward pass is Python's: there is nothing to say of it.
        """
        recording = self.graph.recording
        return self._recorder.native.explain(recording.wire(), len(recording.constants))

    def barrier(self, n: int) -> Barrier:
        """A meeting point of ``n`` invokes: each calls it. Values flow to later invokes without it.

        Raises:
            InputError: at the end of the block, if it was not reached by all of them.
        """
        rec = self._recorder
        return Barrier(lambda: rec.invoke, rec.at_end, n)

    def cache(
        self,
        modules: Iterable[Envoy | str] | Envoy | str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        include_output: bool = True,
        include_inputs: bool = False,
        non_blocking: bool = False,
    ) -> Cache:
        """Collects what modules give, as it is after all edits: of this invoke, or of all invokes that follow.

        Args:
            modules: which, as modules or paths, several or one; by default every one that runs.
            device: where the values are to be.
            dtype: of floating-point values.
            detach: take them out of autograd.
            include_output: collect outputs.
            include_inputs: collect inputs.
            non_blocking: do not wait for copies to another device.

        Returns:
            Entries by ``"model."`` and the module's path, filled when the trace ends.
        """
        convert = conversion(device, dtype, detach, non_blocking)
        return gather(self._recorder, self.model, modules, convert, include_output, include_inputs)

    def invoke(self, *args: Any, **kwargs: Any) -> Invoker:
        """Begins one input of the trace: ``with tracer.invoke("Hello"):``.

        Takes what ``model.trace`` takes. Without an input the block sees the whole batch of the
        invokes before it. Each invoke behaves as if it ran alone, and may use values of earlier ones.

        Raises:
            InputError: the trace has an input of its own, or another invoke is open.
        """
        return Invoker(self, args, kwargs)


class Invoker:
    """One input of a trace, as a context manager."""

    def __init__(self, tracer: Tracer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tracer = tracer
        self._input = inputs.read(tracer.model._tokenizer_for_text, args, kwargs) if args or kwargs else (None, None)
        self._used = False

    def __enter__(self) -> Invoker:
        tracer, rec = self._tracer, self._tracer._recorder
        why = hint = None
        if current.recorder is not rec:
            why, hint = (
                "invokes belong into the block of their trace",
                "Write `with model.trace() as tracer:` around it.",
            )
        elif tracer._has_input:
            why = "this trace has an input already, so it takes no invokes"
            hint = "Write `with model.trace() as tracer:`, and give each invoke its input."
        elif rec.invoke >= 0:
            why, hint = "an invoke cannot begin inside another one", "End the first one's block before it."
        elif self._used:
            why, hint = "an invoke is entered once", "Call tracer.invoke(...) again."
        if why is not None:
            raise InputError(why, hint=hint, **positions.fields(here()))
        self._used = True
        self._open()
        return self

    def _open(self) -> None:
        self._tracer._recorder.open_invoke(*self._input)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        rec = self._tracer._recorder
        stopped = isinstance(error, Stop) and error.recorder is rec
        if rec.edits and (kind is None or stopped):
            rec.close_invoke()
        rec.invoke = -1
        return stopped
