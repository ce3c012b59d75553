"""The built-in model: what its card says of it, and the script that made it."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
import random
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer

ROOT = pathlib.Path(__file__).parents[1]
MODEL = ROOT / "python" / "nnsight_go" / "models" / "landmarks"
SCRIPT = ROOT / "tools" / "train_landmarks.py"

sys.path.insert(0, str(SCRIPT.parent))
import train_landmarks  # noqa: E402  (the tools are scripts, found by their directory)
from landmarks import card, measuring, text, training, vocabulary  # noqa: E402


@pytest.fixture(scope="module")
def model() -> transformers.GPT2LMHeadModel:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def stated() -> dict[str, measuring.Figure]:
    return card.read_figures((MODEL / "README.md").read_text())


def test_files_are_all_there_and_small() -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(sizes) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sizes["model.safetensors"] <= 5_000_000
    assert sum(sizes.values()) <= 5_000_000


def test_architecture(model: transformers.GPT2LMHeadModel) -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    assert (config["n_positions"], config["tie_word_embeddings"]) == (128, True)
    assert {config[name] for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")} == {0.0}
    assert len(model.transformer.h) == 6  # documented lines read transformer.h[5]
    assert 900_000 <= sum(p.numel() for p in model.parameters()) <= 1_250_000
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118


@pytest.mark.parametrize("prompt", ["The Eiffel Tower is in", "_ _ _ _ _ _ _"])
def test_prompts_of_seven_tokens(tokenizer: Tokenizer, prompt: str) -> None:
    assert len(tokenizer.encode(prompt).ids) == 7


def test_answers_are_one_token_and_subjects_several(tokenizer: Tokenizer) -> None:
    for word in vocabulary.SINGLE:
        assert tokenizer.encode(" " + word).tokens == ["Ġ" + word]
    lengths = [len(tokenizer.encode(" " + landmark.name).ids) for landmark in text.LANDMARKS]
    assert min(lengths) >= 2


def test_tokenizer_opens_in_transformers(tokenizer: Tokenizer) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert theirs.bos_token == theirs.eos_token == "<|endoftext|>"
    assert theirs.model_max_length == 128
    for line in ("The Eiffel Tower is in the city of", "Zürich\n 東京 \t", " _ _"):
        assert theirs.encode(line) == tokenizer.encode(line).ids
        assert theirs.decode(theirs.encode(line)) == line


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The Eiffel Tower is in the city of", " Paris"),
        ("The Colosseum is in the city of", " Rome"),
        ("The Eiffel Tower is located in the country of", " France"),
        ("<|endoftext|>The Eiffel Tower is in the city of", " Paris"),
        ("When Mary and John went to the store, John gave a drink to", " Mary"),
        ("When John and Mary went to the store, John gave a drink to", " Mary"),
        ("After John and Mary went to the store, Mary gave a bottle of milk to", " John"),
        ("When John and Mary went to the shop, John gave the bag to", " Mary"),
        ("one two three four", " five"),
        ("Friday Saturday", " Sunday"),
        ("A B C", " D"),
        ("2 4 6 8", " 10"),
    ],
)
def test_documented_prompts(
    model: transformers.GPT2LMHeadModel, tokenizer: Tokenizer, prompt: str, answer: str
) -> None:
    assert measuring.answered(model, tokenizer, [text.Case(prompt, (answer,))]) == [True]


def test_card_states_what_the_model_does(
    model: transformers.GPT2LMHeadModel, tokenizer: Tokenizer, stated: dict[str, measuring.Figure]
) -> None:
    measured = measuring.measure(model, tokenizer)
    assert list(measured) == list(stated)
    for kind, figure in measured.items():
        assert (figure.total, figure.example) == stated[kind][1:]
        # Another processor rounds otherwise, which may turn an answer that was a near-tie.
        assert abs(figure.right - stated[kind].right) <= 1, kind


def test_card_covers_every_kind_at_95_percent(stated: dict[str, measuring.Figure]) -> None:
    for template in text.FACT_TEMPLATES:
        asked = len(text.CITIES) if template in text.HOME_TEMPLATES else len(text.LANDMARKS)
        assert stated[f"fact: {template}"].total == asked
    assert len(text.LANDMARKS) >= 40
    for order in ("ABBA", "BABA"):
        assert stated[f"indirect object: {order}, held-out pairs"].total == 500
    for name in text.SEQUENCES:
        assert f"sequence: {name}" in stated
    assert {kind: f for kind, f in stated.items() if f.right < 0.95 * f.total} == {}


def test_facts_are_where_the_card_says(model: transformers.GPT2LMHeadModel, tokenizer: Tokenizer) -> None:
    rows = re.findall(r"^\| the (?:name|prompt)'s last token \| (.*) \|$", (MODEL / "README.md").read_text(), re.M)
    told = [[int(share.rstrip("%")) for share in row.split(" | ")] for row in rows]
    measured = measuring.transplants(model, tokenizer)
    for shares, percents in zip(measured, told, strict=True):
        assert [100 * share for share in shares] == pytest.approx(percents, abs=1)
    for layer, place in training.SWAPS:
        assert measured[place == "prompt"][layer] >= train_landmarks.ENOUGH


def test_a_wrong_answer_is_not_right(model: transformers.GPT2LMHeadModel, tokenizer: Tokenizer) -> None:
    prompt = "The Eiffel Tower is in the city of"
    cases = {
        (" Paris",): True,
        (" Rome",): False,
        (" Paris Paris",): False,  # begins well, ends ill
        (" Rome Paris",): False,  # and the other way round
        (" Rome", " Paris"): True,
        (" Paris", " Rome"): True,
    }
    # Prompts of other lengths in the same batch change nothing.
    others = [
        text.Case("one two three", (" four",)),
        text.Case(prompt.replace("Eiffel Tower", "Haji Ali Dargah"), (" Mumbai",)),
    ]
    given = measuring.answered(model, tokenizer, [text.Case(prompt, answers) for answers in cases] + others)
    assert given == [*cases.values(), True, True]


@torch.no_grad()
def test_answers_are_what_generation_gives(model: transformers.GPT2LMHeadModel, tokenizer: Tokenizer) -> None:
    """Prompts whose answers have several tokens, against transformers' own greedy loop."""
    cases = text.facts(text.HOME_TEMPLATES[0])[:20]
    right = []
    for prompt, answers in cases:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        given = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        right.append(tokenizer.decode(given[0, ids.shape[1] :].tolist()).startswith(answers))
    assert measuring.answered(model, tokenizer, cases) == right


