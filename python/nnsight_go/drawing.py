"""What the program has a say in between a step of a generation and its tokens, called as transformers calls it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import positions
from .errors import InputError
from .positions import here
from .recorder import current
from .runners import Continuing, Drawn, Rows, Wants

OPTIONS = frozenset({"logits_processor", "stopping_criteria", "streamer", "output_scores", "tokenizer"})


class Drawing:
    """Draws the tokens of steps, with the user's processors, criteria and streamer.

    Attributes:
        scores: what tokens were drawn from, float32 ``[batch, vocab]`` a step; None unless asked for.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        """Takes what is meant for it out of the options of ``generate``."""
        self._processors = _callables("logits_processor", options.pop("logits_processor", None))
        self._criteria = _callables("stopping_criteria", options.pop("stopping_criteria", None))
        self.streamer = options.pop("streamer", None)
        self._tokenizer = options.pop("tokenizer", None)
        self.scores: list[torch.Tensor] | None = None
        if options.pop("output_scores", False):
            self.scores = []
            options.pop("return_dict_in_generate", None)  # the way there in transformers
        for verb in ("put", "end"):
            if self.streamer is not None and not callable(getattr(self.streamer, verb, None)):
                raise InputError(
                    f"a {type(self.streamer).__name__} is no streamer: it has no {verb}()",
                    hint="Give an object like transformers' TextStreamer.",
                    **positions.fields(here()),
                )

    def stop_at(self, strings: str | Sequence[str], tokenizer: Callable[[], Any]) -> None:
        """Ends rows that come to one of these strings.

        Args:
            strings: one, or several.
            tokenizer: gives the model's; one that ``generate`` was given goes before.
        """
        strings = [strings] if isinstance(strings, str) else list(strings)
        if not strings or not all(isinstance(s, str) and s for s in strings):
            raise InputError(
                f"stop_strings={strings!r} are no strings to stop at",
                hint="Give a string or a list of strings, none of them empty.",
                **positions.fields(here()),
            )
        self._criteria.insert(0, StopStrings(strings, self._tokenizer or tokenizer()))

    def alone(self) -> None:
        """Raises where a beam search, whose rows are others at each step, cannot call what was given."""
        for name, given in (("streamer", self.streamer), ("stopping_criteria and stop_strings", self._criteria)):
            if given:
                raise InputError(
                    f"a beam search takes no {name} in this version",
                    hint="Leave it out, or give num_beams=1.",
                    **positions.fields(here()),
                )

    def begin(self, rows: Rows) -> None:
        """Hands the prompts to the streamer."""
        if self.streamer is not None:
            with _aside():
                self.streamer.put(torch.tensor(rows))

    def draw(self, handle: Continuing, rows: Rows, device: torch.device) -> bool:
        """Draws the tokens of the step that is done, adds them to the rows, and tells whether it was the last."""
        with _aside():
            drawn, left = self._drawn(handle, rows, device)
            if self.scores is not None:
                assert left is not None
                self.scores.append(left)
            if drawn.rows is not None:
                rows[:] = drawn.rows
            else:
                for row, token in zip(rows, drawn.tokens, strict=True):
                    row.append(token)
            done = drawn.done
            if self._criteria:
                done = handle.end(self.ends(torch.tensor(rows, device=device)).tolist())
            if self.streamer is not None:
                self.streamer.put(torch.tensor(drawn.tokens))
        return done

    def finish(self) -> None:
        """Tells the streamer that no tokens follow."""
        if self.streamer is not None:
            with _aside():
                self.streamer.end()

    def _drawn(self, handle: Continuing, rows: Rows, device: torch.device) -> tuple[Drawn, torch.Tensor | None]:
        if not self._processors:
            return handle.next(left=self.scores is not None)
        return handle.choose(self.process(torch.tensor(rows, device=device), handle.scores()))

    @property
    def wants(self) -> Wants:
        """What it has to do with the tokens of each step."""
        return Wants(self.processes, self.scores is not None)

    @property
    def idle(self) -> bool:
        """Whether nothing of the program's happens between a step and the next."""
        return not self._processors and not self._criteria and self.streamer is None

    @property
    def processes(self) -> bool:
        """Whether there are functions that change scores."""
        return bool(self._processors)

    @property
    def criteria(self) -> bool:
        """Whether there are functions that end rows."""
        return bool(self._criteria)

    def process(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """What the user's functions make of scores ``[batch, vocab]``."""
        for process in self._processors:
            scores = process(ids, scores)
            if not isinstance(scores, torch.Tensor):
                raise InputError(
                    f"a logits processor returned {scores!r}, and scores are a tensor",
                    hint="End it with `return scores`.",
                    **positions.fields(here()),
                )
        return scores

    def ends(self, ids: torch.Tensor, scores: Any = None, **_: Any) -> torch.Tensor:
        """Which rows the user's functions end: bool ``[batch]``."""
        out = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        scores = scores if self.scores is None else tuple(self.scores)
        for criterion in self._criteria:
            says = criterion(ids, scores)
            told = torch.as_tensor(says, device=ids.device).bool()
            if told.dim() and told.shape != out.shape:
                raise InputError(
                    f"a stopping criterion returned a tensor {list(told.shape)} for {len(ids)} rows",
                    hint="Return True or False, or a tensor with one of them a row.",
                    **positions.fields(here()),
                )
            out |= told
        return out


class StopStrings:
    """True for rows whose last token completes one of some strings; text of the prompt counts as well."""

    def __init__(self, strings: list[str], tokenizer: Any) -> None:
        self._strings, self._tokenizer = strings, tokenizer
        # no character takes more than four tokens; decoders change the text of the first ones of a window
        self._window = 4 * max(map(len, strings)) + 16

    def __call__(self, ids: torch.Tensor, scores: Any) -> torch.Tensor:
        """As a stopping criterion is called."""
        return torch.tensor([self._ends(row) for row in ids[:, -self._window :].tolist()], device=ids.device)

    def _ends(self, row: list[int]) -> bool:
        text, before = (self._tokenizer.decode(part, skip_special_tokens=False) for part in (row, row[:-1]))
        kept = next((i for i, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(before))
        ends = ((s, text.rfind(s)) for s in self._strings)
        return any(at >= 0 and at + len(s) > kept for s, at in ends)


class _aside:
    """The user's functions see tensors, and what they compute is no part of a step's recording."""

    def __enter__(self) -> None:
        self._before, current.recorder = current.recorder, None

    def __exit__(self, *_: object) -> None:
        current.recorder = self._before


def _callables(name: str, given: Any) -> list[Callable[..., Any]]:
    # transformers' lists of them are callable as well
    items = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    for item in items:
        if not callable(item):
            raise InputError(
                f"{name} has {type(item).__name__} {item!r}, which cannot be called",
                hint="Give functions (input_ids, scores), or a list of them.",
                **positions.fields(here()),
            )
    return items
