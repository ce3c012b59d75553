"""Blocks that say what they said before (``pybind/known.h``).

A trace in a loop says the same each time. Once a block went straight ahead (``hooked``) its lines are remembered:
where they stand, which output each names, saves or stores to. The next time builtins compare the lines with these,
and at the end do the program that is known. Where a line is another one, or somebody looks at the trace or at a
value, ``begin`` makes the recorder that there would have been.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import _ffi, hooked, recorder, sessions, tracebacks, wire
from .errors import NnsightError, users
from .recorder import Recorder, current
from .torchmap import transforms
from .wire import Kind

if TYPE_CHECKING:
    from .hosted import Layout
    from .proxy import Proxy
    from .wrapping import HostedRecorder, HostedTracer, NNsight

READ, SAVE, STORE = range(3)

_MOST = 64  # blocks that a module remembers


class Line(NamedTuple):
    """What one line does, in the order that ``known.h`` has.

    Attributes:
        what: READ, SAVE or STORE.
        path: READ: the module whose output it is.
        proxy: which of the block's values; in a log, its node.
        code: where the line stands, with ``lasti``.
        index: STORE: where, and which ``value``.
    """

    what: int
    path: str | None
    proxy: int
    code: Any
    lasti: int
    index: Any
    value: Any


class Memo(NamedTuple):
    """A block, in the order that ``known.h`` has; it says there what each is."""

    code: Any
    lasti: int
    model: int
    lines: tuple[Line, ...]
    kind: Any
    layout: Layout | None
    mode: int
    dtype: torch.dtype
    modules: tuple[torch.nn.Module, ...]
    steps: tuple[Any, ...]
    before: tuple[Any, ...]
    nodes: int
    around: tuple[torch.nn.Module, ...]
    kept: list[int]
    saved: tuple[int, ...]
    rec: Recorder
    ids: tuple[int, ...]
    failure: Any
    program: hooked.Program
    key: int
    tries: int


def prepare(trace: Any, set_item: Any) -> None:
    """Tells the builtins what they need, and has the thread's recorder with them."""
    from .wrapping import HostedTracer

    calls = _ffi.calls()
    calls["remember"](
        trace, begin, finished, end, failed, set_item, sessions.opened, HostedTracer._mode,
        transforms.hold_back, torch.Tensor, transforms.active, HostedTracer,
    )  # fmt: skip
    recorder.Current.recorder = property(calls["recorder"], calls["record"])  # type: ignore[assignment]


def learn(rec: HostedRecorder, program: hooked.Program, ids: list[int]) -> None:
    """Remembers a block whose pass has just ended, if all that it did was logged."""
    assert rec.site is not None
    key, code, lasti, model = rec.site
    hosted = rec.hosted
    lines = _lines(rec, ids)
    layout = rec.layouts.get(0)
    if lines is None or (layout is not None and hosted._latest[1] is not layout):
        return
    before = hosted.known.pop(key, 0)  # one of another kind of input makes room
    tries = before.tries if isinstance(before, Memo) else before
    while len(hosted.known) >= _MOST:
        hosted.known.pop(next(iter(list(hosted.known)), 0), None)
    # It holds neither the model nor what does: else that would live until it is found by the collector of cycles.
    ended: Any = Recorder(None)  # type: ignore[arg-type]
    ended.nodes = list(rec.nodes)
    ended.close("it was not saved")
    numbers = list(dict.fromkeys(line.proxy for line in lines if line.what == READ))
    which = {node: i for i, node in enumerate(numbers)}
    kind, latest = hosted._latest
    hosted.known[key] = Memo(
        code=code,
        lasti=lasti,
        model=id(model),
        lines=tuple([line._replace(proxy=which[line.proxy]) for line in lines]),
        kind=kind,
        layout=latest,
        mode=rec.mode,
        dtype=rec.default_dtype,
        modules=program.modules,
        steps=program.steps,
        before=program.before,
        nodes=len(rec.nodes),
        around=tuple(program.around),
        kept=list(ids),
        saved=tuple([which[node] for node in ids]),
        rec=ended,
        ids=tuple(numbers),
        failure=functools.partial(hooked.failure, ended),
        program=program,
        key=key,
        tries=tries,
    )


def _lines(rec: HostedRecorder, ids: list[int]) -> list[Line] | None:
    """The lines of a block, if they are all that it did."""
    if (
        len(rec.given) != 1 or rec.given[0][1] or rec.edits or rec.captures or rec.at_end or rec.when_done or rec.metas
        or rec.autocast or rec.living is not None or rec.gathered is not None or rec.gradients is not None
        or rec.pinned or rec.forced or rec.skipped or rec.sourced or rec._calls or rec._writes or rec._looked
    ):  # fmt: skip
        return None
    lines = [Line._make(line) for line in rec.log or ()]
    made = 0
    for line in lines:
        node = rec.nodes[made] if made < len(rec.nodes) else None
        place = (line.code, line.lasti)
        if line.what == READ and line.proxy == made:
            if node is None or node[0] != Kind.READ or node[2] != place:
                return None
            made += 1
        elif line.what == STORE:
            if node is None or node[0] != Kind.SET_INDEX or node[2] != place or node[4] != [wire.Tag.REF, line.proxy]:
                return None
            made += 1
        elif line.proxy >= made:
            return None
    saved = list(dict.fromkeys(line.proxy for line in lines if line.what == SAVE))
    whole = made == len(rec.nodes) and saved == ids and all(node[3] == rec.mode for node in rec.nodes)
    return lines if whole else None


