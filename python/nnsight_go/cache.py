"""``tracer.cache()``: the inputs and outputs of many modules at once, as they are after all edits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from . import positions, structures, wire
from .errors import InputError, ModulePathError
from .points import Mapping, Point
from .positions import here
from .structures import Fields, Items

if TYPE_CHECKING:
    from .envoy import Envoy
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


class Cache(dict[str, Any]):
    """Entries by module: ``cache["model.transformer.h.3"].output``, or ``cache.model.transformer.h[3].output``.

    It is empty until its trace has ended. A trace of several invokes has a list of entries for each
    module, one an invoke.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return View(self, name)._checked()

    def __missing__(self, key: str) -> Any:
        raise ModulePathError(
            f"the cache has no {key!r}",
            hint=f"It has {', '.join(list(self)[:6])}, ..." if self else "It is filled when its trace ends.",
            **positions.fields(here()),
        )


class View:
    """A module of a cache, by attributes and indices."""

    def __init__(self, cache: Cache, path: str) -> None:
        self._cache, self._path = cache, path

    def _checked(self) -> View:
        if self._path not in self._cache and not any(key.startswith(self._path + ".") for key in self._cache):
            self._cache.__missing__(self._path)
        return self

    def _of(self, name: str) -> Any:
        found = self._cache[self._path]
        return [getattr(one, name) for one in found] if isinstance(found, list) else getattr(found, name)

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
            depth = self._path.count(".") + 1
            below = (key.split(".") for key in self._cache if key.startswith(self._path + "."))
            index += 1 + max((int(parts[depth]) for parts in below if parts[depth].isdigit()), default=-1)
        return View(self._cache, f"{self._path}.{index}")._checked()

    def __iter__(self) -> Iterator[Any]:
        i = 0
        while True:
            try:
                yield self[i]
            except (ModulePathError, IndexError):
                return
            i += 1

    def keys(self) -> list[str]:
        """The modules below this one that the cache has, by their whole path."""
        return [key for key in self._cache if key == self._path or key.startswith(self._path + ".")]

    def __repr__(self) -> str:
        return f"<{self._path}: {len(self.keys())} entries>"


def gather(
    rec: Recorder,
    root: Envoy,
    modules: Iterable[Envoy | str] | None,
    convert: Callable[[torch.Tensor], torch.Tensor],
    include_output: bool,
    include_inputs: bool,
) -> Cache:
    """Makes a cache that the end of the trace fills: of the invoke that is open, or of all from now on."""
    cache = Cache()
    paths = _paths(root, modules)
    ports = [port for port, wanted in ((wire.OUTPUT, include_output), (wire.INPUT, include_inputs)) if wanted]
    first, only = len(rec.invokes), rec.invoke
    if only < 0 and first and rec.invokes[-1].rows is None:
        first -= 1

    def fill() -> None:
        invokes = [only] if only >= 0 else [i for i in range(first, len(rec.invokes)) if not rec.invokes[i].edit]
        for path in paths:
            entries = []
            for invoke in invokes:
                rec.invoke = invoke
                parts = {port: _value(rec, root, path, port, convert) for port in ports}
                entries.append(Entry(parts.get(wire.OUTPUT), parts.get(wire.INPUT)))
            rec.invoke = -1
            for entry in entries:
                rec.save([entry.output, entry.inputs])
            if entries:
                filled["model." + path if path else "model"] = entries[0] if len(entries) == 1 else entries

    filled: dict[str, Any] = {}
    rec.at_end.append(fill)
    rec.when_done.append(lambda: cache.update(filled))
    return cache


def _paths(root: Envoy, modules: Iterable[Envoy | str] | None) -> list[str]:
    points = root._native.points
    if modules is None:
        return [m.path for m in root.modules() if (m.path, wire.OUTPUT) in points]
    out = []
    for given in modules:
        module = (
            root.get(given.removeprefix("model.") if given.startswith("model.") else given)
            if isinstance(given, str)
            else given
        )
        path = getattr(module, "path", None)
        if path is None or getattr(module, "_native", None) is not root._native:
            raise InputError(
                f"a cache is of modules of the model, and {given!r} is none",
                hint='Give modules (model.transformer.h[0]) or their paths ("transformer.h.0").',
                **positions.fields(here()),
            )
        module._point(wire.OUTPUT)  # tells why where it never runs
        out.append(path)
    return out


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
