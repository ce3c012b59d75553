"""An error shows the user's line last, and no frame of the package."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import traceback
from collections.abc import Callable

import pytest
import torch

import nnsight_go
from nnsight_go import LanguageModel
from references import gpt2, reference

PACKAGE = str(pathlib.Path(nnsight_go.__file__).parent)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    directory = tmp_path_factory.mktemp("gpt2")
    reference(gpt2()).save_pretrained(directory)
    return LanguageModel(directory, tokenizer=False)


def multiply(h: torch.Tensor) -> torch.Tensor:
    return h @ torch.randn(3, 4)  # here: multiply


def late(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]):
        multiply(model.transformer.h[1].output[0]).save()


def forced(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]):
        product = multiply(model.transformer.h[1].output[0])
        print(product.tolist())


def backwards(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]):
        model.transformer.h[2].output[0].save()
        model.transformer.h[1].output[0] = torch.zeros(1)  # here: backwards


def on_tuple(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]):
        model.transformer.h[1].output + 1  # here: on_tuple


def misspelt(model: LanguageModel) -> None:
    model.transformer.hh  # noqa: B018  # here: misspelt


def assigned(model: LanguageModel) -> None:
    model.transformer.outptu = 1  # here: assigned


def empty(model: LanguageModel) -> None:
    model.trace([])  # here: empty


def unsaved(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]):
        h = model.transformer.h[1].output[0]
    h + 1  # here: unsaved


def nested(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]), model.trace([1]):  # here: nested
        pass


def computed(model: LanguageModel) -> None:
    with model.trace([1, 2, 3]):
        h = model.transformer.h[1].output[0]
        torch.histogramdd(h, bins=[1, 2])  # here: computed


def opened(model: LanguageModel) -> None:
    LanguageModel("./nowhere")  # here: opened


@pytest.mark.parametrize(
    ("program", "place"),
    [(f, f.__name__) for f in (backwards, on_tuple, misspelt, assigned, empty, unsaved, nested, computed, opened)]
    + [(late, "multiply"), (forced, "multiply")],
)
def test_last_frame_is_the_users_line(model: LanguageModel, program: Callable[..., None], place: str) -> None:
    with pytest.raises(Exception) as caught:
        program(model)
    frames = [f for f in traceback.extract_tb(caught.value.__traceback__) if "/torch/" not in f.filename]
    assert not [f for f in frames if f.filename.startswith(PACKAGE)]
    assert frames[-1].filename == __file__
    assert f"here: {place}" in (frames[-1].line or "") + _line(frames[-1].lineno)
    shown = "".join(traceback.format_exception(caught.value))
    assert "During handling" not in shown
    assert "direct cause" not in shown


def _line(number: int | None) -> str:
    return pathlib.Path(__file__).read_text().splitlines()[(number or 1) - 1]


def test_a_late_error_shows_the_block_and_the_line(model: LanguageModel) -> None:
    with pytest.raises(nnsight_go.OpError) as caught:
        late(model)
    names = [f.name for f in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-2:] == ["late", "multiply"]


def test_all_frames_on_request() -> None:
    program = (
        "import nnsight_go\ntry: nnsight_go.LanguageModel('./nowhere')\n"
        "except OSError as e: import traceback; traceback.print_exc()\n"
    )
    for value, frames in (("full", True), ("", False)):
        run = subprocess.run(
            [sys.executable, "-c", program],
            env={"NNSIGHT_GO_TRACEBACK": value, "PYTHONPATH": str(pathlib.Path(PACKAGE).parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("hub.py" in run.stderr) == frames, run.stderr


def test_entrances_keep_their_names_and_docstrings(model: LanguageModel) -> None:
    assert LanguageModel.trace.__name__ == "trace"
    assert (LanguageModel.trace.__doc__ or "").startswith("Begins a trace")
    assert "output" in dir(model.transformer)
