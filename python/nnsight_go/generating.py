"""``with model.generate(prompt, max_new_tokens=...) as tracer:``: the whole trace language at every step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import foreign, positions, saving, sessions
from . import remote as remotely
from .barrier import Barrier
from .cache import Cache, conversion, follow
from .continuation import Continuation
from .errors import InputError
from .generation import Generation, StepRecorder, chosen
from .loops import Loop
from .positions import here
from .proxy import Proxy
from .recorder import current
from .stopping import Stop

if TYPE_CHECKING:
    from .envoy import Envoy
    from .model import LanguageModel
    from .remote.jobs import Job
    from .runners import Runner


class Generator:
    """``model.generator``: what the generation that goes on gives."""

    @property
    def output(self) -> Any:
        """All tokens, prompts included: int64 ``[batch, seq]``; rows that ended early are filled up."""
        continuation = _recorder().generation.input
        assert continuation is not None
        return continuation.result

    @property
    def streamer(self) -> Streamer:
        """``model.generator.streamer.output``: the tokens that are new at each step."""
        return Streamer()


class Streamer:
    """``model.generator.streamer``: what a streamer is given, step by step."""

    @property
    def output(self) -> Proxy:
        """The tokens that the step sees: int64, at step 0 the prompts ``[batch, seq]``, at others ``[batch]``."""
        rec = _recorder()
        return Proxy._make(rec, rec.tokens())


def _recorder() -> StepRecorder:
    rec = current.recorder
    if not isinstance(rec, StepRecorder) or rec.generation.input is None:
        raise InputError(
            "model.generator has a value only inside of a generation",
            hint="Use it in `with model.generate(prompt, max_new_tokens=...):`.",
            **positions.fields(here()),
        )
    return rec


class Steps:
    """``tracer.iter[2:5]``: steps of a generation, by number from 0, which is the prompt."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __getitem__(self, which: Any) -> Chosen:
        return Chosen(self._generation, chosen(which, self._generation.most))


class Chosen:
    """Steps to go through.

    ``for step in tracer.iter[...]:`` runs its body at each step that happens. ``with tracer.iter[...]:``
    runs its body once, and what it recorded is replayed at each of them.
    """

    def __init__(self, generation: Generation, steps: list[int] | range) -> None:
        self._generation, self._steps = generation, steps
        self._open: Any = None
        self._loop: Loop | None = None

    def __iter__(self) -> Iterator[int]:
        generation = self._generation
        for step in self._steps:
            if not generation.run_to(step):
                return
            with generation.at(step):
                yield step

    def __enter__(self) -> int:
        if not self._steps:
            raise InputError("these are no steps", hint="Steps go from 0 on.", **positions.fields(here()))
        generation = self._generation
        frame = sys._getframe(1)
        first = self._steps[0]
        if first < generation.ran:
            raise InputError(
                f"step {first} has run already",
                hint="Write the loop ahead of lines that need values of later steps.",
                **positions.fields(here()),
            )
        self._open = generation.at(first)
        rec = self._open.__enter__()
        rec.in_loop = here()
        self._loop = Loop(generation, self._steps, frame)
        return first

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        rec = current.recorder
        assert isinstance(rec, StepRecorder) and self._loop is not None
        rec.in_loop = None
        try:
            if kind is None:
                self._loop.leave()
        finally:
            self._open.__exit__(None, None, None)


