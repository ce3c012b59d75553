"""A generation elsewhere: a request a step, each with all steps from the first on.

What a server has kept of the steps before, by the ``chain`` that these requests have in common, it does not do
again; what it has lost it does anew, which gives the same. Tokens come with the values of their step.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..runners import Drawn, Rows, Wants
from .messages import Answer, Part, Prompt, Request
from .runs import Program, Remote, given

if TYPE_CHECKING:
    from ..proxy import Proxy


class RemoteGeneration:
    """A batch of rows that grow elsewhere."""

    def __init__(self, remote: Remote, rows: Rows, masks: Rows | None, settings: dict[str, Any], wants: Wants) -> None:
        self.remote, self._wants = remote, wants
        self._prompt, self._settings = Prompt(rows, masks), settings
        self._steps: list[Part] = []  # what was done, without what came back of it
        self._chain = secrets.token_hex(16)
        self._answer: Answer | None = None  # of the step that is done, until its tokens are drawn
        each = max(settings["num_return_sequences"], settings["num_beams"])
        self._ended = [False] * (len(rows) * each)
        self._done = False
        # The states of the generator that tokens are drawn from: before the first of them, and after the last.
        self._random: torch.Tensor | None = None
        self._after: torch.Tensor | None = None

    def step(self, graph: bytes, constants: Sequence[torch.Tensor], end: bool) -> RemoteStep:
        """Starts the run of the next step."""
        self._answer = None
        return RemoteStep(self, graph, constants, end)

    def perform(self, part: Part) -> Answer:
        """Has the next step done, or so much of it as is known."""
        draws = self._settings["do_sample"]
        if draws and self._random is None:
            self._random = torch.get_rng_state()
        elif draws and "drawn" in part.want:
            now = torch.get_rng_state()
            if self._after is None or not torch.equal(now, self._after):
                part.random = now  # the program has drawn, too
        message = self.remote.message()
        steps = [message.step(p) for p in (*self._steps, part)]
        random = message.maybe("random", self._random)
        request = Request(
            self.remote.name, "generate", steps, self._prompt, self._settings, chain=self._chain, random=random
        )
        answer = self.remote.answer(message.encode(request))
        if draws and "drawn" in part.want:
            self._after = answer.random()
            torch.set_rng_state(self._after)
        return answer

    def run(self, part: Part) -> Answer:
        """Has a step done; its tokens are drawn at once, unless the program changes scores."""
        part.want = ["results"]
        if part.end:
            part.want += ["scores"] if self._wants.scores else self._drawing()
        answer = self.perform(part)
        if part.end:
            self._answer = answer
            self._steps.append(part)
        return answer

    def _drawing(self) -> list[str]:
        return ["drawn", "left"] if self._wants.left else ["drawn"]

    # ---- tokens ----

    def next(self, left: bool = False) -> tuple[Drawn, torch.Tensor | None]:
        """The tokens of the step that is done, and what the filters left of its scores."""
        assert self._answer is not None
        return self._drawn(self._answer, left)

    def scores(self) -> torch.Tensor:
        """The scores of the step that is done, to be changed."""
        assert self._answer is not None
        return self._answer.scores(len(self._steps) - 1)

    def choose(self, scores: torch.Tensor) -> tuple[Drawn, torch.Tensor]:
        """Draws from scores, and gives what the filters left of them as well."""
        part = self._steps.pop()
        part.want, part.scores = ["drawn", "left"], scores.detach().clone()
        answer = self.perform(part)
        self._steps.append(part)
        drawn, left = self._drawn(answer, left=True)
        assert left is not None
        return drawn, left

    def _drawn(self, answer: Answer, left: bool) -> tuple[Drawn, torch.Tensor | None]:
        number = len(self._steps) - 1
        self._steps[-1].want, self._answer = [], None
        drawn = answer.drawn(number)
        ends = self._settings["eos_token_id"]
        self._ended = [e or token in ends for e, token in zip(self._ended, drawn.tokens, strict=False)]
        self._done = drawn.done
        return drawn, answer.left(number) if left else None

    def end(self, rows: list[bool]) -> bool:
        """Ends rows, and tells whether all have ended."""
        self._steps[-1].ended = rows
        self._ended = [new or old for new, old in zip(rows, self._ended, strict=True)]
        self._done = self._done or all(self._ended)
        return self._done

    def free(self) -> None:
        """Forgets it; a server forgets in its time what nobody asks for."""
        self._steps, self._answer = [], None


class RemoteStep(Program):
    """A step of a generation elsewhere."""

    def __init__(
        self, generation: RemoteGeneration, graph: bytes, constants: Sequence[torch.Tensor], end: bool
    ) -> None:
        super().__init__(graph, constants, end)
        self._generation = generation

    def results(self, adopt: Sequence[Proxy] | None) -> list[torch.Tensor]:
        """The values that were asked for last, or, with ``adopt``, nothing: these proxies become them."""
        generation = self._generation
        answer = generation.run(self.part)
        number = len(generation._steps) - self.part.end
        return given(answer.results(number), adopt)
