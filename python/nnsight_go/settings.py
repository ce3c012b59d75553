"""What ``generate`` can be told, with transformers' names and defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import positions
from .drawing import OPTIONS
from .errors import InputError
from .positions import here

# Without a word about it, as many new tokens as transformers makes.
DEFAULT_NEW_TOKENS = 20

_PLAIN = frozenset(
    """max_new_tokens max_length min_new_tokens min_length do_sample temperature top_k top_p min_p typical_p
    repetition_penalty no_repeat_ngram_size eos_token_id pad_token_id
    num_return_sequences stop_strings
    num_beams length_penalty early_stopping""".split()
)

# Settings that mean nothing here, or whose default value is the only one there is.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "bos_token_id": (),
    "use_cache": (True, None),
    "return_dict_in_generate": (False, None),
    "output_hidden_states": (False, None),
    "output_attentions": (False, None),
    "transformers_version": (),
    "_from_model_config": (),
}


def collect(given: Mapping[str, Any], directory: Path, prompt: int) -> dict[str, Any]:
    """The engine's settings: those given, over the model's ``generation_config.json``, over the defaults.

    Args:
        given: what ``generate`` was called with.
        directory: of the model.
        prompt: tokens of the longest prompt.

    Raises:
        InputError: a setting is not known or cannot be used.
    """
    file = directory / "generation_config.json"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    for name, value in given.items():
        if name in _PLAIN or (name in _HARMLESS and (not _HARMLESS[name] or value in _HARMLESS[name])):
            continue
        known = ", ".join(sorted(_PLAIN | OPTIONS))
        what = f"{name}={value!r}" if name in _HARMLESS else name
        raise InputError(
            f"generate does not take {what} in this version", hint=f"It takes {known}.", **positions.fields(here())
        )
    chosen = {k: v for k, v in stored.items() if k in _PLAIN} | {k: v for k, v in given.items() if v is not None}
    lengths = {k for k in ("max_new_tokens", "max_length") if given.get(k) is not None}
    if "max_new_tokens" in lengths or "max_length" not in chosen:
        new = chosen.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    else:
        new = chosen["max_length"] - prompt
    least = max(chosen.get("min_new_tokens") or 0, (chosen.get("min_length") or 0) - prompt)
    check_new_tokens(new, prompt)
    ends = ids_of(chosen.get("eos_token_id"))
    sample = bool(chosen.get("do_sample", False))
    returned = int(_number(chosen, "num_return_sequences", 1))
    beams = int(_number(chosen, "num_beams", 1))
    early = chosen.get("early_stopping") or False
    if beams < 1 or early not in (True, False, "never"):
        what = f"num_beams={beams}" if beams < 1 else f"early_stopping={early!r}"
        raise InputError(
            f"{what} says nothing about a beam search",
            hint="Give num_beams, 1 or more, and early_stopping=True, False or 'never'.",
            **positions.fields(here()),
        )
    if returned < 1 or (returned > 1 and not sample and beams == 1):
        why = "rows of a prompt would all be the same" if returned > 1 else "there is no such number of rows"
        raise InputError(
            f"num_return_sequences={returned}: {why}",
            hint="Sample them, do_sample=True, or give num_beams." if returned > 1 else "Give 1 or more.",
            **positions.fields(here()),
        )
    return {
        "max_new_tokens": new,
        "min_new_tokens": least,
        "eos_token_id": ends,
        "pad_token_id": padding(chosen.get("pad_token_id"), ends),
        "do_sample": sample,
        "num_return_sequences": returned,
        "num_beams": beams,
        "length_penalty": _number(chosen, "length_penalty", 1.0),
        "early_stopping": str(early).lower(),
        "stop_strings": chosen.get("stop_strings"),
        "temperature": _number(chosen, "temperature", 1.0),
        "top_k": int(_number(chosen, "top_k", 50 if sample else 0)),
        "top_p": _number(chosen, "top_p", 1.0),
        "min_p": _number(chosen, "min_p", 0.0),
        "typical_p": _number(chosen, "typical_p", 1.0),
        "repetition_penalty": _number(chosen, "repetition_penalty", 1.0),
        "no_repeat_ngram_size": int(_number(chosen, "no_repeat_ngram_size", 0)),
    }


def check_new_tokens(new: Any, prompt: int) -> None:
    """Raises where ``new`` is no number of tokens to come behind a prompt of so many."""
    if not isinstance(new, int) or new < 1:
        raise InputError(
            f"{new} new tokens were asked for (the longest prompt has {prompt})",
            hint="Give max_new_tokens, the number of tokens to come behind the prompt.",
            **positions.fields(here()),
        )


def ids_of(eos: Any) -> list[int]:
    """The tokens that end a row, of a setting that is one, several or None."""
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def padding(pad: int | None, ends: list[int]) -> int:
    """What fills rows that are short or have ended: the first token that ends one, where nobody has said what."""
    return pad if pad is not None else ends[0] if ends else 0


def _number(chosen: Mapping[str, Any], name: str, default: float) -> float:
    value = chosen.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} is a number, not {value!r}", **positions.fields(here()))
    return value