class Generating:
    """A generation. Lines outside of loops are of step 0, the prompt. Use it as a context manager, once."""

    def __init__(
        self, model: LanguageModel, args: tuple[Any, ...], kwargs: dict[str, Any], runner: Runner | None = None
    ) -> None:
        self.model, self._runner = model, runner
        by_name = model._inputs_of(kwargs)
        self._options = kwargs
        self._own = model._continue(args, by_name, kwargs, runner) if args or by_name else None
        self._at_end: list[Callable[[], None]] = []
        self._invokes = 0
        self._inside = self._used = False

    def __enter__(self) -> Generating:
        if current.recorder is not None or self._used:
            raise InputError(
                "a generation runs once, and not inside a trace",
                hint="Call model.generate(...) again.",
                **positions.fields(here()),
            )
        self._used = self._inside = True
        saving.mount()
        sessions.flush()
        if sessions.opened.session is not None and self._runner is not None:
            remotely.waits(self._runner, "a generation of a session")
        if self._own is not None:
            self._own.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self._inside = False
        stopped = self._own is not None and self._own.leave(kind, error, traceback)
        if kind is None or stopped:
            for act in self._at_end:
                act()
        return stopped

    def _recorder(self) -> StepRecorder:
        """The recording of the step that lines belong to here."""
        rec = current.recorder
        if not self._inside or not isinstance(rec, StepRecorder):
            raise InputError(
                "this line stands outside of " + ("every invoke" if self._inside else "the generation's block"),
                hint="Write it into `with tracer.invoke(prompt):`."
                if self._inside
                else "Write it into `with model.generate(prompt, max_new_tokens=...) as tracer:`.",
                **positions.fields(here()),
            )
        return rec

    @property
    def result(self) -> Any:
        """All tokens, as ``model.generator.output`` gives them: of this invoke, where there are several."""
        own = self._recorder().generation.input
        assert own is not None
        return own.result

    @property
    def job(self) -> Job:
        """The job of a generation with ``blocking=False``, once its block has ended: ``id``, ``status``, ``result()``.

        Raises:
            InputError: there is none.
        """
        if self._own is None or self._own.job is None:
            raise InputError(
                "this generation has no job: nothing of it waits on a server",
                hint="A block with remote=..., blocking=False has one when it has ended.",
                **positions.fields(here()),
            )
        return self._own.job

    @property
    def scores(self) -> list[torch.Tensor]:
        """What tokens were drawn from, one ``[batch, vocab]`` a step that ran, if ``output_scores=True`` asks for it.

        They are as transformers' ``scores``: after all processors and filters. The list stays after the block;
        in a generation of several invokes each has its own.
        """
        generation = self._own.generation if self._own is not None else self._recorder().generation
        if generation.drawing.scores is None:
            raise InputError(
                "this generation keeps no scores",
                hint="Ask for them: model.generate(..., output_scores=True).",
                **positions.fields(here()),
            )
        return generation.drawing.scores

    @property
    def iter(self) -> Steps:
        """Steps by number: ``for step in tracer.iter[2:5]:``, ``with tracer.iter[:]:``."""
        return Steps(self._recorder().generation)

    def all(self) -> Chosen:
        """Every step: ``tracer.iter[:]``."""
        return self.iter[:]

    def next(self, steps: int = 1) -> Generating:
        """Goes on to the next step: the lines that follow belong to it.

        Raises:
            OutOfOrderError: the generation ends before that step.
        """
        self._recorder().advance(steps)
        return self

    def stop(self) -> NoReturn:
        """Leaves the block there and then. The step that the line belongs to still runs, and none after it.

        In an invoke, it ends that invoke.
        """
        raise Stop(self._recorder())

    def invoke(self, *args: Any, **kwargs: Any) -> Invoker:
        """Begins one input of the generation: ``with tracer.invoke("Hello"):``.

        Each invoke is continued as if it were alone, to its end; then the next one begins, which may use
        what the ones before it saved. Prompts of one invoke, a list, are continued together.

        Raises:
            InputError: the generation has an input of its own, or another invoke is open.
        """
        return Invoker(self, args, kwargs)

    def barrier(self, n: int) -> Barrier:
        """A meeting point of ``n`` invokes: each calls it. Values flow to later invokes without it.

        Raises:
            InputError: at the end of the block, if it was not reached by all of them.
        """

        def invoke() -> int:
            self._recorder()
            return self._invokes - 1

        return Barrier(invoke, self._at_end, n)

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
        """Collects what modules give at this step and all that follow, as it is after all edits.

        Takes what a trace's ``cache`` takes. Where several steps ran, each module has a list of entries,
        one a step.
        """
        convert = conversion(device, dtype, detach, non_blocking)
        return follow(self._recorder(), self.model, modules, convert, include_output, include_inputs)

    def __getattr__(self, name: str) -> NoReturn:
        said = f": {foreign.TRACER[name]}" if name in foreign.TRACER else ""
        raise AttributeError(f"a generation has no {name!r}{said}", name=name, obj=self)


class Invoker:
    """One input of a generation, as a context manager."""

    def __init__(self, tracer: Generating, args: tuple[Any, ...], by_name: dict[str, Any]) -> None:
        if tracer._runner is not None:
            remotely.waits(tracer._runner, "a generation of several invokes")
        self._tracer = tracer
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = (args, by_name)
        self._input: Continuation | None = None

    def __enter__(self) -> Invoker:
        tracer, why = self._tracer, None
        if not tracer._inside:
            why, hint = "invokes belong into the block of their generation", "Write them inside of it."
        elif tracer._own is not None:
            why = "this generation has an input already, so it takes no invokes"
            hint = "Write `with model.generate(max_new_tokens=...) as tracer:`, and give each invoke its input."
        elif current.recorder is not None:
            why, hint = "an invoke cannot begin inside another one", "End the first one's block before it."
        elif self._given is None:
            why, hint = "an invoke is entered once", "Call tracer.invoke(...) again."
        elif not any(self._given):
            why = "an invoke of a generation needs an input: each is continued alone, so there is no whole batch"
            hint = "Give the prompts that belong together to one invoke, as a list."
        if why is not None:
            raise InputError(why, hint=hint, **positions.fields(here()))
        assert self._given is not None
        (args, by_name), self._given = self._given, None
        self._input = tracer.model._continue(args, by_name, tracer._options, tracer._runner)
        tracer._invokes += 1
        self._input.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        assert self._input is not None
        return self._input.leave(kind, error, traceback)
