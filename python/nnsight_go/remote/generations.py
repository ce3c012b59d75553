"""A generation elsewhere: a request a step, or for many, each with all steps from the first on.

What a server has kept of the steps before, by the ``chain`` that these requests have in common, it does not do
again; what it has lost it does anew, which gives the same. Tokens come with the values of their step.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..runners import Drawn, Rows, Wants
from .file import malformed
from .messages import Answer, Part, Prompt, Request
from .runs import Program, Remote, given

if TYPE_CHECKING:
    from ..proxy import Proxy
    from .jobs import Job


# So many steps go in one request at most: what all of them give comes in one response, and one that ends early has
# recorded the rest for nothing. Generations of more tokens go in several, each of which runs alone.
TOGETHER = 256


class RemoteGeneration:
    """A batch of rows that grow elsewhere."""

    together = TOGETHER

    def __init__(self, remote: Remote, rows: Rows, masks: Rows | None, settings: dict[str, Any], wants: Wants) -> None:
        self.remote, self._wants = remote, wants
        self._prompt, self._settings = Prompt(rows, masks), settings
        self._steps: list[Part] = []  # what was done, without what came back of it
        self._chain = secrets.token_hex(16)
        self._answer: Answer | None = None  # of steps that are done, until their tokens are drawn
        self._drawn = 0  # steps whose tokens are drawn
        self._gathered: list[tuple[Part, Sequence[Proxy] | None]] | None = None
        each = max(settings["num_return_sequences"], settings["num_beams"])
        self._ended = [False] * (len(rows) * each)
        self._done = False
        # The states of the generator that tokens are drawn from: before the first of them, and after the last.
        self._random: torch.Tensor | None = None
        self._after: torch.Tensor | None = None

    def step(self, graph: bytes, constants: Sequence[torch.Tensor], end: bool) -> RemoteStep:
        """Starts the run of the next step."""
        return RemoteStep(self, graph, constants, end)

    def perform(self, parts: Sequence[Part]) -> Answer:
        """Has the next steps done, or so much of the last one as is known."""
        draws = self._settings["do_sample"]
        answer = self.remote.answer(self._request(parts))
        if draws and "drawn" in parts[-1].want:
            self._after = answer.random()
            torch.set_rng_state(self._after)
        return answer

    def _request(self, parts: Sequence[Part]) -> bytes:
        draws = self._settings["do_sample"]
        if draws and self._random is None:
            self._random = torch.get_rng_state()
        elif draws and "drawn" in parts[0].want:
            now = torch.get_rng_state()
            if self._after is None or not torch.equal(now, self._after):
                parts[0].random = now  # the program has drawn, too
        message = self.remote.message()
        steps = [message.step(p) for p in (*self._steps, *parts)]
        random = message.maybe("random", self._random)
        request = Request(
            self.remote.name, "generate", steps, self._prompt, self._settings, chain=self._chain, random=random
        )
        return message.encode(request)

    def run(self, part: Part, adopt: Sequence[Proxy] | None) -> list[torch.Tensor]:
        """Has a step done; its tokens are drawn at once, unless the program changes scores."""
        part.want = ["results"]
        if not part.end:
            return given(self.perform([part]).results(len(self._steps)), adopt)
        part.want += ["scores"] if self._wants.scores else ["drawn", "left"] if self._wants.left else ["drawn"]
        if self._gathered is not None:
            self._gathered.append((part, adopt))
            return []
        self._answer = self.perform([part])
        self._steps.append(part)
        return given(self._answer.results(len(self._steps) - 1), adopt)

    def gather(self) -> None:
        """Has the runs of the steps that follow wait for ``flush``."""
        self._gathered = []

    def flush(self) -> int:
        """Does all of them in one request, and tells how many happened."""
        assert self._gathered is not None
        return self.arrived(self.perform([part for part, _ in self._gathered]))

    def submit(self) -> Job:
        """Leaves all of them with the server, which draws the tokens that would be drawn here.

        What is drawn here next comes from another state: where the generator would be by then, nobody knows yet.
        """
        assert self._gathered is not None
        request = self._request([part for part, _ in self._gathered])
        if self._settings["do_sample"]:
            seed = int(torch.randint(1 << 62, ()))
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        return self.remote.transport.submit(request, (), self.remote.native.device)

    def arrived(self, answer: Answer) -> int:
        """Takes what has come of them, and tells how many happened."""
        assert self._gathered is not None
        gathered, self._gathered = self._gathered, None
        first = len(self._steps)
        self._answer = answer
        for number, (part, adopt) in enumerate(gathered, first):
            if number not in answer:
                break
            self._steps.append(part)
            given(answer.results(number), adopt)
        if len(self._steps) == first:
            raise malformed("none of the steps has run")
        return len(self._steps) - first

    # ---- tokens ----

    def next(self, left: bool = False) -> tuple[Drawn, torch.Tensor | None]:
        """The tokens of the step that is done, and what the filters left of its scores."""
        assert self._answer is not None
        return self._tokens(self._answer, left)

    def scores(self) -> torch.Tensor:
        """The scores of the step that is done, to be changed."""
        assert self._answer is not None
        return self._answer.scores(self._drawn)

    def choose(self, scores: torch.Tensor) -> tuple[Drawn, torch.Tensor]:
        """Draws from scores, and gives what the filters left of them as well."""
        part = self._steps.pop()
        part.want, part.scores = ["drawn", "left"], scores.detach().clone()
        answer = self.perform([part])
        self._steps.append(part)
        drawn, left = self._tokens(answer, left=True)
        assert left is not None
        return drawn, left

    def _tokens(self, answer: Answer, left: bool) -> tuple[Drawn, torch.Tensor | None]:
        number = self._drawn
        self._drawn += 1
        self._steps[number].want = []
        if self._drawn == len(self._steps):
            self._answer = None
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
        return self._generation.run(self.part, adopt)
