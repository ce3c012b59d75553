"""One generation: steps of a model, each a recording of its own that runs when the program has got past it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from . import positions, wire
from .drawing import Drawing
from .errors import InputError, NnsightError, OutOfOrderError, StepLoopError
from .points import Leaf
from .positions import Place, here
from .proxy import Proxy
from .recorder import _CONST, Invoke, Recorder, _Capture, current
from .sessions import Living

if TYPE_CHECKING:
    from .continuation import Continuation
    from .edits import Edit
    from .loops import Loop
    from .native import Native
    from .remote.jobs import Job
    from .runners import Runner, Running


# Versions of constants that are no tensors yet: values of earlier steps, and the tokens that a step sees.
_LATER, _DRAWN = -2, -3


class StepRecorder(Recorder):
    """Records what the program does at one step."""

    plain = False
    _rows: list[list[int]] | None = None  # those of its invoke: the engine knows them

    def __init__(self, generation: Generation, step: int) -> None:
        super().__init__(generation.native)
        self.runner = generation.runner
        self.generation, self.step = generation, step
        self.living = Living()
        for edit in generation.edits:
            self._bring(edit)
        self.invokes.append(Invoke(self._rows))
        self.invoke = len(self.invokes) - 1
        self.in_loop: Place = None  # inside the body of a `with` loop, which is to be replayed
        self._const_of: dict[int, int] = {}  # values of other steps: their nodes here
        self.tokens_at = -1  # the capture that is the step's tokens
        self._tokens: int | None = None

    def batch(self, invoke: int) -> tuple[int, int]:
        """Rows, and tokens that the step adds to each."""
        self.pinned = self.pinned or here()
        rows, tokens = self.generation.sizes
        return rows, tokens if self.step == 0 else 1

    def _leaf_meta(self, invoke: int, order: int, leaf: Leaf, writes: int) -> torch.Tensor:
        rows, tokens = self.batch(invoke)
        if order >= self.native.points["lm_head", wire.INPUT].order:  # the head sees the last token alone
            tokens = 1
        return torch.empty(leaf.sizes(rows, tokens), dtype=leaf.dtype, device="meta")

    def alive(self, proxy: Proxy) -> None:
        """Raises where a proxy can no longer be used, or not here."""
        rec = proxy._rec
        if rec is not self and isinstance(rec, StepRecorder) and rec.generation is self.generation:
            return
        mine = isinstance(current.recorder, StepRecorder) and current.recorder.generation is self.generation
        if self.closed is not None or not mine:
            self.refuse(proxy)

    def number(self, tensor: torch.Tensor) -> int:
        """The node of a tensor; a value of another step is a constant that its own step gives."""
        if type(tensor) is Proxy and tensor._rec is not self and isinstance(tensor._rec, StepRecorder):
            other = tensor._rec
            if other.generation is self.generation and other.closed is None:
                if other.step >= self.step:
                    raise OutOfOrderError(
                        f"a line of step {self.step} uses a value of step {other.step}, which comes after it",
                        hint="Values go from a step to later ones.",
                        **positions.fields(here()),
                    )
                return self._pending(tensor)
        return super().number(tensor)

    def _pending(self, proxy: Proxy) -> int:
        """A constant that is a value of an earlier step, a tensor once that step has run."""
        node = self._const_of.get(id(proxy))
        if node is None:
            self.generation.hold(proxy)
            index = len(self.captures)
            self.captures.append(_Capture(proxy, _LATER, proxy, index, here()))
            node = self._const_of[id(proxy)] = self._add(_CONST, (lambda: proxy._rec.meta(proxy), (), None), index)
        return node

    def tokens(self) -> int:
        """The node of what the step's tokens are: int64, of step 0 the prompts ``[batch, seq]``, else ``[batch]``."""
        if self._tokens is None:
            rows, seq = self.generation.sizes
            meta = torch.empty((rows, seq) if self.step == 0 else (rows,), dtype=torch.int64, device="meta")
            self.tokens_at = len(self.captures)
            self.captures.append(_Capture(meta, _DRAWN, meta, self.tokens_at, here()))
            self._tokens = self._add(_CONST, (meta.clone, (), None), self.tokens_at)
        return self._tokens

    def localized(self, x: Any) -> Any:
        """Arguments with values of other steps replaced by their constants here, so that shapes are known."""
        if type(x) is Proxy and x._rec is not self and isinstance(x._rec, StepRecorder) and x._rec.closed is None:
            return Proxy._make(self, self.number(x))
        if type(x) is list or type(x) is tuple:
            return type(x)(map(self.localized, x))
        return {k: self.localized(v) for k, v in x.items()} if type(x) is dict else x

    def _go_on(self, ids: list[int], end: bool, adopt: list[Proxy] | None) -> list[torch.Tensor]:
        for capture in self.captures:
            if capture.version == _DRAWN:  # the steps before have run
                capture.original = capture.sent = self.generation.tokens(self.step)
            if capture.version < 0:
                capture.version = capture.original._version
        return super()._go_on(ids, end, adopt)

    def _inside(self, what: Callable[[], str]) -> int:
        if self.step < self.generation.ran:
            raise OutOfOrderError(
                f"{what()} is of step {self.step}, which has run",
                hint="Write lines of later steps into `for step in tracer.iter[...]:`.",
                **positions.fields(here()),
            )
        return super()._inside(what)

    def force(self, wanted: Iterable[Proxy]) -> list[torch.Tensor]:
        """The real values of proxies: the steps before run to their end, and this one as far as it must."""
        if self.in_loop is not None:
            raise StepLoopError(
                "this line needs a value, and the body of a `with` loop is recorded once for all its steps",
                hint="Write `for step in tracer.iter[...]:`, whose body runs at every step.",
                **positions.fields(here()),
            )
        self.generation.run_to(self.step)
        return super().force(wanted)

    def advance(self, steps: int) -> None:
        """Makes a later step the one that the lines that follow belong to.

        Raises:
            OutOfOrderError: the generation ends before that step.
            StepLoopError: the line stands in the body of a ``with`` loop, recorded once for all its steps.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise InputError(f"next() goes on by a number of steps, not {steps!r}", **positions.fields(here()))
        if self.in_loop is not None:
            raise StepLoopError(
                "next() goes on to another step, and the body of a `with` loop is recorded once for all its steps",
                hint="Write `for step in tracer.iter[...]:`, whose body runs at every step.",
                **positions.fields(here()),
            )
        generation, step = self.generation, self.step + steps
        if not generation.run_to(step):
            raise OutOfOrderError(
                f"there is no step {step}: the generation ended after {generation.ran} steps",
                hint="`for step in tracer.iter[...]:` goes through the steps that happen.",
                **positions.fields(here()),
            )
        current.recorder = generation.recorder(step)

    def _begin(self, data: bytes, constants: list[torch.Tensor], end: bool) -> Running:
        return self.generation.handle.step(data, constants, end)

    def waits(self, first: int) -> bool:
        """Whether it needs values or tokens of a step from ``first`` on, which has not run."""
        later = (c.original for c in self.captures if c.version == _LATER)
        return any(c.version == _DRAWN for c in self.captures) or any(
            isinstance(x, Proxy) and _step(x) >= first for x in later
        )

    def complete(self) -> Callable[[], None]:
        """Runs the step to its end. Every value of it that is in use somewhere becomes its tensor.

        Gives what is to be done once they are.
        """
        self.conclude()
        found = [collect(self) for collect in self.generation.collectors]  # in use until the step has run
        self.made, self.metas, self.bound, self._forced = [], {}, {}, (-1, {})  # these hold proxies too
        assert self.living is not None
        named = {id(p) for loop in self.generation.loops for p in loop.named}
        wanted = [p for p in self.living.now() if id(p) not in named]
        try:
            self._go_on([p._id for p in wanted], end=True, adopt=wanted)
        except NnsightError as error:
            error.step = self.step
            raise

        def done() -> None:
            self.close("its step has run, and it was not in use then")
            for add in found:
                add()

        return done


# Steps whose recordings are complete, and what is to be done once each has run.
Completed = list[tuple[StepRecorder, Callable[[], None]]]


class Generation:
    """A batch of rows that grow, step by step, with what the program does at each."""

    def __init__(
        self,
        native: Native,
        rows: list[list[int]],
        masks: Any,
        settings: dict[str, Any],
        edits: Sequence[Edit] = (),
        drawing: Drawing | None = None,
        runner: Runner | None = None,
    ) -> None:
        self._open(native, edits, drawing or Drawing({}), runner)
        each = max(settings["num_return_sequences"], settings["num_beams"])  # rows of each prompt, side by side
        self.sizes = len(rows) * each, max(map(len, rows))
        self.most: int = settings["max_new_tokens"]
        pad = settings["pad_token_id"]
        self.rows = [[pad] * (self.sizes[1] - len(row)) + row for row in rows for _ in range(each)]
        self.handle = self.runner.generation(rows, masks, settings, self.drawing.wants)
        self.together = self.handle.together

    def _open(self, native: Any, edits: Sequence[Edit], drawing: Drawing, runner: Runner | None = None) -> None:
        self.native, self.edits, self.drawing = native, edits, drawing
        self.runner: Runner = runner or native
        # Each reads values at the end of a step, and gives what is to be done with them once it has run.
        self.collectors: list[Callable[[StepRecorder], Callable[[], None]]] = []
        self.ran = 0  # steps that have run
        self.together = 1  # steps that may run at once
        self.ended = False
        self.input: Continuation | None = None
        self.loops: list[Loop] = []
        self.saved: dict[int, Any] = {}
        self._steps: dict[int, StepRecorder] = {}
        self._held: list[Proxy] = []
        self._left: Completed = []  # steps that a server has, of which nothing has come yet

    def recorder(self, step: int) -> StepRecorder:
        """The recording of a step, with the loops before this line replayed into it."""
        rec = self._steps.get(step)
        if rec is None:
            rec = self._steps[step] = self._record(step)
            rec._saved = self.saved
        for loop in self.loops:
            loop.replay(rec)
        return rec

    def _record(self, step: int) -> StepRecorder:
        return StepRecorder(self, step)

    @contextmanager
    def at(self, step: int) -> Iterator[StepRecorder]:
        """Makes a step the one that lines belong to."""
        before = current.recorder
        current.recorder = rec = self.recorder(step)
        try:
            yield rec
        finally:
            current.recorder = before

    def tokens(self, step: int) -> torch.Tensor:
        """The tokens that the step which is next sees."""
        rows = self.rows if step == 0 else [row[-1] for row in self.rows]
        return torch.tensor(rows, device=self.native.device)

    def hold(self, proxy: Proxy) -> None:
        """Keeps a value in use until the generation ends, since a later step needs it."""
        self._held.append(proxy)

    def run_to(self, step: int) -> bool:
        """Runs all steps before one, and tells whether that one happens."""
        if step > self.ran and not self.ended and self.left_alone:
            raise must_wait("this line goes on to a later step, which needs the tokens of those before")
        while self.ran < step and not self.ended:
            last = min(step, self.ran + self.together) if self.drawing.idle else self.ran + 1
            if last == self.ran + 1:
                with self.at(self.ran) as rec:
                    done = rec.complete()
                self._happened(done)
            else:
                self._run_together(last)
        return self.ran == step and not self.ended

    def _run_together(self, last: int) -> None:
        """Runs steps before ``last``: as many as need nothing of each other that Python would hand on."""
        steps = self._gather(last)
        try:
            happened = self.handle.flush()
        except NnsightError as error:
            _count(steps, self.ran, error)
            raise
        for _, done in steps[:happened]:
            self._happened(done)

    def _gather(self, last: int) -> Completed:
        """Records the ends of these steps, which wait for ``flush``."""
        self.handle.gather()
        steps: Completed = []
        for number in range(self.ran, last):
            if any(loop.needs(number, self.ran) for loop in self.loops):
                break
            if number > self.ran and self.recorder(number).waits(self.ran):
                break
            with self.at(number) as rec:
                steps.append((rec, rec.complete()))
        return steps

    @property
    def left_alone(self) -> bool:
        """Whether nobody waits for it."""
        return not getattr(self.runner, "blocking", True)

    def submit(self) -> Job:
        """Leaves all steps with a server.

        Raises:
            InputError: something is to be done here between two of them.
        """
        steps = self._gather(self.most) if self.drawing.idle and not self.ran else []
        if len(steps) < self.most:
            raise must_wait("this generation has something to do here between its steps")
        handle: Any = self.handle
        job: Job = handle.submit()
        self._left = steps
        for rec, _ in steps:
            rec.job, rec.closed = job, "the job of its generation has not been waited for"
        return job

    def arrived(self, answer: Any) -> None:
        """Does what is to be done at each step, once all have come."""
        for rec, _ in self._left:
            rec.job = rec.closed = None
        handle: Any = self.handle
        for _, done in self._left[: handle.arrived(answer)]:
            self._happened(done)

    def lost(self, error: NnsightError) -> None:
        """Ends it, of which nothing will come."""
        _count(self._left, 0, error)
        for rec, _ in self._left:
            rec.job = None
        self.close(f"the job of its generation failed with {type(error).__name__}")

    def _happened(self, done: Callable[[], None]) -> None:
        """Goes on to the tokens of a step that has run."""
        done()
        self.ended = True  # if one of the user's functions fails now, nothing follows
        self.ended = self._draw()
        del self._steps[self.ran]
        for loop in self.loops:
            loop.happened(self.ran)
        self.ran += 1

    def _draw(self) -> bool:
        """Adds the tokens of the step that has run, and tells whether it was the last one."""
        if self.ran == 0:
            self.drawing.begin(self.rows)
        return self.drawing.draw(self.handle, self.rows, self.native.device)

    def finish(self, steps: int | None = None) -> torch.Tensor:
        """Runs to the end, or so many steps, and gives all tokens ``[batch, seq]``."""
        self.run_to(self.most if steps is None else steps)
        self.drawing.finish()
        for loop in self.loops:
            loop.end()
        return torch.tensor(self.rows, device=self.native.device)

    def close(self, why: str) -> None:
        """Gives everything back."""
        for rec in self._steps.values():
            rec.close(why)
        self._steps, self._held, self.loops, self.saved = {}, [], [], {}
        self._free()

    def _free(self) -> None:
        self.handle.free()


def _count(steps: Completed, first: int, error: NnsightError) -> None:
    """Numbers the invoke of an error of one of these steps as the user counts them."""
    if error.step is not None and 0 <= (at := error.step - first) < len(steps):
        steps[at][0].count(error)


def must_wait(why: str) -> InputError:
    """The error of what cannot be left alone."""
    return InputError(
        f"{why}, so that it must be waited for",
        hint="Leave blocking=False out. What can be left alone: lines of step 0, and `with tracer.iter[...]:` "
        "whose lines use no value of another step.",
        **positions.fields(here()),
    )


def _step(proxy: Proxy) -> int:
    """The step that a value is of."""
    rec = proxy._rec
    assert isinstance(rec, StepRecorder)
    return rec.step


def chosen(which: Any, most: int) -> list[int] | range:
    """The steps that a selection names, in order.

    Raises:
        InputError: it is no step, slice or list of steps.
    """
    if isinstance(which, slice):
        return range(most)[which]
    if isinstance(which, int) and not isinstance(which, bool):
        which = [which]
    if not isinstance(which, list | tuple | range) or not all(isinstance(step, int) for step in which):
        raise InputError(
            f"{which!r} names no steps",
            hint="Write tracer.iter[3], [2:5], [::2] or [[0, 2]].",
            **positions.fields(here()),
        )
    steps = [step + most if step < 0 else step for step in which]
    if steps != sorted(set(steps)):
        raise InputError("steps go up, each once", hint="List them in order.", **positions.fields(here()))
    return [step for step in steps if 0 <= step < most]
