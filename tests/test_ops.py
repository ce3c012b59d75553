"""PyTorch's own database of operators, in traces: each call must give what it gives eagerly.

Of each entry the first samples are tried; ``NNSIGHT_GO_OPS_SAMPLES=all`` tries all of them (some
minutes), a number that many.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import guardlists
import opcases
from conformance import Call, Outcome, check, describe
from nnsight_go import LanguageModel
from nnsight_go.recorder import Recorder
from references import gpt2, reference

_ASKED = os.environ.get("NNSIGHT_GO_OPS_SAMPLES", "3")
ALL = _ASKED == "all"
SAMPLES = 1_000_000 if ALL else int(_ASKED)

# At least so many of the entries that run on the CPU must be right.
TARGET = 0.98

# Entries that a trace gets wrong, and why. One that starts to be right must be taken off.
WRONG: dict[str, str] = {}

# Entries of which sizes, dtypes or strides are inferred wrongly, and why.
WRONG_SHAPES = {
    "fft.rfftn": "PyTorch's kernel for meta tensors lays results out in another order than the one for the CPU",
    "fft.rfft2": "as fft.rfftn",
    "svd": "PyTorch's kernel for meta tensors gives linalg.svd's Vh other strides than the one for the CPU",
    "nonzero_static": "PyTorch's kernel for meta tensors gives the strides of a column-major table",
    "svd_lowrank": "as svd",
    "pca_lowrank": "as svd",
}

# Entries that do not run on the CPU.
ELSEWHERE = frozenset(
    (
        "jiterator_unary", "jiterator_binary", "jiterator_4inputs_with_extra_args", "jiterator_binary_return_by_ref",
        "jiterator_2inputs_2outputs", "torch.ops.aten._flash_attention_forward",
        "torch.ops.aten._efficient_attention_forward", "nn.functional.batch_norm.without_cudnn",
    )
)  # fmt: skip


@dataclasses.dataclass
class Tally:
    """What was found so far."""

    entries: dict[str, bool] = dataclasses.field(default_factory=dict)
    calls: int = 0
    forced: int = 0
    shapes_forced: int = 0
    operators: set[str] = dataclasses.field(default_factory=set)  # that were recorded


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    directory = tmp_path_factory.mktemp("model")
    reference(gpt2(n_layer=1)).save_pretrained(directory)
    return LanguageModel(directory, tokenizer=False, dispatch=True)


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    found, call = Tally(), Recorder.call

    def noted(rec: Recorder, op: str, *args: Any) -> int:
        found.operators.add(op.partition(".")[0])
        return call(rec, op, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "call", noted)
        yield found


DATABASE = {opcases.name_of(op): op for op in opcases.database()}


@pytest.mark.parametrize("name", DATABASE)
def test_op(name: str, model: LanguageModel, tally: Tally) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variants = opcases.cases(DATABASE[name], SAMPLES)
    found = [
        (variant, call, outcome)
        for variant, calls in variants.items()
        for call, outcome in zip(calls, check(model, calls), strict=True)
        if outcome is not None
    ]
    if not found:
        assert name in ELSEWHERE, "no sample of this runs on the CPU"
        pytest.skip("does not run on the CPU")
    assert name not in ELSEWHERE, "this runs on the CPU: take it off the list"
    tally.calls += len(found)
    tally.forced += sum(o.forced for _, _, o in found)
    tally.shapes_forced += sum(o.shape_forced and not o.forced for _, _, o in found)
    wrong = list(_lines(found, "error"))
    tally.entries[name] = not wrong
    _hold(wrong, WRONG.get(name), name)
    _hold(list(_lines(found, "shape_error")), WRONG_SHAPES.get(name), name)


def _lines(found: list[tuple[str, Call, Outcome]], field: str) -> Iterator[str]:
    for variant, call, outcome in found:
        error = getattr(outcome, field)
        if error:
            yield f"{variant}: {error}\n    of {describe(call.args)}, {describe(call.kwargs)}"


def _hold(wrong: list[str], known: str | None, name: str) -> None:
    """Fails for what is wrong and not known to be, and for what is known to be wrong and is not."""
    if known is None:
        assert not wrong, "\n".join(wrong[:10])
    elif ALL:
        assert wrong, f"{name} is listed ({known}) and right: take it off the list"


def test_rates(tally: Tally, capsys: pytest.CaptureFixture[str]) -> None:
    """The share of entries that are right; runs after them."""
    if not tally.entries:
        pytest.skip("no entry was tried")
    right = sum(tally.entries.values())
    recorded = tally.calls - tally.forced
    with capsys.disabled():
        print(
            f"\n{right} of {len(tally.entries)} entries right ({right / len(tally.entries):.1%}); {tally.calls} calls: "
            f"{recorded} recorded ({recorded / tally.calls:.1%}), {tally.forced} computed at their line; "
            f"sizes of {tally.shapes_forced} of the recorded ones known only by running"
        )
    assert right / len(tally.entries) >= TARGET


def test_servers_know_what_is_recorded(tally: Tally) -> None:
    """Somebody has decided, for each operator, whether a server runs it; runs after the entries."""
    undecided = sorted(tally.operators - guardlists.allowed().keys() - guardlists.refused())
    assert not undecided, guardlists.undecided(undecided)