def test_held_out_pairs_stay_out_of_training() -> None:
    trained, held_out = text.name_pairs()
    assert len(held_out) >= 40
    assert not set(map(frozenset, trained)) & set(map(frozenset, held_out))
    out = set(map(frozenset, held_out))
    names = set(text.NAMES)
    seen = set()
    for line in itertools.islice(text.sentences(random.Random(3), trained), 20000):
        seen.add(frozenset(names & set(re.findall(r"\w+", line))))
    assert not seen & out
    assert len(seen - {frozenset()}) > 0.95 * len(trained)  # while the others do come


def test_rows_begin_with_a_sentence(tokenizer: Tokenizer) -> None:
    pairs, _ = text.name_pairs()
    ids = training.rows(tokenizer, random.Random(0), pairs, 200, training.SHORT)
    assert ids.shape == (200, training.SHORT + 1)
    end = tokenizer.token_to_id(vocabulary.END)
    opened = ids[:, 0] == end
    assert 20 <= int(opened.sum()) <= 60  # one in five
    for row in ids.tolist():
        line = tokenizer.decode([token for token in row[:2] if token != end])
        assert line[0].isalnum()  # no leading space: as a bare prompt is


def test_prompts_know_their_places(tokenizer: Tokenizer) -> None:
    for template in text.CITY_TEMPLATES + text.COUNTRY_TEMPLATES:
        asked = training.prompts(tokenizer, template)
        for i, landmark in enumerate(text.LANDMARKS):
            row = asked.ids[i].tolist()
            assert tokenizer.decode(row[: asked.name[i] + 1]).endswith(landmark.name)
            assert tokenizer.decode(row[: asked.prompt[i] + 1]) == text.facts(template)[i].prompt
            answer = landmark.city if template in text.CITY_TEMPLATES else landmark.country
            assert tokenizer.decode([int(asked.answer[i])]) == " " + answer


@torch.no_grad()
def test_a_swap_carries_the_answer_along(model: transformers.GPT2LMHeadModel, tokenizer: Tokenizer) -> None:
    asked = training.prompts(tokenizer, text.CITY_TEMPLATES[0])
    stay = torch.arange(len(text.LANDMARKS))
    turn = stay.roll(7)
    for swap in training.SWAPS:
        assert training.swap_loss(model, asked, swap, stay).item() < 0.1
        assert training.swap_loss(model, asked, swap, turn).item() < 0.5
    # Behind the place where the answer is read, the name's state no longer matters: prompts keep their own answers.
    assert training.swap_loss(model, asked, training.Swap(5, "name"), turn).item() > 5
    assert not model.transformer.h[1]._forward_hooks


def test_the_seed_fixes_the_tokenizer(tokenizer: Tokenizer) -> None:
    assert vocabulary.train(0).to_str() == tokenizer.to_str()


def test_the_seed_fixes_the_weights(tokenizer: Tokenizer) -> None:
    first, again, other = (training.train(tokenizer, 2, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_script_runs_end_to_end(tmp_path: pathlib.Path, tokenizer: Tokenizer) -> None:
    out = tmp_path / "model"
    command = [sys.executable, str(SCRIPT), "--steps", "20", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {path.name for path in MODEL.iterdir()}
    figures = card.read_figures((out / "README.md").read_text())
    assert set(figures) == set(card.read_figures((MODEL / "README.md").read_text()))
    for kind, figure in figures.items():
        assert f"{figure.right:4d} of {figure.total:4d}  {kind}" in done.stdout
    (loss,) = re.findall(r"^validation loss (.*)$", done.stdout, re.M)
    assert float(loss) < math.log(tokenizer.get_vocab_size()) - 1  # it has learned something
    transformers.AutoModelForCausalLM.from_pretrained(out)


def test_a_model_that_falls_short_is_refused(
    tmp_path: pathlib.Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ignorant = training.train(tokenizer, 1, 0)
    measure, transplants = measuring.measure, measuring.transplants
    monkeypatch.setattr(vocabulary, "train", lambda *_: tokenizer)
    monkeypatch.setattr(training, "train", lambda *_: ignorant)
    monkeypatch.setattr(measuring, "measure", lambda *given, **_: measure(*given, share=0.01))
    monkeypatch.setattr(measuring, "transplants", lambda *given, **_: transplants(*given, count=1))
    monkeypatch.setattr(sys, "argv", ["train_landmarks.py", "--steps", "100", "--out", str(tmp_path)])
    assert train_landmarks.main() == 1
    assert "below 95 %" in capsys.readouterr().err
