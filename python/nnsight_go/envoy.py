"""Envoys: the modules of a model as a user sees them.

The tree has the names of Hugging Face's implementation. Inside a trace ``.output``, ``.input`` and
``.inputs`` are what a module takes and gives; its parameters are attributes at any time.
"""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch

from . import calls, foreign, positions, skipping, structures, wire
from .errors import InputError, ModulePathError
from .placement import Placed
from .points import Leaf, Point
from .positions import here
from .recorder import current

if TYPE_CHECKING:
    from .inside import Source
    from .native import Native
    from .recorder import Recorder

_PORTS = ("input", "output", "gradient")


class ModuleIndexError(ModulePathError, IndexError):
    """A list of modules has no module of that number."""


class Envoy(Placed):
    """One module of a model.

    Children are attributes (and items, of a list of modules); so are parameters and buffers.
    """

    _native: Native
    _path: str
    _first: str  # the first of its paths, where it has several
    _class: str
    _extra: str
    _children: dict[str, Envoy]
    _listed: list[Envoy] | None  # the children of a list of modules
    _named: bool  # it is a dictionary of modules
    _params: list[str]

    def __init__(self, native: Native, path: str, info: dict[str, Any]) -> None:
        own = self.__dict__
        own["_native"], own["_path"], own["_class"], own["_extra"] = native, path, info["class"], info["extra"]
        own["_first"] = path
        own["_children"], own["_params"] = {}, info["params"]
        own["_listed"] = [] if info["class"] in ("ModuleList", "Sequential") else None
        own["_named"] = info["class"] == "ModuleDict"

    # ---- values in a trace ----

    @property
    def output(self) -> Any:
        """What the module gives: a tensor, or for blocks and attention a tuple whose ``[0]`` is the hidden states.

        Assigning it replaces what the rest of the model sees. Only inside a trace.
        """
        return self._read(wire.OUTPUT)

    @output.setter
    def output(self, value: Any) -> None:
        self._write(wire.OUTPUT, value)

    @property
    def input(self) -> Any:
        """The module's first positional argument, else its first by name. Only inside a trace."""
        args, kwargs = self._read(wire.INPUT).values()
        return args[0] if args else next(iter(kwargs.values()))

    @input.setter
    def input(self, value: Any) -> None:
        whole = self._read(wire.INPUT)
        if whole["args"]:
            whole["args"][0] = value
        else:
            whole["kwargs"][next(iter(whole["kwargs"]))] = value

    @property
    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Everything the module was called with: ``(args, kwargs)``. Only inside a trace."""
        args, kwargs = self._read(wire.INPUT).values()
        return args, kwargs

    @inputs.setter
    def inputs(self, value: Any) -> None:
        if not (isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], dict)):
            raise InputError(
                f"{self._name('inputs')} is (args, kwargs), and cannot become {type(value).__name__}",
                path=self._path,
                hint="Give a tuple of the positional arguments and a dictionary of the others.",
                **positions.fields(here()),
            )
        self._write(wire.INPUT, {"args": value[0], "kwargs": value[1]})

    def _name(self, attribute: str = "") -> str:
        """How a user writes this module, or an attribute of it."""
        return ".".join(part for part in ("model", self._path, attribute) if part)

    def _recorder(self, what: str) -> Recorder:
        rec = current.recorder
        if rec is None or rec.native is not self._native:
            raise self._elsewhere(rec, what)
        return rec

    def _elsewhere(self, rec: Recorder | None, what: str) -> InputError:
        """The error of a line outside of every trace of this model."""
        if rec is None:
            return InputError(
                f"{self._name(what)} has a value only inside a trace",
                path=self._path,
                hint="Use it in `with model.trace(prompt):`, and keep values of it with `.save()`.",
                **positions.fields(here()),
            )
        return InputError(
            f"{self._name(what)} belongs to another model than the one that is being traced",
            path=self._path,
            hint="A trace reaches the modules of its own model.",
            **positions.fields(here()),
        )

    def _reach(self, rec: Recorder, port: int) -> Point:
        """The access point that a line in an invoke names."""
        point = self._point(port)
        rec._inside(lambda: point.text)
        return point

    def _point(self, port: int) -> Point:
        point = self._native.points.get((self._path, port))
        if point is None and ".source." in self._path:
            point = self._native.ops.get((self._path, port))
        if point is None:
            raise ModulePathError(
                f"{self._name()} never runs by itself, so it has no {_PORTS[port]}",
                path=self._path,
                hint=self._never_runs(),
                **positions.fields(here()),
            )
        return point

    def _never_runs(self) -> str:
        if self._class in ("ModuleList", "ModuleDict"):
            return f"It is a list of modules: use one of them, {self._name()}[0]."
        return "A fused operation of the engine does its work: use the module around it."

    def _read(self, port: int) -> Any:
        rec = current.recorder
        if rec is None or rec.native is not self._native:
            raise self._elsewhere(rec, _PORTS[port])
        point = self._reach(rec, port)
        if rec.skipped:
            skipping.check(rec, point)
        key = (rec.invoke, point.path, port)
        seen = rec.bound.get(key)
        if seen is None:
            tree = point.tree
            if type(tree) is Leaf:  # most are, and no name of theirs is shown
                seen = rec.read(point, tree)
            else:
                seen = structures.build(rec, point, tree, f"model.{point.text}" if self._path else point.text)
            rec.bound[key] = seen
        return seen

    def _write(self, port: int, value: Any) -> None:
        old = self._read(port)
        if value is old:
            return  # out of `x.output += 1`, which changed the tensor in place
        rec, point = self._recorder(("input", "output")[port]), self._point(port)
        invoke = rec.touch(point)
        name = f"model.{point.text}" if self._path else point.text
        rec.bound[invoke, point.path, port] = structures.assign(rec, point, point.tree, name, old, value)

    def skip(self, replacement: Any) -> None:
        """Leaves the module's work out: ``replacement`` is what it gives, and nothing inside it is computed.

        Args:
            replacement: as for assigning ``.output``: a tensor, or a tuple of the same structure.

        Raises:
            OutOfOrderError: the module, or one inside it, has already run.
        """
        skipping.skip(self, replacement)

    def next(self, steps: int = 1) -> Self:
        """Goes on to the next step of a generation, ``model.lm_head.next().output``; gives this module.

        All lines that follow belong to that step, those of other modules too.

        Raises:
            InputError: there is no generation around this line.
            OutOfOrderError: the generation ends before that step.
        """
        self._recorder("next").advance(steps)
        return self

    @property
    def source(self) -> Source:
        """The operators that the module's forward pass calls itself: ``module.source.add_0.output``.

        ``print(module.source)`` lists them.
        """
        from .inside import Source

        return Source(self)

    # ---- calling ----

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Applies the module to values, with the model's weights: ``model.lm_head(model.transformer.ln_f(h))``.

        Inside a trace this is recorded, and is no access of the module's own: edits of its ``.output``
        do not touch it. Outside of one it computes at once, on real tensors.
        """
        return calls.call(self, args, kwargs)

    # ---- the tree ----

    def get(self, path: str) -> Envoy:
        """The module of a path below this one: ``model.get("transformer.h.5.mlp")``.

        Raises:
            ModulePathError: there is none; names the nearest.
        """
        at: Any = self
        for part in path.split(".") if path else ():
            if not isinstance(at, Envoy) or (part in ("heads", "source") and part not in at._children):
                at = getattr(at, part)  # values inside modules
                continue
            child = at._children.get(part) or at.__dict__.get("_aliases", {}).get(part)
            if child is None:
                at._unknown(part)
            at = child
        return at  # type: ignore[no-any-return]

    def _unknown(self, name: str) -> NoReturn:
        if name in foreign.MODULE:
            raise ModulePathError(
                f"{self._name()} ({self._class}) has no {name!r}",
                path=self._path,
                hint=f"{foreign.MODULE[name][0].upper()}{foreign.MODULE[name][1:]}.",
                **positions.fields(here()),
            )
        children, names = list(self._children), [*self._children, *self._params]
        near = difflib.get_close_matches(name, [*names, "output", "input", "inputs"], n=3)
        if name.isdigit() and all(child.isdigit() for child in children):
            hint = f"It has modules 0 to {len(children) - 1}." if children else "It has none."
        else:
            said = f"Nearest: {', '.join(near)}. " if near else ""
            hint = (
                f"{said}It has {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}." if names else said.strip()
            )
        raise ModulePathError(
            f"{self._name()} ({self._class}) has no {name!r}",
            path=self._path,
            hint=hint or None,
            **positions.fields(here()),
        )

    def __getattr__(self, name: str) -> Any:
        # children stand in __dict__: only parameters and what does not exist come here
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._params:
            whole = f"{self._path}.{name}" if self._path else name
            rec = current.recorder
            if rec is not None and rec.elsewhere and rec.native is self._native:
                return rec.parameter(whole)
            return self._native.parameter(whole)
        if name == "heads" and (f"{self._path}.heads.q", wire.OUTPUT) in self._native.points:
            from .inside import Heads

            self.__dict__["heads"] = heads = Heads(self)
            return heads
        ours = getattr(type(self), name, None)
        if isinstance(ours, property) and ours.fget is not None:
            return ours.fget(self)  # its own error, which Python took for a missing attribute, once more
        self._unknown(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property) or name.startswith("_"):
            object.__setattr__(self, name, value)
        elif name in self._params:
            raise InputError(
                f"{self._name(name)} is a parameter of the model and cannot be replaced",
                path=self._path,
                hint=f"Change it in place: `with torch.no_grad(): {self._name(name)}.copy_(value)`.",
                **positions.fields(here()),
            )
        elif name in self._children:
            raise InputError(
                f"{self._name(name)} is a module of the model and cannot be replaced",
                path=self._path,
                hint=f"Assign to what it gives: {self._name(name)}.output = value.",
                **positions.fields(here()),
            )
        else:
            self._unknown(name)

    def __getitem__(self, index: Any) -> Any:
        listed = self._listed
        if type(index) is int and listed is not None and -len(listed) <= index < len(listed):
            return listed[index]
        if isinstance(index, str) and index in self._children:
            return self._children[index]
        if listed is None or not isinstance(index, int | slice):
            raise TypeError(
                f"{self._name()} is a {self._class} and has no items; "
                f"index what it gives: {self._name('output')}[{index!r}]"
            )
        try:
            return listed[index]
        except IndexError:
            raise ModuleIndexError(
                f"{self._name()} has no module {index}",
                path=self._path,
                hint=f"It has modules 0 to {len(listed) - 1}.",
                **positions.fields(here()),
            ) from None

    def __len__(self) -> int:
        if self._listed is None and not self._named:
            raise TypeError(f"{self._name()} is a {self._class} and has no len()")
        return len(self._children)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Envoy]:
        if self._listed is None:
            raise TypeError(f"{self._name()} is a {self._class} and cannot be iterated over")
        return iter(self._listed.copy())

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._children, *self._params})

    @property
    def _own_path(self) -> str:
        """The path by which its values are known."""
        return self._path

    @property
    def path(self) -> str:
        """The module's name in the model: ``transformer.h.5.mlp``; empty for the model itself."""
        return self._path

    def named_children(self) -> Iterator[tuple[str, Envoy]]:
        """The modules right below this one, by name."""
        yield from self._children.items()

    def children(self) -> Iterator[Envoy]:
        """The modules right below this one."""
        yield from self._children.values()

    def named_modules(
        self, prefix: str = "", include_fn: Callable[[Envoy], bool] | None = None
    ) -> Iterator[tuple[str, Envoy]]:
        """This module and all below it, by path, in the order of Hugging Face's implementation.

        Args:
            prefix: what paths begin with.
            include_fn: chooses modules.
        """
        if include_fn is None or include_fn(self):
            yield prefix, self
        for name, child in self._children.items():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name, include_fn)

    def modules(self, include_fn: Callable[[Envoy], bool] | None = None) -> Iterator[Envoy]:
        """This module and all below it, or those that ``include_fn`` chooses."""
        for _, module in self.named_modules(include_fn=include_fn):
            yield module

    @property
    def parent(self) -> Envoy | None:
        """The module that this one is part of; None of the model itself."""
        above = self.__dict__.get("_above")
        return above() if above is not None else None

    @property
    def root(self) -> Envoy:
        """The model."""
        at = self
        while (above := at.parent) is not None:
            at = above
        return at

    # ---- parameters ----

    def _tensors(self, buffers: bool) -> Iterator[tuple[str, str]]:
        """Names of the parameters (or buffers) here and below, relative to this module, and in the model."""
        cut = len(self._path) + 1 if self._path else 0
        for path, module in self.named_modules():
            for name in module._params:
                whole = ".".join(part for part in (self._path, path, name) if part)
                if bool(self._native.parameter_info[whole].get("buffer")) == buffers:
                    yield whole[cut:], whole

    def named_parameters(self, remove_duplicate: bool = True) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The parameters of this module and all below it, by name: live tensors that the model computes with."""
        seen: set[int] = set()
        for name, whole in self._tensors(buffers=False):
            parameter = self._native.parameter(whole)
            assert isinstance(parameter, torch.nn.Parameter)
            if remove_duplicate and id(parameter) in seen:  # tied weights are one tensor
                continue
            seen.add(id(parameter))
            yield name, parameter

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters of this module and all below it, tied ones once."""
        for _, parameter in self.named_parameters():
            yield parameter

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The buffers of this module and all below it, by name."""
        for name, whole in self._tensors(buffers=True):
            yield name, self._native.parameter(whole)

    def buffers(self) -> Iterator[torch.Tensor]:
        """The buffers of this module and all below it."""
        for _, buffer in self.named_buffers():
            yield buffer

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Whether backward passes fill the gradients of the parameters here and below. They do not unless asked to."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    @property
    def training(self) -> bool:
        """Whether dropout is at work. It is not in a model that was opened."""
        return self._native.training

    def train(self, mode: bool = True) -> Self:
        """Switches dropout on, or off with ``mode=False``, for the whole model, all views of it included.

        Raises:
            InputError: this is a part of the model.
        """
        if self._path:
            raise InputError(
                f"{self._name()} trains as the whole model does",
                hint="Switch it there: model.train() and model.eval().",
                **positions.fields(here()),
            )
        self._native.train(mode)
        return self

    def eval(self) -> Self:
        """Switches dropout off, for the whole model."""
        return self.train(False)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of the parameters here and below, or sets them to zero."""
        for parameter in self.parameters():
            if parameter.grad is not None and set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.detach_().zero_()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All parameters by name, tied ones under each of their names. The tensors are live."""
        return {name: p.detach() for name, p in self.named_parameters(remove_duplicate=False)}

    # ---- showing ----

    def __repr__(self) -> str:
        return "\n".join(_lines(self))


def _lines(envoy: Envoy) -> list[str]:
    """An envoy's tree, as torch prints modules: equal neighbours of a list are shown once."""
    children = [(name, _lines(child)) for name, child in envoy._children.items()]
    if not children:
        return [f"{envoy._class}({envoy._extra})"]
    groups: list[tuple[str, str, list[str]]] = []
    for name, lines in children:
        if groups and name.isdigit() and groups[-1][2] == lines:
            groups[-1] = (groups[-1][0], name, lines)
        else:
            groups.append((name, name, lines))
    out = [f"{envoy._class}({envoy._extra}"]
    for first, last, lines in groups:
        many = int(last) - int(first) + 1 if first != last else 1
        label = f"({first})" if many == 1 else f"({first}-{last})"
        head = lines[0] if many == 1 else f"{many} x {lines[0]}"
        out.append(f"  {label}: {head}")
        out += ["  " + line for line in lines[1:]]
    return [*out, ")"]


def grow(root: Envoy, modules: list[dict[str, Any]]) -> None:
    """Hangs the modules of a description below the model itself, which is the first of them."""
    by_path = {"": root}
    for info in modules[1:]:
        parent, _, name = info["path"].rpartition(".")
        envoy = Envoy(root._native, info["path"], info)
        by_path[info["path"]] = envoy
        hang(by_path[parent], name, envoy)


def hang(parent: Envoy, name: str, envoy: Envoy) -> None:
    """Makes a module a child of another."""
    parent._children[name] = envoy
    if parent._listed is not None:
        parent._listed.append(envoy)
    envoy.__dict__["_above"] = weakref.ref(parent)  # weak: a model that nobody holds is freed at once
    if not hasattr(type(parent), name):  # a verb of ours goes before a module's name
        parent.__dict__[name] = envoy
