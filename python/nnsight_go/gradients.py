"""Gradients inside a trace: ``loss.backward()``, as a block or as a line, ``.grad``, ``requires_grad`` and hooks.

Only what a block asks the gradient of takes part in autograd, with what the model computes from it. Values
become such in the engine, where they are made, however late the line stands that asks (``docs/gradients.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from . import shapes
from .errors import GradientError, InputError
from .positions import Place, fields, here, other_fields
from .proxy import Proxy
from .wire import Kind

if TYPE_CHECKING:
    from .recorder import Recorder

# How far autograd follows a value.
_READ, _HISTORY, _RETAIN = 0, 1, 2

Hook = Callable[[torch.Tensor], torch.Tensor | None]


class Gradients:
    """What a recording says of gradients."""

    def __init__(self, rec: Recorder) -> None:
        self._rec = rec
        self._how: dict[int, int] = {}  # by node: how far autograd follows it
        self._read: dict[tuple[int, int], Proxy] = {}  # by value and backward pass
        self._hooks: dict[int, tuple[Proxy, dict[int, Hook]]] = {}
        self.open: list[Backward] = []  # blocks that this line stands in, the innermost last
        self.filled = False  # a pass has filled the gradients that values retain
        self.passes = 0
        self.lost: Place = None  # a line whose own backward is Python, in a trace that runs elsewhere

    # ---- values that autograd follows ----

    def follow(self, proxy: Proxy, how: int) -> None:
        """Lets autograd follow a value."""
        rec = self._rec
        id = rec.number(proxy)
        if self._how.get(id, -1) < how:
            self._how[id] = how
            rec._add(Kind.TRACK, None, [0, id], how)

    def follows(self, proxy: Proxy) -> bool:
        """Whether autograd follows a value, or one that it was computed from."""
        rec, seen, stack = self._rec, set(), [proxy._id]
        reads = [rec.nodes[id] for id in self._how if rec.nodes[id][0] == Kind.READ]
        while stack:
            id = stack.pop()
            if id in seen:
                continue
            seen.add(id)
            node = rec.nodes[id]
            if id in self._how:
                return True
            if node[0] == Kind.CONST and rec.captures[node[4]].sent.requires_grad:
                return True
            if node[0] == Kind.READ and any(rec.stands_before(other, node) for other in reads):
                return True
            stack += rec.uses(id)
        return False

    def retains(self, proxy: Proxy) -> bool:
        """Whether a value keeps its gradient."""
        return self._how.get(proxy._id) == _RETAIN

    def retain(self, proxy: Proxy) -> None:
        """``p.retain_grad()``, ``p.requires_grad = True``."""
        _differentiable(self._rec, proxy)
        self.follow(proxy, _RETAIN)

    def follow_reads(self) -> None:
        """Lets autograd follow all that was read of the model so far, since Python goes on with some of it."""
        for id, node in enumerate(list(self._rec.nodes)):
            if node[0] == Kind.READ and self._rec.is_floating(id):
                self.follow(Proxy._make(self._rec, id), _HISTORY)

    def hook(self, proxy: Proxy, function: Hook) -> Handle:
        """``p.register_hook(function)``."""
        _differentiable(self._rec, proxy)
        _, hooks = self._hooks.setdefault(proxy._id, (proxy, {}))
        key = max(hooks, default=-1) + 1
        hooks[key] = function
        return Handle(hooks, key)

    # ---- passes ----

    def backward(
        self,
        roots: Sequence[torch.Tensor],
        seeds: Sequence[torch.Tensor | None] | None,
        retain_graph: bool | None,
        create_graph: bool,
        fill: bool = True,
    ) -> Backward:
        """Records a backward pass, with the hooks of values in it."""
        rec = self._rec
        if self.lost is not None:
            raise GradientError(
                "a custom autograd.Function is computed by Python, and no gradient flows through it in a remote trace",
                hint="Write it in operations of torch, or run the trace here.",
                **fields(here()),
                **other_fields(self.lost),
            )
        name = rec.number
        given = None if seeds is None else [1, *[None if s is None else [0, name(s)] for s in seeds]]
        retain = create_graph if retain_graph is None else retain_graph
        starts = [1, *[[0, name(r)] for r in roots]]
        hooked = any(hooks for _, hooks in self._hooks.values())
        rest = (starts, given, bool(retain), bool(create_graph), fill, hooked)
        out = Backward(self, rec._add(Kind.BACKWARD, None, *rest))
        self.filled = self.filled or fill
        self.passes += 1
        if hooked:
            for _, (proxy, hooks) in sorted(self._hooks.items(), reverse=True):  # as a backward pass meets them
                for function in list(hooks.values()):
                    changed = function(self.grad(proxy, out))
                    if changed is not None:
                        self.set(proxy, out, changed)
            out.close()
        return out

    def grad(self, proxy: Proxy, of: Backward) -> Proxy:
        """The gradient of a value in a pass."""
        rec = self._rec
        _differentiable(rec, proxy)
        id = rec.number(proxy)
        known = self._read.get((id, of.node))
        if known is None:
            node = rec._add(Kind.GRAD, (shapes.same, (proxy,), None), [0, id], [0, of.node])
            known = self._read[id, of.node] = Proxy._make(rec, node)
            self._how.setdefault(id, _READ)
        return known

    def set(self, proxy: Proxy, of: Backward, value: torch.Tensor) -> None:
        """Makes the gradient of a value another one for what a pass goes on to."""
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"a gradient cannot become a {type(value).__name__}",
                hint="Assign a tensor of the value's sizes, or change it in place: h.grad[:] = 0.",
                **fields(here()),
            )
        rec = self._rec
        id = rec.number(proxy)
        if value is self._read.get((id, of.node)):
            return  # h.grad *= 2 has changed it already
        value = value if type(value) is Proxy else rec.constant(value)
        rec._add(Kind.SET_GRAD, None, [0, id], [0, of.node], [0, rec.number(value)])
        self._read[id, of.node] = value
        self._how.setdefault(id, _READ)

    # ---- a trace that runs elsewhere ----

    def brought(self, saved: Sequence[Proxy]) -> tuple[list[Proxy], Callable[[], None]]:
        """Asks for the gradients that passes elsewhere leave behind, to be put where they belong here.

        Gives them, and what is to be done once they are there: tensors from outside get theirs as from a pass here,
        which goes on in what they were computed from, and saved values that keep their gradient have it.
        """
        rec = self._rec
        if not self.filled:
            return [], lambda: None
        outside = [c.sent for c in rec.captures if c.sent.requires_grad]
        for tensor in outside:
            if (name := rec.native.name_of(tensor)) is not None:
                raise GradientError(
                    f"{name} is a parameter of the model that runs elsewhere, which keeps its gradient there",
                    hint="Freeze it, requires_grad_(False), or run the trace here.",
                    **fields(here()),
                )
        outside = list({id(x): x for x in outside}.values())
        kept = [p for p in saved if self.retains(p)]
        with torch.no_grad():
            grads = [self._left(p) for p in (*map(rec.constant, outside), *kept)]
        found, own = grads[: len(outside)], grads[len(outside) :]

        def put() -> None:
            # one that no pass came to is zero: it had none
            pairs = [(x, g) for x, g in zip(outside, found, strict=True) if bool(g.any())]
            if pairs:
                torch.autograd.backward([x for x, _ in pairs], [g.to(x.device) for x, g in pairs])
            for value, gradient in zip(kept, own, strict=True):
                value.requires_grad_().grad = gradient

        return grads, put

    def _left(self, proxy: Proxy) -> Proxy:
        """The gradient that a value has at the end of a trace; zero where it has none."""
        rec, same = self._rec, (shapes.same, (proxy,), None)
        self.retain(proxy)
        zero = Proxy._make(rec, rec.call("aten::zeros_like", (proxy,), None, same))
        rec.call("nng::add_grad", (proxy, zero), None, same)
        return Proxy._make(rec, rec.call("nng::grad_of", (proxy,), None, same))


class Handle:
    """A hook on a value, which ``remove()`` takes away."""

    def __init__(self, hooks: dict[int, Hook], key: int) -> None:
        self._hooks, self._key = hooks, key

    def remove(self) -> None:
        """Takes the hook away. It may be called twice."""
        self._hooks.pop(self._key, None)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Backward:
    """A backward pass: by itself a line of the program, as a block one whose gradients can be read and changed."""

    def __init__(self, gradients: Gradients, node: int) -> None:
        self._gradients, self.node = gradients, node
        self._entered = False

    def __enter__(self) -> Backward:
        rec = self._gradients._rec
        behind = [n for n in range(self.node + 1, len(rec.nodes)) if rec.nodes[n][0] not in (Kind.GRAD, Kind.SET_GRAD)]
        if self._entered or rec.taken_back(self.node) or (not self._ended() and behind):
            raise InputError(
                "this backward pass has gone by",
                hint="Write `with loss.backward():`, and the lines on gradients into its block.",
                **fields(here()),
            )
        self.reopen()
        self._entered = True
        self._gradients.open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._gradients.open.remove(self)
        if kind is None:
            self.close()

    def _ended(self) -> bool:
        last = self._gradients._rec.nodes[-1]
        return bool(last[0] == Kind.END and last[4] == [0, self.node])

    def reopen(self) -> None:
        """Makes the pass that was recorded last a block, which the lines that follow stand in."""
        rec = self._gradients._rec
        if self._ended():
            rec.take_back()
        else:
            rec.nodes[self.node] = (*rec.nodes[self.node][:-1], True)

    def close(self) -> None:
        """Ends the block."""
        rec = self._gradients._rec
        rec._add(Kind.END, None, [0, self.node])


def of(rec: Recorder) -> Gradients:
    """What a recording says of gradients so far."""
    if rec.gradients is None:
        rec.gradients = Gradients(rec)
    return rec.gradients


def _differentiable(rec: Recorder, proxy: Proxy) -> None:
    if not rec.is_floating(proxy._id):
        raise GradientError(
            f"{proxy._label()} is of dtype {str(proxy.dtype).removeprefix('torch.')}, "
            "and only floating point and complex values have gradients",
            **fields(here()),
        )


# ---- what tensors offer ----


def backward(
    rec: Recorder,
    tensor: torch.Tensor,
    gradient: torch.Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Iterable[torch.Tensor] | torch.Tensor | None = None,
) -> Backward:
    """``loss.backward(...)``: a line, or a block."""
    seeds = None if gradient is None else [gradient]
    if inputs is None:
        return of(rec).backward([tensor], seeds, retain_graph, create_graph)
    wanted = [inputs] if isinstance(inputs, torch.Tensor) else list(inputs)
    if not wanted:
        raise InputError("inputs are the tensors whose gradients are filled, and there are none", **fields(here()))
    found = grad(rec, [tensor], wanted, seeds, retain_graph, create_graph)
    for x, g in zip(wanted, found, strict=True):
        if type(x) is Proxy:
            of(rec).retain(x)
        rec.call("nng::add_grad", (x, g), None, (shapes.same, (x,), None))
    of(rec).filled = True
    return _Done()


class _Done(Backward):
    """A pass that is over: nothing can be read in a block of it."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> Backward:
        raise InputError(
            "backward(inputs=...) fills the gradients of these inputs and has no block",
            hint="Leave inputs out: in the block, any value's .grad can be read.",
            **fields(here()),
        )


