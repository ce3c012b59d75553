"""Traced calls against eager ones: one call of torch, with its tensors as proxies, must give what it gives on them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch

from nnsight_go import LanguageModel, save
from nnsight_go.proxy import Proxy
from nnsight_go.recorder import Recorder, current

SEED = 1234


@dataclasses.dataclass(slots=True)
class Call:
    """A call to make twice: eagerly and in a trace. ``args`` and ``kwargs`` hold plain tensors."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    values: bool = True  # False where the result's numbers are whatever memory held
    changes: bool = False  # it changes an argument and gives it back


@dataclasses.dataclass(slots=True)
class Outcome:
    """What became of a call: ``error`` is empty where the trace agrees with eager."""

    error: str
    forced: bool = False  # a value was computed while the call was recorded
    shape_forced: bool = False  # the sizes of a result were known only by running
    shape_error: str = ""  # what was inferred without running, and is not so


def tree_map(f: Callable[[torch.Tensor], Any], x: Any) -> Any:
    """A structure with ``f`` applied to its tensors; containers keep their types."""
    if isinstance(x, torch.Tensor):
        return f(x)
    if isinstance(x, torch.Size):
        return x
    if isinstance(x, tuple):
        items = [tree_map(f, item) for item in x]
        if type(x) is tuple:
            return tuple(items)
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    if isinstance(x, list):
        return [tree_map(f, item) for item in x]
    if isinstance(x, dict):
        return {k: tree_map(f, v) for k, v in x.items()}
    if isinstance(x, slice):
        return slice(tree_map(f, x.start), tree_map(f, x.stop), tree_map(f, x.step))
    return x


def leaves(x: Any) -> Iterator[torch.Tensor]:
    """The tensors of a structure, in order."""
    found: list[torch.Tensor] = []
    tree_map(found.append, x)
    return iter(found)


def copied(t: torch.Tensor) -> torch.Tensor:
    """A tensor of its own with the same sizes, strides and values."""
    t = t.detach()
    if t.layout != torch.strided or t.is_conj() or t.is_neg():
        return t.clone()
    flat, offset = _storage(t)
    return flat.clone().as_strided(t.size(), t.stride(), offset)


