"""``with model.generate(prompt, max_new_tokens=...) as tracer:``: the whole trace language at every step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import _ffi, inputs, positions, saving, settings, torchmap
from .errors import InputError, NotSavedError
from .generation import Generation, StepRecorder, chosen
from .loops import Loop
from .positions import here
from .recorder import current
from .stopping import Stop

if TYPE_CHECKING:
    from .model import LanguageModel


class Awaited(torch.Tensor):
    """The tokens of a generation: a tensor after its block. Using it inside the block runs all steps."""

    _tracer: Generating
    _wanted: bool

    @staticmethod
    def _of(tracer: Generating) -> Awaited:
        out: Any = torch.Tensor._make_subclass(Awaited, torch.empty(0, device="meta"))
        out._tracer, out._wanted = tracer, False
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
                x._tracer._await(x)
        return func(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return "<the tokens of a generation>"


class Generator:
    """``model.generator``: what the generation that goes on gives."""

    @property
    def output(self) -> Any:
        """All tokens, prompts included: int64 ``[batch, seq]``; rows that ended early are filled up."""
        rec = current.recorder
        if not isinstance(rec, StepRecorder) or rec.generation.tracer is None:
            raise InputError(
                "model.generator has a value only inside of a generation",
                hint="Use it in `with model.generate(prompt, max_new_tokens=...):`.",
                **positions.fields(here()),
            )
        return rec.generation.tracer.result


class Steps:
    """``tracer.iter[2:5]``: steps of a generation, by number from 0, which is the prompt."""

    def __init__(self, tracer: Generating) -> None:
        self._tracer = tracer

    def __getitem__(self, which: Any) -> Chosen:
        return Chosen(self._tracer, chosen(which, self._tracer._generation.most))


class Chosen:
    """Steps to go through.

    ``for step in tracer.iter[...]:`` runs its body at each step that happens. ``with tracer.iter[...]:``
    runs its body once, and what it recorded is replayed at each of them.
    """

    def __init__(self, tracer: Generating, steps: list[int] | range) -> None:
        self._tracer, self._steps = tracer, steps
        self._open: Any = None
        self._loop: Loop | None = None

    def __iter__(self) -> Iterator[int]:
        generation = self._tracer._generation
        for step in self._steps:
            if not generation.run_to(step):
                return
            with generation.at(step):
                yield step

    def __enter__(self) -> int:
        if not self._steps:
            raise InputError("these are no steps", hint="Steps go from 0 on.", **positions.fields(here()))
        generation = self._tracer._generation
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

    def __init__(self, model: LanguageModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model = model
        by_name: dict[str, Any] = {k: kwargs.pop(k) for k in ("input_ids", "attention_mask") if k in kwargs}
        rows, masks = inputs.read(model._tokenizer_for_text, args, by_name)
        options = settings.collect(kwargs, model.directory, max(map(len, rows)))
        self._generation = Generation(model._native, rows, masks, options)
        self._generation.tracer = self
        self._awaited: list[Awaited] = []
        self._tokens: torch.Tensor | None = None
        self._mode: torchmap.Mode | None = None
        self._used = False

    def __enter__(self) -> Generating:
        if current.recorder is not None or self._used:
            raise InputError(
                "a generation runs once, and not inside a trace",
                hint="Call model.generate(...) again.",
                **positions.fields(here()),
            )
        self._used = True
        saving.mount()
        self._mode = torchmap.Mode()
        self._mode.__enter__()
        current.recorder = self._generation.recorder(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        assert self._mode is not None
        self._mode.__exit__(kind, error, traceback)
        stopped = isinstance(error, Stop) and isinstance(error.recorder, StepRecorder)
        stopped = stopped and error.recorder.generation is self._generation  # type: ignore[union-attr]
        why = "it was not in use when its step ran"
        try:
            if kind is None:
                self._finish(None)
            elif stopped:
                self._finish(max(error.recorder.step + 1, self._generation.ran))  # type: ignore[union-attr]
            else:
                why = f"its block was left by {kind.__name__}"
        except BaseException as e:
            why = f"its generation failed with {type(e).__name__}"
            raise
        finally:
            current.recorder = None
            self._generation.close(why)
        return stopped

    def _finish(self, steps: int | None) -> None:
        if self._tokens is None:
            self._tokens = self._generation.finish(steps)
        for awaited in self._awaited:
            if type(awaited) is Awaited and awaited._wanted:
                self._adopt(awaited)

    def _await(self, awaited: Awaited) -> None:
        """Runs all steps, since a line inside the block uses the tokens."""
        if current.recorder is None:
            raise NotSavedError(
                "the tokens of this generation were not saved",
                hint="Inside the block, keep them: `output = model.generator.output.save()`.",
                **positions.fields(here()),
            )
        if self._tokens is None:
            self._tokens = self._generation.finish()
        self._adopt(awaited)

    def _adopt(self, awaited: Awaited) -> None:
        assert self._tokens is not None
        py = _ffi.py()
        import ctypes

        pointer = (ctypes.c_void_p * 1)(py.nngpy_unwrap(self._tokens))
        try:
            py.nngpy_adopt([awaited], pointer, torch.Tensor)
        finally:
            py.nngpy_tensor_free(pointer[0])

    @property
    def result(self) -> Any:
        """All tokens, as ``model.generator.output`` gives them."""
        out = Awaited._of(self)
        self._awaited.append(out)
        return out

    @property
    def iter(self) -> Steps:
        """Steps by number: ``for step in tracer.iter[2:5]:``, ``with tracer.iter[:]:``."""
        return Steps(self)

    def all(self) -> Chosen:
        """Every step: ``tracer.iter[:]``."""
        return self.iter[:]

    def stop(self) -> NoReturn:
        """Leaves the block there and then. The step that the line belongs to still runs, and none after it."""
        rec = current.recorder
        assert isinstance(rec, StepRecorder)
        raise Stop(rec)