def grad(
    rec: Recorder,
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[torch.Tensor, ...]:
    """``torch.autograd.grad(...)``."""
    if is_grads_batched or allow_unused or materialize_grads:
        raise InputError(
            "in a trace torch.autograd.grad takes no is_grads_batched, allow_unused or materialize_grads",
            hint="Ask for gradients of what the outputs depend on, a pass each.",
            **fields(here()),
        )
    roots, targets, seeds = map(_sequence, (outputs, inputs, grad_outputs))
    pass_ = of(rec).backward(roots, seeds or None, retain_graph, create_graph, fill=False)
    pass_.reopen()
    found = tuple(of(rec).grad(t if type(t) is Proxy else rec.constant(t), pass_) for t in targets)
    pass_.close()
    return found


def _sequence(x: Any) -> list[Any]:
    return [] if x is None else [x] if isinstance(x, torch.Tensor) else list(x)


def read(rec: Recorder, proxy: Proxy) -> torch.Tensor | None:
    """``p.grad``: in a block of backward() its gradient there, else what it has kept of passes before."""
    gradients = of(rec)
    if gradients.open:
        return gradients.grad(proxy, gradients.open[-1])
    if not gradients.filled:
        return None
    gradients.retain(proxy)
    return Proxy._make(rec, rec.call("nng::grad_of", (proxy,), None, (shapes.same, (proxy,), None)))


def write(rec: Recorder, proxy: Proxy, value: Any) -> None:
    """``p.grad = value``."""
    gradients = of(rec)
    if gradients.open:
        gradients.set(proxy, gradients.open[-1], value)
    else:
        gradients.retain(proxy)
        rec.call("nng::set_grad", (proxy, value), None, (shapes.same, (proxy,), None))


def require(rec: Recorder, proxy: Proxy, on: bool = True) -> Proxy:
    """``p.requires_grad_()``: a gradient target, though in plain PyTorch only leaves can be made one."""
    if on:
        of(rec).retain(proxy)
    elif rec.gradients is not None and rec.gradients.follows(proxy):
        raise InputError(
            f"gradients of {proxy._label()} were asked for, and cannot be switched off",
            hint="Go on with a copy that has none: p.detach().",
            **fields(here()),
        )
    return proxy


def custom(rec: Recorder, apply: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A custom ``autograd.Function``: Python computes it at its line, so that its own backward is part of the graph."""
    from .torchmap.computing import compute

    if not torch.is_grad_enabled():
        return apply(*args, **kwargs)  # what it calls is recorded
    if rec.elsewhere:
        of(rec).lost = here()
        return compute(rec, torch.no_grad()(apply), args, kwargs)
    of(rec).follow_reads()
    return compute(rec, apply, args, kwargs)