def _storage(t: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The memory behind a tensor as one axis, and where in it the tensor begins."""
    last = sum((n - 1) * s for n, s in zip(t.size(), t.stride(), strict=True)) + 1 if t.numel() else 0
    return t.as_strided((last,), (1,), t.storage_offset()), 0


def _proxy(rec: Recorder, t: torch.Tensor) -> torch.Tensor:
    """A value of the graph that equals ``t``, strides included, and that the trace may change."""
    t = t.detach()
    if t.layout != torch.strided or t.is_conj() or t.is_neg():
        return rec.constant(t).clone()
    flat, offset = _storage(t)
    own = rec.constant(flat).clone()
    if t.is_contiguous() and t.dim() == 1:
        return own
    return own.as_strided(t.size(), t.stride(), offset)


def describe(x: Any) -> str:
    """The types and facts of a structure, without values."""
    if isinstance(x, torch.Tensor):
        return f"Tensor{list(x.shape)}:{str(x.dtype).removeprefix('torch.')}"
    if isinstance(x, tuple | list) and not isinstance(x, torch.Size):
        return f"{type(x).__name__}[{', '.join(map(describe, x))}]"
    if isinstance(x, dict):
        return f"{type(x).__name__}{{{', '.join(f'{k}: {describe(v)}' for k, v in x.items())}}}"
    return f"{type(x).__name__}({x!r})"


def difference(got: Any, want: Any, values: bool = True) -> str:
    """How a traced result differs from the eager one; empty where it does not."""
    if isinstance(want, torch.Tensor):
        if type(got) is not torch.Tensor:
            return f"a {type(got).__name__} for a tensor"
        for fact in ("dtype", "shape", "layout", "device"):
            if getattr(got, fact) != getattr(want, fact):
                return f"{fact} {getattr(got, fact)}, not {getattr(want, fact)}"
        if want.layout == torch.strided and want.is_contiguous() and got.stride() != want.stride():
            return f"strides {got.stride()}, not {want.stride()}"
        if not values:
            return ""
        if want.dtype == torch.complex32:
            got, want = got.to(torch.complex64), want.to(torch.complex64)
        try:
            torch.testing.assert_close(got, want, equal_nan=True)
        except (AssertionError, NotImplementedError, RuntimeError) as e:
            return f"other numbers: {str(e).splitlines()[0]}" if str(e) else "other numbers"
        return ""
    if type(got) is not type(want):
        return f"{describe(got)}, not {describe(want)}"
    if isinstance(want, tuple | list) and not isinstance(want, torch.Size):
        if len(got) != len(want):
            return f"{len(got)} results, not {len(want)}"
        return next(filter(None, (difference(g, w, values) for g, w in zip(got, want, strict=True))), "")
    if isinstance(want, dict):
        if list(got) != list(want):
            return f"keys {list(got)}, not {list(want)}"
        return next(filter(None, (difference(got[k], want[k], values) for k in want)), "")
    if isinstance(want, numpy.ndarray):
        return (
            ""
            if got.dtype == want.dtype and numpy.array_equal(got, want, equal_nan=want.dtype.kind in "fc")
            else "other numbers"
        )
    if isinstance(want, float) and want != want:
        return "" if got != got else f"{got}, not nan"
    return "" if got == want else f"{got!r}, not {want!r}"


def _relations(result: Any, given: Sequence[torch.Tensor], strict: bool) -> list[tuple[int, list[int]]]:
    """For each tensor of a result: the argument it is (or -1), and those whose memory it shares.

    Unless ``strict``, an argument that comes back counts as a view of it: which of them PyTorch gives
    where there is nothing to do is no part of what its functions promise.
    """
    memory = [_memory(t) for t in given]
    out = []
    for t in leaves(result):
        same = next((i for i, g in enumerate(given) if g is t), -1) if strict else -1
        mine = _memory(t)
        out.append((same, [i for i, other in enumerate(memory) if mine and mine == other]))
    return out


def _memory(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr() if t.layout == torch.strided and t.numel() else 0


@dataclasses.dataclass(slots=True)
class _Eager:
    result: Any
    given: list[torch.Tensor]  # the arguments after the call
    same: list[tuple[int, list[int]]]


def eager(call: Call) -> _Eager:
    """Makes a call on tensors of its own."""
    args, kwargs = tree_map(copied, call.args), tree_map(copied, call.kwargs)
    given = list(leaves((args, kwargs)))
    torch.manual_seed(SEED)
    result = call.function(*args, **kwargs)
    return _Eager(result, given, _relations(result, given, call.changes))


class _Forces:
    """Counts how often a recorder computes values while a block is recorded."""

    count = 0

    def __enter__(self) -> _Forces:
        self._original = Recorder.force
        original = self._original

        def force(rec: Recorder, wanted: Any) -> Any:
            wanted = list(wanted)
            if wanted:
                self.count += 1
            return original(rec, wanted)

        Recorder.force = force  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Recorder.force = self._original  # type: ignore[method-assign]


def check(model: LanguageModel, calls: Sequence[Call], one_by_one: bool = False) -> list[Outcome | None]:
    """Makes each call eagerly and in one trace of all; None where eager refuses the call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted: list[_Eager | None] = []
        for call in calls:
            try:
                wanted.append(eager(call))
            except Exception:
                wanted.append(None)
        if one_by_one:
            return [_alone(model, call, want) for call, want in zip(calls, wanted, strict=True)]
        usable = [(c, w) for c, w in zip(calls, wanted, strict=True) if w is not None]
        try:
            found = iter(_traced(model, usable))
        except Exception:  # one of them spoils the trace: see which
            found = iter([_alone(model, *pair) for pair in usable])
        return [None if w is None else next(found) for w in wanted]


def _alone(model: LanguageModel, call: Call, want: _Eager | None) -> Outcome | None:
    if want is None:
        return None
    try:
        return _traced(model, [(call, want)])[0]
    except Exception as e:
        return Outcome(f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}")


def _traced(model: LanguageModel, calls: Sequence[tuple[Call, _Eager]]) -> list[Outcome]:
    results: list[Any] = []
    givens: list[list[torch.Tensor]] = []
    outcomes: list[Outcome] = []
    inferred: list[list[tuple[Any, ...] | None]] = []
    with _Forces() as forces, model.trace([0]):
        rec = current.recorder
        assert rec is not None
        for call, _ in calls:
            args, kwargs = (tree_map(lambda t: _proxy(rec, t), x) for x in (call.args, call.kwargs))
            given = list(leaves((args, kwargs)))
            before = forces.count
            torch.manual_seed(SEED)
            result = call.function(*args, **kwargs)
            outcomes.append(Outcome("", forced=forces.count > before))
            givens.append(save(given))
            results.append(save([result]))
        for outcome, [result] in zip(outcomes, results, strict=True):
            before = forces.count
            facts: list[tuple[Any, ...] | None] = []
            for t in leaves(result):
                facts.append((t.shape, t.dtype, t.stride()) if type(t) is Proxy and t.layout == torch.strided else None)
            inferred.append(facts)
            outcome.shape_forced = forces.count > before
    for i, (call, want) in enumerate(calls):
        outcome = outcomes[i]
        outcome.error = difference(results[i][0], want.result, call.values)
        if not outcome.error:
            same = _relations(results[i][0], givens[i], call.changes)
            if same != want.same:
                outcome.error = f"results are, or share memory with, arguments {same}, not {want.same}"
        if not outcome.error:
            changed = difference(givens[i], want.given, call.values)
            outcome.error = changed and f"an argument after the call: {changed}"
        if not outcome.error:
            for fact, real in zip(inferred[i], leaves(want.result), strict=True):
                if fact is None:
                    continue
                strides = [(a, b) for n, a, b in zip(real.shape, fact[2], real.stride(), strict=False) if n > 1]
                if fact[:2] != (real.shape, real.dtype) or (
                    real.is_contiguous() and real.numel() and any(a != b for a, b in strides)
                ):
                    outcome.shape_error = f"inferred {fact}, not {(real.shape, real.dtype, real.stride())}"
    return outcomes
