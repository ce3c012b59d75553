"""More names for modules, so that one script fits models that name their parts differently."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from . import positions
from .errors import InputError
from .positions import here

if TYPE_CHECKING:
    from .envoy import Envoy


def apply(root: Envoy, rename: Mapping[str, str | list[str]]) -> None:
    """Gives modules second names; the first ones stay.

    A key with a dot is the path of one module, and its new names stand on the model itself (or, with
    dots, where their own path says); a key without one is a name, and every module of that name gets
    the new one beside it.

    Raises:
        InputError: there is no module to rename, or the new name is taken.
    """
    for old, given in rename.items():
        names = [given] if isinstance(given, str) else list(given)
        if "." in old.strip("."):
            module = root.get(old.strip("."))
            for name in names:
                parent, _, last = name.strip(".").rpartition(".")
                _add(root.get(parent), last, module)
        else:
            name = old.strip(".")
            parents = [m for m in root.modules() if name in m._children]
            if not parents:
                raise InputError(
                    f"rename: no module of this model is named {old!r}",
                    hint=f"Its modules are named {', '.join(_names(root))}.",
                    **positions.fields(here()),
                )
            for parent_ in parents:
                for new in names:
                    _add(parent_, new.strip("."), parent_._children[name])


def _names(root: Envoy) -> Iterable[str]:
    return sorted({name for m in root.modules() for name in m._children if not name.isdigit()})


def _add(parent: Envoy, name: str, module: Envoy) -> None:
    aliases = parent.__dict__.setdefault("_aliases", {})
    if not name.isidentifier() or hasattr(type(parent), name) or aliases.get(name, module) is not module:
        _taken(parent, name)
    if name in parent._children or name in parent._params:
        _taken(parent, name)
    aliases[name] = parent.__dict__[name] = module


def _taken(parent: Envoy, name: str) -> None:
    raise InputError(
        f"rename: {name!r} cannot be a new name on {parent._name()}: it is taken, or no identifier",
        hint="Choose another name.",
        **positions.fields(here()),
    )
