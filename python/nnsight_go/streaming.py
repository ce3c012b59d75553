"""``for piece in model.stream(prompt, max_new_tokens=...):``: text as it is written."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import _ffi, positions
from .errors import InputError
from .positions import here
from .recorder import current
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .generation import Generation
    from .model import LanguageModel
    from .runners import Runner


class Decoding(_ffi.Owner):
    """Ids that come one at a time, as pieces of text."""

    frees = "nng_stream_free"

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer  # which stays open meanwhile
        given = (tokenizer._native._handle, skip_special_tokens)
        _ffi.check(_ffi.lib().nng_stream_new, *given, ctypes.byref(self._handle))

    def step(self, ids: list[int], end: bool) -> str:
        """The text that became certain, which may be none; with ``end`` what was held back too."""
        array = (ctypes.c_int64 * len(ids))(*ids)
        return _ffi.call(_ffi.lib().nng_stream_step, self._handle, array, len(ids), end).decode()


class TextStream(Iterator[str]):
    """The text that a model writes behind a prompt, in pieces.

    Each piece runs as many steps as it needs. ``close()`` (or the end of a ``with`` block, or losing the
    last reference) gives the generation back before its end.
    """

    def __init__(
        self, model: LanguageModel, args: tuple[Any, ...], options: dict[str, Any], runner: Runner | None = None
    ) -> None:
        if current.recorder is not None:
            raise InputError(
                "text cannot be streamed inside a trace",
                hint="Call model.stream(...) outside of its block.",
                **positions.fields(here()),
            )
        tokenizer = model._tokenizer_for_text()
        if not isinstance(tokenizer, Tokenizer):
            raise InputError(
                f"a {type(tokenizer).__name__} cannot decode a stream",
                hint="Give generate(...) a streamer of that library, or leave the model its own tokenizer.",
                **positions.fields(here()),
            )
        skip = bool(options.pop("skip_special_tokens", True))
        by_name = model._inputs_of(options)
        self._generation = model._continue(args, by_name, options, runner).generation
        if len(self._generation.rows) != 1:
            self._generation.close("nothing ran")
            raise InputError(
                f"{len(self._generation.rows)} texts cannot be streamed as one",
                hint="Give one prompt.",
                **positions.fields(here()),
            )
        self._decoding = Decoding(tokenizer, skip)
        self._finish = weakref.finalize(self, _free, self._generation, self._decoding)

    def __next__(self) -> str:
        generation = self._generation
        try:
            while self._finish.alive:
                if current.recorder is not None:
                    raise InputError("text cannot be streamed inside a trace", **positions.fields(here()))
                generation.run_to(generation.ran + 1)
                piece = self._decoding.step(generation.rows[0][-1:], generation.ended)
                if generation.ended:
                    generation.drawing.finish()
                    self.close()
                if piece:
                    return piece
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def close(self) -> None:
        """Ends the generation and gives its memory back. It may be called twice."""
        self._finish()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _free(generation: Generation, decoding: Decoding) -> None:
    generation.close("its stream was closed")
    decoding.free()
