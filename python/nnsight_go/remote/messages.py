"""Requests and responses as data: ``docs/remote-protocol.md``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from .. import wire
from ..native import NoTensor
from ..proxy import Proxy
from ..runners import Drawn
from . import file

if TYPE_CHECKING:
    from ..native import Native

VERSION = 1

# A tensor from outside that takes more bytes than this is sent once, and named by its hash from then on.
UPLOAD_BYTES = 64 * 1024


class Place(msgspec.Struct, frozen=True):
    """Where a session finds a value of an earlier step: which of its results, in the order of their nodes."""

    step: int
    number: int


class Later:
    """Stands for a value of an earlier trace of the session, among the tensors that a graph numbers.

    Args:
        proxy: of the value. It is the value itself once the job of that trace is done.
        place: where the job has it, as long as it is to come.
    """

    def __init__(self, proxy: Proxy, place: Place) -> None:
        self._proxy: torch.Tensor | None = proxy
        self._place = place

    def let_go(self) -> None:
        """No longer keeps a value alive that is to come: nobody but the job needs it."""
        if type(self._proxy) is Proxy:
            self._proxy = None

    def where(self) -> torch.Tensor | Place:
        """The value, or where the job has it."""
        return self._place if self._proxy is None or type(self._proxy) is Proxy else self._proxy


class Constant(msgspec.Struct, omit_defaults=True):
    """Where a tensor that a graph numbers is: in the request, uploaded before, in the model, or among earlier results.

    Attributes:
        grad: whether autograd follows it.
    """

    tensor: str = ""
    hash: str = ""
    parameter: str = ""
    grad: bool = False
    result: Place | None = None


class Step(msgspec.Struct, omit_defaults=True):
    """A step of a request: names of tensors in its file, and what of the step is to come back."""

    program: list[str]
    constants: list[Constant]
    end: bool
    want: list[str]
    unsent: list[int] = []
    scores: str = ""
    ended: list[bool] | None = None
    random: str = ""


class Prompt(msgspec.Struct):
    """What a generation goes on from."""

    rows: list[list[int]]
    masks: list[list[int]] | None


class Request(msgspec.Struct, omit_defaults=True):
    """What a server is asked for."""

    model: str
    kind: str
    steps: list[Step]
    prompt: Prompt | None = None
    settings: dict[str, Any] | None = None
    chain: str = ""
    random: str = ""
    version: int = msgspec.field(default=0)


class _Drawn(msgspec.Struct):
    tokens: list[int]
    done: bool
    rows: list[list[int]] | None = None


class _StepResult(msgspec.Struct):
    step: int
    results: str = ""
    tensors: list[str] = []
    drawn: _Drawn | None = None
    scores: str = ""
    left: str = ""


class _Response(msgspec.Struct):
    version: int
    steps: list[_StepResult]
    random: str = ""


_responses = msgspec.json.Decoder(_Response)


class Part(msgspec.Struct):
    """What a program says at a step.

    Attributes:
        graphs: parts of its graph.
        constants: the tensors that these number.
        end: nothing will be added to it.
        want: what of it is to come back.
        scores: what its tokens are drawn from, in place of its own.
        ended: rows that the program ends after it.
        random: the state of the generator that its tokens are drawn from, where that is not what the step before left.
    """

    graphs: list[bytes]
    constants: list[torch.Tensor | Later]
    end: bool = False
    want: list[str] = []
    scores: torch.Tensor | None = None
    ended: list[bool] | None = None
    random: torch.Tensor | None = None


class Message:
    """A request and its tensors.

    Args:
        native: the model; its parameters are named instead of sent.
        uploads: takes a tensor and its hash, and sees to it that the server has it; None where there is no such.
    """

    def __init__(self, native: Native, uploads: Callable[[str, torch.Tensor], None] | None) -> None:
        self._native, self._uploads = native, uploads
        self._tensors: dict[str, torch.Tensor | bytes] = {}
        self._known: dict[tuple[int, bool], Constant] = {}

    def step(self, part: Part) -> Step:
        """Adds what a step needs."""
        program = [self._add("graph", graph) for graph in part.graphs]
        constants = [self._constant(tensor) for tensor in part.constants]
        scores, random = self.maybe("scores", part.scores), self.maybe("random", part.random)
        return Step(program, constants, part.end, part.want, scores=scores, ended=part.ended, random=random)

    def maybe(self, kind: str, tensor: torch.Tensor | None) -> str:
        """Adds a tensor, if there is one, and gives its name."""
        return "" if tensor is None else self._add(kind, tensor)

    def encode(self, request: Request) -> bytes:
        """The whole as a file."""
        request.version = VERSION
        self._tensors["request"] = msgspec.json.encode(request)
        return file.encode(self._tensors)

    def _add(self, kind: str, x: torch.Tensor | bytes) -> str:
        name = f"{kind}.{len(self._tensors)}"
        self._tensors[name] = x
        return name

    def _constant(self, tensor: torch.Tensor | Later) -> Constant:
        if isinstance(tensor, Later):
            found = tensor.where()
            if isinstance(found, Place):
                return Constant(result=found)
            tensor = found
        key = id(tensor), tensor.requires_grad
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._where(tensor)
        return known

    def _where(self, tensor: torch.Tensor) -> Constant:
        name = self._native.name_of(tensor)
        if name is not None:
            return Constant(parameter=name)
        grad = tensor.requires_grad
        if self._uploads is None or tensor.numel() * tensor.element_size() <= UPLOAD_BYTES:
            return Constant(tensor=self._add("constant", tensor), grad=grad)
        sent = file.plain(tensor)
        hash = hash_of(sent)
        self._uploads(hash, sent)
        return Constant(hash=hash, grad=grad)


def hash_of(tensor: torch.Tensor) -> str:
    """What a plain tensor is called on a server: SHA-256 of its dtype, sizes and bytes."""
    dtype, sizes = str(tensor.dtype).removeprefix("torch."), ",".join(map(str, tensor.shape))
    digest = hashlib.sha256(f"{dtype} [{sizes}]\n".encode())
    digest.update(file.memory(tensor))
    return digest.hexdigest()


class Answer:
    """What a request came to.

    Args:
        data: the response.
        device: where its tensors are to be.

    Raises:
        RemoteError: it makes no sense.
    """

    def __init__(self, data: bytearray, device: torch.device) -> None:
        self._file, self._device = file.File(data), device
        try:
            self._response = _responses.decode(self._file.bytes("response"))
        except msgspec.MsgspecError as error:
            raise file.malformed(str(error)) from None
        if self._response.version != VERSION:
            raise file.malformed(f"it is of version {self._response.version}, and this is version {VERSION}")
        self._steps = {step.step: step for step in self._response.steps}

    def _step(self, number: int) -> _StepResult:
        if number not in self._steps:
            raise file.malformed(f"it has nothing of step {number}")
        return self._steps[number]

    def __contains__(self, step: object) -> bool:
        return step in self._steps

    def results(self, step: int) -> list[torch.Tensor]:
        """The values of the save nodes of a step's last part, in their order.

        Raises:
            NoTensor: one of them is none.
        """
        found = self._step(step)
        try:
            numbers = [i for _, i in sorted(wire.results(self._file.bytes(found.results), range(len(found.tensors))))]
        except (msgspec.MsgspecError, LookupError, ValueError, TypeError) as error:
            raise file.malformed(f"its results cannot be read: {error}") from None
        if None in numbers:
            raise NoTensor(numbers.index(None))
        tensors = {i: self._tensor(found.tensors[i]) for i in set(numbers)}
        return [tensors[i] for i in numbers]

    def all_results(self) -> list[torch.Tensor]:
        """The values of all steps, in the order in which they were saved."""
        return [x for number in sorted(self._steps) if self._steps[number].results for x in self.results(number)]

    def drawn(self, step: int) -> Drawn:
        """The tokens of a step."""
        drawn = self._step(step).drawn
        if drawn is None:
            raise file.malformed(f"it has no tokens of step {step}")
        return Drawn(drawn.tokens, drawn.done, drawn.rows)

    def scores(self, step: int) -> torch.Tensor:
        """The scores of a step."""
        return self._tensor(self._step(step).scores)

    def left(self, step: int) -> torch.Tensor:
        """What the filters left of a step's scores."""
        return self._tensor(self._step(step).left)

    def random(self) -> torch.Tensor:
        """The state of the generator afterwards."""
        return self._file[self._response.random].cpu()

    def _tensor(self, name: str) -> torch.Tensor:
        return self._file[name].to(self._device)
