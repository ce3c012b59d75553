"""One input that is continued in a generation: that of the whole block, or of one invoke of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from . import inputs, positions, settings, torchmap
from .drawing import Drawing
from .errors import NnsightError, NotSavedError, RemoteError
from .generation import Generation, StepRecorder, must_wait
from .native import become
from .positions import here
from .recorder import current
from .stopping import Stop

if TYPE_CHECKING:
    from .model import LanguageModel
    from .remote.jobs import Job
    from .runners import Runner


class Awaited(torch.Tensor):
    """The tokens of a generation: a tensor after its block. Using it inside the block runs all steps."""

    _input: Continuation
    _wanted: bool

    @staticmethod
    def _of(continuation: Continuation) -> Awaited:
        out: Any = torch.Tensor._make_subclass(Awaited, torch.empty(0, device="meta"))
        out._input, out._wanted = continuation, False
        return out  # type: ignore[no-any-return]

    def save(self) -> Awaited:
        """Keeps the tokens: after the block this object is the tensor, int64 ``[batch, seq]``."""
        self._wanted = True
        return self

    @property
    def value(self) -> Awaited:
        """The tokens."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in [*args, *(kwargs or {}).values()]:
            if type(x) is Awaited:
                x._input._await(x)
        return func(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "<the tokens of a generation>"


class Continuation:
    """An input, its generation, and the tokens that it gives.

    Raises:
        InputError: the input or a setting cannot be used, or there is no room for so many tokens.
    """

    job: Job | None = None  # of the generation, where nobody waits for it
    _waits = False  # for what that job gives

    def __init__(
        self,
        model: LanguageModel,
        args: tuple[Any, ...],
        by_name: dict[str, Any],
        options: dict[str, Any],
        runner: Runner | None = None,
    ) -> None:
        rows, masks = inputs.read(model._tokenizer_for_text, args, by_name)
        options = dict(options)
        drawing = Drawing(options)
        chosen = settings.collect(options, model.directory, max(map(len, rows)))
        if strings := chosen.pop("stop_strings"):
            drawing.stop_at(strings, model._tokenizer_for_text)
        if chosen["num_beams"] > 1:
            drawing.alone()
        self.generation = Generation(model._native, rows, masks, chosen, model._edits, drawing, runner)
        self.generation.input = self
        self._awaited: list[Awaited] = []
        self._tokens: torch.Tensor | None = None
        self._mode = torchmap.Mode()

    def enter(self) -> None:
        """Begins: the lines that follow are of step 0."""
        self._mode.__enter__()
        current.recorder = self.generation.recorder(0)

    def leave(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """Runs what has not run yet, unless an error came, and tells whether ``tracer.stop()`` ended the block."""
        self._mode.__exit__(kind, error, traceback)
        of = error.recorder if isinstance(error, Stop) else None
        stopped = isinstance(of, StepRecorder) and of.generation is self.generation
        why: str | None = "it was not in use when its step ran"
        try:
            if self.generation.left_alone and (kind is None or stopped):
                self._leave_alone(stopped)
                why = None
            elif kind is None:
                self._finish(None)
            elif isinstance(of, StepRecorder) and stopped:
                self._finish(max(of.step + 1, self.generation.ran))
            else:
                why = f"its block was left by {kind.__name__}"
        except BaseException as e:
            why = f"its generation failed with {type(e).__name__}"
            raise
        finally:
            current.recorder = None
            if why is not None:
                self.generation.close(why)
        return stopped

    def _leave_alone(self, stopped: bool) -> None:
        """Leaves it with a server. What comes is what would have been there now."""
        if stopped:
            raise must_wait("this generation is stopped by a line of its own")
        self.job, self._waits = self.generation.submit(), True
        self.job._reads(self._arrived, self._lost)

    def _arrived(self, answer: Any) -> list[torch.Tensor]:
        """Takes what has come, and gives what the block has saved, in that order; tokens last."""
        self.generation.arrived(answer)
        self._finish(None)
        saved = [
            *_tensors(list(self.generation.saved.values())),
            *(x for x in self._awaited if type(x) is torch.Tensor),
        ]
        self._waits = False
        self.generation.close("it was not in use when its step ran")
        return saved

    def _lost(self, error: NnsightError) -> None:
        self._waits = False
        self.generation.lost(error)

    @property
    def result(self) -> Awaited:
        """All tokens, prompts included: int64 ``[batch, seq]``."""
        out = Awaited._of(self)
        self._awaited.append(out)
        return out

    def _finish(self, steps: int | None) -> None:
        if self._tokens is None:
            self._tokens = self.generation.finish(steps)
        for awaited in self._awaited:
            if type(awaited) is Awaited and awaited._wanted:
                self._adopt(awaited)

    def _await(self, awaited: Awaited) -> None:
        """Runs all steps, since a line inside the block uses the tokens."""
        rec = current.recorder
        if self._waits:
            raise RemoteError(
                "the tokens of this generation are not there yet",
                hint="Wait for them: `tracer.job.result()`, or `await tracer.job`.",
            )
        if not isinstance(rec, StepRecorder) or rec.generation is not self.generation:
            raise NotSavedError(
                "the tokens of this generation were not saved",
                hint="Inside the block, keep them: `output = model.generator.output.save()`.",
                **positions.fields(here()),
            )
        if self._tokens is None:
            self._tokens = self.generation.finish()
        self._adopt(awaited)

    def _adopt(self, awaited: Awaited) -> None:
        assert self._tokens is not None
        become([awaited], [self._tokens])


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    """The tensors in a structure of containers, in order."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, list | tuple | dict):
        for part in x.values() if isinstance(x, dict) else x:
            yield from _tensors(part)
