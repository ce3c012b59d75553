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


def test_no_operator_gives_what_it_does_not_say() -> None:
    """Arguments that an operator writes to are known to a run from its schema, but for these."""
    draws, unnamed = set(), set()
    for name in guardlists.allowed():
        if not name.startswith("aten::"):
            continue
        for schema in torch._C._jit_get_schemas_for_operator(name):
            overload = getattr(getattr(torch.ops.aten, schema.name[6:]), schema.overload_name or "default", None)
            if overload is not None and torch.Tag.nondeterministic_seeded in overload.tags:
                draws.add(name)
            written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            if operators.is_in_place(schema.name) and not written:
                unnamed.add(name)
    assert draws == {"aten::scaled_dot_product_attention"}, (
        "draws only if asked to, which engine/guard/checks.go refuses"
    )
    assert not unnamed


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
