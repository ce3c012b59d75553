"""The operators that a server runs are PyTorch's, and each that the recorder could write has been decided on."""

from __future__ import annotations

import warnings
from typing import Any

import torch

import guardlists
from nnsight_go.torchmap import operators, rules


def test_arguments_are_those_of_the_schemas() -> None:
    wrong = {
        name: guardlists.arguments(name)
        for name, listed in guardlists.allowed().items()
        if name.startswith("aten::") and listed != guardlists.arguments(name)
    }
    assert not wrong, "these lines of engine/guard/operators.txt should be\n" + "\n".join(
        " ".join((name, *names)) for name, names in wrong.items()
    )


def test_operators_draw_nothing_and_write_where_their_name_says() -> None:
    """The planner goes by names: an operator that ends in an underscore changes ``self``, others change nothing."""
    draws, elsewhere = set(), set()
    for name in guardlists.allowed():
        for schema in guardlists.schemas(name):
            packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
            overload = getattr(packet, schema.overload_name or "default", None)
            if overload is not None and torch.Tag.nondeterministic_seeded in overload.tags:
                draws.add(name)
            written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            if name.startswith("aten::") and written != (["self"] if operators.is_in_place(name) else []):
                elsewhere.add(name)
    assert draws == {"aten::scaled_dot_product_attention"}, "only if asked to, which engine/guard/checks.go refuses"
    assert not elsewhere


def test_functions_that_a_rule_records_are_decided_on() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functions = [f for group in torch.overrides.get_overridable_functions().values() for f in group]
    known = guardlists.allowed().keys() | guardlists.refused()
    missing = sorted({name for f in functions for name in _recorded(f)} - known)
    assert not missing, guardlists.undecided(missing)


def _recorded(function: Any) -> set[str]:
    """The operators that stand in the rule of a function."""
    try:
        rule = rules.choose(function)
    except AttributeError:  # no function that could meet a proxy
        return set()
    found: set[str] = set()
    seen: set[int] = set()

    def look(x: Any) -> None:
        if id(x) in seen:
            return
        seen.add(id(x))
        if isinstance(x, operators.Operator):
            found.add(x.name)
        for cell in getattr(x, "__closure__", None) or ():
            look(cell.cell_contents)

    look(rule)
    return found
