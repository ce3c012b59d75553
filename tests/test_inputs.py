"""The forms that an input may have, and tokenizers of others."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nnsight_go import InputError, LanguageModel
from references import Pair, close, hooked, main

pytestmark = pytest.mark.usefixtures("nothing_stays")

TEXT = "The Eiffel Tower is in the city of"
OTHER = "Rome is a city"


def traced(pair: Pair, *args: Any, **kwargs: Any) -> torch.Tensor:
    with pair.model.trace(*args, **kwargs):
        return pair.model.lm_head.output.save()  # a return leaves the block as its end does


def padded(pair: Pair, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of rows padded on the left, and where they count."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return main(hooked(pair.hf, input_ids=ids, attention_mask=mask, position_ids=positions), "lm_head"), mask.bool()


def test_every_form_of_one_row(text_pair: Pair) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(text_pair.directory)
    ids = theirs(TEXT)["input_ids"]
    want = main(text_pair.run(ids), "lm_head")
    forms: list[Any] = [
        TEXT,
        [TEXT],
        (TEXT,),
        ids,
        tuple(ids),
        [ids],
        torch.tensor(ids),
        torch.tensor([ids]),
        torch.tensor([ids], dtype=torch.int32),
        [torch.tensor(ids)],
        np.array(ids),
        np.array([ids], dtype=np.int32),
        theirs(TEXT),
        theirs(TEXT, return_tensors="pt"),
        theirs([TEXT], return_tensors="np"),
        dict(theirs(TEXT)),
        {"input_ids": ids},
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))},
        text_pair.model.tokenizer(TEXT),
        text_pair.model.tokenizer([TEXT]),
        torch.nn.Embedding(2, 3).weight.new_tensor(ids, dtype=torch.long),
    ]
    for form in forms:
        close(traced(text_pair, form), want)
    for kwargs in (
        {"input_ids": ids},
        {"input_ids": torch.tensor([ids])},
        {"input_ids": [ids], "attention_mask": [[1] * len(ids)]},
        {"input_ids": ids, "use_cache": False, "return_dict": True},
        dict(theirs(TEXT, return_tensors="pt")),
    ):
        close(traced(text_pair, **kwargs), want)
    close(traced(text_pair, ids, attention_mask=[1] * len(ids)), want)


def test_forms_in_an_invoke(text_pair: Pair) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(text_pair.directory)
    outs = []
    with text_pair.model.trace() as tracer:
        for form in (TEXT, theirs(OTHER, return_tensors="pt"), {"input_ids": theirs(TEXT)["input_ids"]}):
            with tracer.invoke(form):
                outs.append(text_pair.model.lm_head.output.save())
        with tracer.invoke(input_ids=theirs(OTHER)["input_ids"]):
            outs.append(text_pair.model.lm_head.output.save())
    want = [main(text_pair.run(theirs(text)["input_ids"]), "lm_head") for text in (TEXT, OTHER)]
    for got, expected in zip(outs, [*want, *want], strict=True):
        close(got, expected)


def test_rows_of_different_lengths(text_pair: Pair) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(text_pair.directory, padding_side="left")
    rows = [theirs(text)["input_ids"] for text in (TEXT, OTHER)]
    want, real = padded(text_pair, rows)
    for form in ([TEXT, OTHER], rows, [torch.tensor(row) for row in rows], theirs([TEXT, OTHER])["input_ids"]):
        got = traced(text_pair, form)
        assert got.shape == want.shape
        close(got[real], want[real])
    batch = theirs([TEXT, OTHER], padding=True, return_tensors="pt")
    for got in (traced(text_pair, batch), traced(text_pair, **batch)):
        close(got[real], want[real])


def test_a_mask_hides_tokens(text_pair: Pair) -> None:
    ids = list(range(1, 8))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    want = main(text_pair.run(ids[2:]), "lm_head")
    for given in (mask, mask.tolist(), mask.bool(), mask.numpy(), mask[0].tolist()):
        close(traced(text_pair, ids, attention_mask=given)[:, 2:], want)


def test_a_mask_behind_and_in_between(text_pair: Pair) -> None:
    """Masked tokens on the right, and holes, as transformers treats them with the positions it makes."""
    ids = torch.tensor([list(range(1, 8)), list(range(11, 18))])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    want = main(hooked(text_pair.hf, input_ids=ids, attention_mask=mask, position_ids=positions), "lm_head")
    got = traced(text_pair, ids, attention_mask=mask)
    close(got[mask.bool()], want[mask.bool()])


def test_a_tokenizer_of_transformers(text_pair: Pair) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(text_pair.directory)
    model = LanguageModel(text_pair.directory, tokenizer=theirs)
    assert model.tokenizer is theirs
    with model.trace([TEXT, OTHER]):
        got = model.lm_head.output[:, -1].save()
    want, _ = padded(text_pair, [theirs(text)["input_ids"] for text in (TEXT, OTHER)])
    close(got, want[:, -1])


def test_a_tokenizer_of_another_directory(gpt2_pair: Pair, text_pair: Pair, tmp_path: pathlib.Path) -> None:
    for path in text_pair.directory.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    model = LanguageModel(tmp_path, tokenizer=str(text_pair.directory))
    with model.trace(TEXT):
        got = model.lm_head.output.save()
    close(got, traced(text_pair, TEXT))


def test_no_tokenizer(text_pair: Pair) -> None:
    model = LanguageModel(text_pair.directory, tokenizer=False)
    assert model.tokenizer is None
    with pytest.raises(InputError, match="without a tokenizer"):
        model.trace(TEXT)
    with model.trace([1, 2]):
        got = model.lm_head.output.save()
    close(got, main(text_pair.run([1, 2]), "lm_head"))
    model.tokenizer = text_pair.model.tokenizer
    with model.trace(TEXT):
        got = model.lm_head.output.save()
    close(got, traced(text_pair, TEXT))
