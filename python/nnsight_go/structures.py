"""Access points that hold more than one tensor: tuples, lists, dictionaries and objects with fields.

What a user gets is a tuple, list or dictionary of proxies that writes through: assigning an item
rebinds that tensor of the access point. After the block it holds the tensors of those that were saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import positions
from .errors import InputError, ModulePathError
from .points import Constant, Leaf, Mapping, Point, Sequence, Tree
from .positions import here

if TYPE_CHECKING:
    from .recorder import Recorder


def build(rec: Recorder, point: Point, tree: Tree, name: str) -> Any:
    """What a user sees of a tree; ``name`` is how they write it. Records the reads of its tensors."""
    match tree:
        case Leaf():
            return rec.read(point, tree)
        case Constant():
            return tree.value
        case Sequence():
            items = [build(rec, point, item, f"{name}[{i}]") for i, item in enumerate(tree.items)]
            return Items._make(rec, point, tree, name, items)
        case Mapping():
            fields = {k: build(rec, point, v, f"{name}.{k}") for k, v in tree.fields.items()}
            return Fields._make(rec, point, tree, name, fields)


def assign(rec: Recorder, point: Point, tree: Tree, name: str, old: Any, new: Any) -> Any:
    """Rebinds a tree to a new value, and gives what a user sees of it from now on.

    ``old`` is what was seen before. A tensor that is there already is left as it is, so that
    ``x.output[0] += 1``, which changes it in place and then assigns it, means one thing, not two.

    Raises:
        InputError: the new value is not of the same structure.
    """
    if new is old:
        return old
    match tree:
        case Leaf():
            return rec.write(point, tree, new)
        case Constant():
            if new is tree.value or (type(new) is type(tree.value) and new == tree.value):
                return old
            _refuse(point, f"{name} is {tree.value!r} in this model, and cannot become {_kind(new)}", "")
        case Sequence():
            if isinstance(new, torch.Tensor) and len(tree.items) == 1:
                new = (new,)
            if not isinstance(new, tuple | list) or len(new) != len(tree.items):
                _refuse(
                    point,
                    f"{name} is a tuple of {len(tree.items)}, and cannot become {_kind(new)}",
                    f"Assign to one of its values, {name}[0] = ..., or give as many.",
                )
            items = [
                assign(rec, point, part, f"{name}[{i}]", before, after)
                for i, (part, before, after) in enumerate(zip(tree.items, old, new, strict=True))
            ]
            return Items._make(rec, point, tree, name, items)
        case Mapping():
            if not isinstance(new, dict) or set(new) - set(tree.fields):
                fields = ", ".join(tree.fields)
                _refuse(
                    point,
                    f"{name} has the fields {fields}, and cannot become {_kind(new)}",
                    f"Assign to one of them, {name}.{next(iter(tree.fields))} = ...",
                )
            out = {k: assign(rec, point, v, f"{name}.{k}", old[k], new.get(k, old[k])) for k, v in tree.fields.items()}
            return Fields._make(rec, point, tree, name, out)


def _kind(x: Any) -> str:
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)}"
    return f"a {type(x).__name__}"


def _refuse(point: Point, message: str, hint: str) -> NoReturn:
    raise InputError(message, path=point.path, hint=hint or None, **positions.fields(here()))


class _Place:
    """Where a structure lies: what a write through it needs."""

    __slots__ = ("name", "point", "rec", "tree")

    def __init__(self, rec: Recorder, point: Point, tree: Any, name: str) -> None:
        self.rec, self.point, self.tree, self.name = rec, point, tree, name

    def write(self, tree: Tree, name: str, old: Any, new: Any) -> Any:
        if self.rec.closed is not None:
            _refuse(self.point, f"{name} cannot be assigned to after the trace", "Assign inside the block.")
        if new is not old:
            self.rec.touch(self.point)
        return assign(self.rec, self.point, tree, name, old, new)


def _no_tensor(name: str) -> Callable[..., Any]:
    def refuse(self: Items, *args: Any) -> Any:
        self._is_no_tensor()

    refuse.__name__ = name
    return refuse


ARITHMETIC = [
    f"__{name}__"
    for name in "mul rmul sub rsub truediv rtruediv floordiv matmul rmatmul pow mod neg abs invert iadd imul".split()
]


class Items(tuple[Any, ...]):
    """The values of an access point that is a tuple: ``block.output[0]`` are its hidden states.

    ``out[0] = tensor`` rebinds a value of the access point. A tensor operation on the tuple itself is
    an error that says which value was meant.
    """

    _place: _Place
    _items: list[Any]

    @staticmethod
    def _make(rec: Recorder, point: Point, tree: Sequence, name: str, items: list[Any]) -> Items:
        out = Items(items)
        out._place, out._items = _Place(rec, point, tree, name), items
        return out

    def _nng_items(self) -> Iterable[Any]:
        return self._items

    def _is_no_tensor(self, attribute: str = "") -> NoReturn:
        place = self._place
        what = f", so it has no {attribute!r}" if attribute else ""
        raise ModulePathError(
            f"{place.name} is a tuple of {len(self._items)}{what}",
            path=place.point.path,
            hint=f"Its tensor is {place.name}[0].",
            **positions.fields(here()),
        )

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self._items[index])
        if not isinstance(index, int):
            self._is_no_tensor()
        return self._items[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(index, int):
            self._is_no_tensor()
        place, tree = self._place, self._place.tree
        i = range(len(self._items))[index]
        self._items[i] = place.write(tree.items[i], f"{place.name}[{i}]", self._items[i], value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, value: object) -> bool:
        return any(item is value for item in self._items)

    def __add__(self, other: Any) -> Any:
        return (*self._items, *other) if isinstance(other, tuple | list) else self._is_no_tensor()

    def __radd__(self, other: Any) -> Any:
        return (*other, *self._items) if isinstance(other, tuple | list) else self._is_no_tensor()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"a tuple has no attribute {name!r}")
        self._is_no_tensor(name)

    def __repr__(self) -> str:
        return repr(tuple(self._items))

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self._items,)

    for _name in ARITHMETIC:
        locals()[_name] = _no_tensor(_name)
    del _name


class Fields(dict[str, Any]):
    """The values of an access point that is a dictionary or an object: ``model.output.logits``.

    They are keys, attributes and, by their order, indices; assigning one rebinds it.
    """

    _place: _Place

    @staticmethod
    def _make(rec: Recorder, point: Point, tree: Mapping, name: str, fields: dict[str, Any]) -> Fields:
        out = Fields(fields)
        object.__setattr__(out, "_place", _Place(rec, point, tree, name))
        return out

    def _nng_items(self) -> Iterable[Any]:
        return self.values()

    def _key(self, key: Any) -> str:
        if isinstance(key, int):
            return [k for k, v in self.items() if v is not None][key]
        if key not in self:
            place = self._place
            raise ModulePathError(
                f"{place.name} has no {key!r}",
                path=place.point.path,
                hint=f"It has {', '.join(self)}.",
                **positions.fields(here()),
            )
        return str(key)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._key(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        key, place = self._key(key), self._place
        new = place.write(place.tree.fields[key], f"{place.name}.{key}", super().__getitem__(key), value)
        super().__setitem__(key, new)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are there, in order."""
        return tuple(v for v in self.values() if v is not None)

    def __repr__(self) -> str:
        name = self._place.tree.cls
        return f"{name}({', '.join(f'{k}={v!r}' for k, v in self.items())})" if name else super().__repr__()

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)
