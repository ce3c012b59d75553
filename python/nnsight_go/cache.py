"""``tracer.cache()``: the inputs and outputs of many modules at once, as they are after all edits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from . import positions, structures, wire
from .envoy import Envoy
from .errors import InputError, ModulePathError
from .points import Mapping, Point
from .positions import here
from .structures import Fields, Items

if TYPE_CHECKING:
    from .generation import StepRecorder
    from .recorder import Recorder


class Entry:
    """What one module took and gave.

    Attributes:
        output: what it gave, or None where outputs were not asked for.
        inputs: ``(args, kwargs)`` that it took, or None where inputs were not asked for.
    """

    def __init__(self, output: Any, inputs: Any) -> None:
        self.output = output
        self.inputs = inputs

    @property
    def input(self) -> Any:
        """Its first positional argument, else its first by name."""
        if self.inputs is None:
            return None
        args, kwargs = self.inputs
        return args[0] if args else next(iter(kwargs.values()), None)

    def __repr__(self) -> str:
        return f"Entry(output={self.output!r}, inputs={self.inputs!r})"


class CacheKeyError(ModulePathError, KeyError):
    """A cache has no entry of that name."""


class Cache(dict[str, Any]):
    """Entries by module: ``cache["model.transformer.h.3"].output``, or ``cache.model.transformer.h[3].output``.

    It is empty until its trace has ended. A trace of several invokes has a list of entries for each
    module, one an invoke. What is inside a skipped module has no entry, or None in such a list. Names
    that modules got by ``rename=`` work too.
    """

    def __init__(self, root: Envoy) -> None:
        super().__init__()
        self._root = root

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return View(self, name)._checked()

    def _own(self, path: str) -> str:
        """The name that entries have for a module that is called otherwise; the name itself if there is none."""
        try:
            module = _named(self._root, path)
        except AttributeError:
            return path
        return f"model.{module._own_path}" if module._own_path else "model"

    def __missing__(self, key: str) -> Any:
        own = self._own(key)
        if own != key and own in self:
            return self[own]
        raise CacheKeyError(
            f"the cache has no {key!r}",
            hint=f"It has {', '.join(list(self)[:6])}, ..." if self else "It is filled when its trace ends.",
            **positions.fields(here()),
        )


class View:
    """A module of a cache, by attributes and indices."""

    def __init__(self, cache: Cache, path: str) -> None:
        self._cache, self._path = cache, path

    def _checked(self) -> View:
        if self._path not in self._cache and not self.keys():
            own = View(self._cache, self._cache._own(self._path))
            if own._path != self._path and (own._path in self._cache or own.keys()):
                return own
            self._cache.__missing__(self._path)
        return self

    def _of(self, name: str) -> Any:
        found = self._cache[self._path]
        return [one and getattr(one, name) for one in found] if isinstance(found, list) else getattr(found, name)

    @property
    def output(self) -> Any:
        """What the module gave."""
        return self._of("output")

    @property
    def inputs(self) -> Any:
        """``(args, kwargs)`` that the module took."""
        return self._of("inputs")

    @property
    def input(self) -> Any:
        """The module's first argument."""
        return self._of("input")

    def __getattr__(self, name: str) -> View:
        if name.startswith("__"):
            raise AttributeError(name)
        return View(self._cache, f"{self._path}.{name}")._checked()

    def __getitem__(self, index: int) -> Any:
        found = self._cache.get(self._path)
        if isinstance(found, list):
            return found[index]
        if index < 0:
            index += 1 + max(self._numbers(), default=-1)
        return View(self._cache, f"{self._path}.{index}")._checked()

    def _numbers(self) -> list[int]:
        """Those modules right below this one, a list of modules, that the cache knows of."""
        depth = self._path.count(".") + 1
        parts = (key.split(".") for key in self.keys())
        return sorted({int(names[depth]) for names in parts if len(names) > depth and names[depth].isdigit()})

    def __iter__(self) -> Iterator[Any]:
        found = self._cache.get(self._path)
        return iter(found) if isinstance(found, list) else (self[i] for i in self._numbers())

    def __len__(self) -> int:
        found = self._cache.get(self._path)
        return len(found) if isinstance(found, list) else len(self._numbers())

    def __bool__(self) -> bool:
        return True

    def keys(self) -> list[str]:
        """The modules below this one that the cache has, by their whole path."""
        return [key for key in self._cache if key == self._path or key.startswith(self._path + ".")]

    def __repr__(self) -> str:
        return f"<{self._path}: {len(self.keys())} entries>"