# ---- where something else happens ----

_NEW, _OPEN, _RUNNING = range(3)  # known.h has them


def begin(
    model: NNsight, args: tuple[Any, ...], memo: Memo, lines: int, proxies: Sequence[Proxy], state: int
) -> HostedTracer:
    """The tracer of a block of which so many lines were known; -1: its input is of another kind."""
    tracer = _tracer(model, args, memo)
    model._hosted.known[memo.key] = memo.tries + (lines >= 0)
    if state == _NEW:
        return tracer
    rec, known = tracer._recorder, memo.lines[: max(lines, 0)]
    tracer._used = True
    current.recorder = rec
    rec.open((args, {}))
    if known and memo.layout is not None:  # as it was when the first line asked for it
        rec.layouts[0], rec.near = memo.layout, (0, memo.layout.first)
    for line in known:
        proxy, id = proxies[line.proxy], memo.ids[line.proxy]
        if line.what == SAVE:
            rec.save(proxy)
            continue
        made = len(rec.nodes)
        if line.what == STORE:
            rec.set_index(proxy, line.index, line.value)
        elif id == made:
            _read(rec, line.path, proxy, id)
        else:
            continue
        rec.nodes[made] = memo.rec.nodes[made]  # where the line stands
    for id, (point, _) in rec._named.get(0, {}).items():
        rec._named[0][id] = (point, rec.nodes[id][2])
    if state == _RUNNING:
        rec.invoke = -1
    return tracer


def _read(rec: HostedRecorder, path: str | None, proxy: Proxy, id: int) -> None:
    """Records reading an output, of which the user has a proxy already."""
    assert path is not None
    point = rec.layouts[0].first[path, wire.OUTPUT]
    rec.read(point, point.tree)  # type: ignore[arg-type]
    proxy._rec, proxy._id = rec, id
    rec.bound[0, point.path, wire.OUTPUT] = proxy


def finished(model: NNsight, args: tuple[Any, ...], memo: Memo, failed: bool) -> HostedTracer:
    """The tracer of a block that has ended as it was known to, or whose pass has failed."""
    tracer = _tracer(model, args, memo)
    rec = tracer._recorder
    tracer._used = True
    rec.open((args, {}))
    rec.nodes = list(memo.rec.nodes)
    if memo.layout is not None:
        rec.layouts[0] = memo.layout
    if not failed:
        _keep(rec, memo)
    rec.invoke = -1
    rec.close("it was not saved")
    return tracer


def end(tracer: HostedTracer, memo: Memo, error: BaseException | None) -> None:
    """Ends a trace that somebody has looked at while its pass ran."""
    rec = tracer._recorder
    if error is None:
        _keep(rec, memo)
    rec.close("it was not saved" if error is None else f"its trace failed with {type(error).__name__}")


def _keep(rec: HostedRecorder, memo: Memo) -> None:
    """Has it end as ``Recorder.finish`` does where saves have not been recorded."""
    rec.kept, rec._unkept = list(range(memo.nodes, memo.nodes + len(memo.kept))), memo.kept


def _tracer(model: NNsight, args: tuple[Any, ...], memo: Memo) -> HostedTracer:
    from .wrapping import HostedTracer

    tracer = HostedTracer(model, args, {})
    rec = tracer._recorder
    rec.edits, rec.mode, rec.autocast, rec.default_dtype = (), memo.mode, False, memo.dtype  # as when it was called
    return tracer


def failed(
    model: NNsight,
    args: tuple[Any, ...],
    memo: Memo,
    proxies: Sequence[Proxy],
    error: BaseException | None,
    found: Sequence[Any] | None,
) -> BaseException:
    """What to raise where a pass has failed, or was not what it was."""
    lost = finished(model, args, memo, True)._recorder
    try:
        if error is None:
            assert found is not None
            hooked.check(lost, memo.program, found)
    except NnsightError as wrong:
        error = wrong
    assert error is not None
    lost.closed = f"its trace failed with {type(error).__name__}"
    for proxy, id in zip(proxies, memo.ids, strict=False):
        if "_rec" not in vars(proxy):
            proxy._rec, proxy._id = lost, id
    if isinstance(error, Exception) and not isinstance(error, NnsightError):
        users(error)
    error.__traceback__ = tracebacks.cut(error)
    return error