def conversion(
    device: torch.device | str | None, dtype: torch.dtype | None, detach: bool, non_blocking: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What is done with each value that a cache collects."""

    def convert(value: torch.Tensor) -> torch.Tensor:
        value = value.detach() if detach else value
        if dtype is not None and value.dtype.is_floating_point:
            value = value.to(dtype)
        return value if device is None else value.to(device, non_blocking=non_blocking)

    return convert


def gather(
    rec: Recorder,
    root: Envoy,
    modules: Iterable[Envoy | str] | Envoy | str | None,
    convert: Callable[[torch.Tensor], torch.Tensor],
    include_output: bool,
    include_inputs: bool,
) -> Cache:
    """Makes a cache that the end of the trace fills: of the invoke that is open, or of all from now on."""
    cache = Cache(root)
    chosen = _chosen(root, modules)
    ports = _ports(include_output, include_inputs)
    first, only = len(rec.invokes), rec.invoke
    late = only < 0 and root._native.by_input  # there is no input yet
    known = None if late else _paths(root, chosen)

    def fill() -> None:
        invokes = [only] if only >= 0 else [i for i in range(first, len(rec.invokes)) if not rec.invokes[i].edit]
        paths = known
        if paths is None:
            rec.invoke = invokes[0] if invokes else -1  # which modules run is the same for all
            paths = _paths(root, chosen) if invokes else []
            rec.invoke = -1
        for path in paths:
            entries: list[Entry | None] = []
            for invoke in invokes:
                rec.invoke = invoke
                entries.append(_entry(rec, root, path, ports, convert))
            rec.invoke = -1
            for entry in filter(None, entries):
                rec.save([entry.output, entry.inputs])
            _put(filled, path, entries)

    filled: dict[str, Any] = {}
    rec.at_end.append(fill)
    rec.when_done.append(lambda: cache.update(filled))
    return cache


def follow(
    rec: StepRecorder,
    root: Envoy,
    modules: Iterable[Envoy | str] | Envoy | str | None,
    convert: Callable[[torch.Tensor], torch.Tensor],
    include_output: bool,
    include_inputs: bool,
) -> Cache:
    """Makes a cache that each step of a generation fills from now on, when it has run."""
    cache = Cache(root)
    paths = _paths(root, _chosen(root, modules))
    ports = _ports(include_output, include_inputs)
    first = rec.step
    entries: dict[str, list[Entry | None]] = {}

    def collect(rec: StepRecorder) -> Callable[[], None]:
        found: dict[str, Entry | None] = {}
        for path in paths if rec.step >= first else ():
            found[path] = _entry(rec, root, path, ports, convert)

        def add() -> None:
            for path, entry in found.items():
                steps = entries.setdefault(path, [])
                steps.append(entry)
                _put(cache, path, steps)

        return add

    rec.generation.collectors.append(collect)
    return cache


def _named(root: Envoy, path: str) -> Any:
    """The module of a path, which may begin with "model." as the entries' names do."""
    try:
        return root.get(path)  # Llama's own paths begin so, too
    except AttributeError:
        if path == "model":
            return root
        if not path.startswith("model."):
            raise
    return root.get(path.removeprefix("model."))


def _chosen(root: Envoy, modules: Iterable[Envoy | str] | Envoy | str | None) -> list[Envoy] | None:
    """The modules that a cache is of; None for all that run."""
    if modules is None:
        return None
    if isinstance(modules, str) or (isinstance(modules, Envoy) and modules._class != "ModuleList"):
        modules = [modules]
    out = []
    for given in modules:
        module = _named(root, given) if isinstance(given, str) else given
        if not isinstance(module, Envoy) or module._native is not root._native:
            raise InputError(
                f"a cache is of modules of the model, and {given!r} is none",
                hint='Give modules (model.transformer.h[0]) or their paths ("transformer.h.0").',
                **positions.fields(here()),
            )
        out.append(module)
    return out


def _paths(root: Envoy, chosen: list[Envoy] | None) -> list[str]:
    """The paths of modules, once each, that have an output in what runs."""
    if chosen is None:
        points = root._native.points
        return list(dict.fromkeys(m._own_path for m in root.modules() if (m._own_path, wire.OUTPUT) in points))
    for module in chosen:
        module._point(wire.OUTPUT)  # tells why where it never runs
    return list(dict.fromkeys(module._own_path for module in chosen))


def _entry(
    rec: Recorder, root: Envoy, path: str, ports: list[int], convert: Callable[[torch.Tensor], torch.Tensor]
) -> Entry | None:
    """What a cache has of a module in the invoke that is open; None where nothing of it is computed."""
    point = root._native.points.get((path, wire.OUTPUT))
    if point is None or rec.skipped_around(rec.invoke, point) is not None:  # it is of another step, or skipped
        return None
    parts = {port: _value(rec, root, path, port, convert) for port in ports}
    return Entry(parts.get(wire.OUTPUT), parts.get(wire.INPUT))


def _put(into: dict[str, Any], path: str, entries: list[Entry | None]) -> None:
    """Puts a module's entries where its name says, one by itself; none where it was left out everywhere."""
    if any(entries):
        into["model." + path if path else "model"] = entries[0] if len(entries) == 1 else entries


def _ports(include_output: bool, include_inputs: bool) -> list[int]:
    return [port for port, wanted in ((wire.OUTPUT, include_output), (wire.INPUT, include_inputs)) if wanted]


def _value(rec: Recorder, root: Envoy, path: str, port: int, convert: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The value of an access point at the end of an invoke. It is no access: positions do not move."""
    point: Point = root._native.points[path, port]
    seen = rec.bound.get((rec.invoke, path, port))
    if seen is None:
        seen = structures.build(rec, point, point.tree, f"model.{point.text}" if path else point.text)
    out = _converted(seen, convert)
    if port == wire.INPUT and isinstance(point.tree, Mapping):
        return tuple(out["args"]), out["kwargs"]
    return out


def _converted(x: Any, convert: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(x, torch.Tensor):
        return convert(x)
    if isinstance(x, Items):
        return tuple(_converted(item, convert) for item in x)
    if isinstance(x, Fields):
        return Record({k: _converted(v, convert) for k, v in x.items()})
    return x


class Record(dict[str, Any]):
    """A dictionary whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None
