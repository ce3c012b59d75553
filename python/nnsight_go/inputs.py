"""What a trace can be given: text or token ids, one row or several, with or without a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from . import positions
from .errors import InputError
from .positions import here

Rows = list[list[int]]

_FORMS = "a text, a list of texts, token ids (a list, a list of lists or a tensor), or what a tokenizer gives"

# Arguments of a forward pass that change nothing in what the engine computes.
_IGNORED = {"use_cache", "return_dict", "output_attentions", "output_hidden_states", "token_type_ids", "labels"}

# Arguments of the tokenizer. Rows are always padded as far as they have to be, on the left.
_TOKENIZING = {"add_special_tokens", "max_length", "truncation"}
_PADDING = {"padding": (True, False, None, "longest"), "padding_side": (None, "left")}


def read(tokenizer: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Rows, Rows | None]:
    """Rows of token ids, and masks beside them where there are any.

    Args:
        tokenizer: gives the tokenizer, once text turns up.
        args: the input; at most one.
        kwargs: ``input_ids`` and ``attention_mask``, as a model of transformers takes them; and arguments
            of the tokenizer.

    Raises:
        InputError: it is empty, of an unknown form, or its parts do not fit each other.
    """
    if len(args) > 1:
        _refuse(
            f"{len(args)} inputs were given at once",
            "Give one of them, or a list; for several inputs side by side use `with tracer.invoke(...):` for each.",
        )
    given, kwargs = args[0] if args else None, dict(kwargs)
    if isinstance(given, Mapping):
        kwargs, given = {**given, **kwargs}, None
    options = {name: kwargs.pop(name) for name in _TOKENIZING & kwargs.keys()}
    for name in _PADDING.keys() & kwargs.keys():
        if kwargs.pop(name) not in _PADDING[name]:
            _refuse(f"rows are padded on the left, to the longest of them, not by {name}", "Leave it out.")
    unknown = set(kwargs) - {"input_ids", "attention_mask", *_IGNORED}
    if unknown:
        _refuse(
            f"a trace does not take {', '.join(sorted(unknown))}",
            f"It takes {_FORMS}; by name input_ids and attention_mask.",
        )
    if "input_ids" in kwargs:
        if given is not None:
            _refuse("both an input and input_ids were given", "Give one of them.")
        given = kwargs["input_ids"]
    if given is None:
        _refuse("there is no input", f"Give {_FORMS}.")
    rows = _rows(tokenizer, given, options)
    mask = kwargs.get("attention_mask")
    return rows, None if mask is None else _mask(mask, rows)


def _refuse(message: str, hint: str) -> NoReturn:
    raise InputError(message, hint=hint, **positions.fields(here()))


def _rows(tokenizer: Callable[[], Any], given: Any, options: dict[str, Any]) -> Rows:
    if isinstance(given, str):
        rows = [_encode(tokenizer(), given, options)]
    elif isinstance(given, list | tuple) and given and all(isinstance(x, str) for x in given):
        rows = [_encode(tokenizer(), text, options) for text in given]
    else:
        rows = _ids(given)
    if not rows:
        _refuse("the input is empty", f"Give {_FORMS}.")
    for i, row in enumerate(rows):
        if not row:
            which = f"row {i} of the input" if len(rows) > 1 else "the input"
            _refuse(f"{which} has no tokens", "Give at least one token: the tokenizer's bos_token, say.")
    return rows


def _encode(tokenizer: Any, text: str, options: dict[str, Any]) -> list[int]:
    if not text:
        _refuse("the prompt is an empty text", "Give at least one token: the tokenizer's bos_token, say.")
    return list(tokenizer(text, **options)["input_ids"])


def _ids(given: Any) -> Rows:
    """Rows out of lists, tensors and arrays of ints with one or two axes."""
    if isinstance(given, torch.Tensor) or (hasattr(given, "tolist") and hasattr(given, "dtype")):
        kind = str(given.dtype).removeprefix("torch.")
        if not kind.startswith(("int", "uint")):
            _refuse(f"token ids are integers, and this is a tensor of {kind}", f"Give {_FORMS}.")
        if given.ndim not in (1, 2):
            _refuse(
                f"token ids have sizes [batch, seq] or [seq], and these have {list(given.shape)}", f"Give {_FORMS}."
            )
        given = given.tolist()
    if isinstance(given, list | tuple):
        items: list[Any] = [x.tolist() if isinstance(x, torch.Tensor) else x for x in given]
        if all(_is_id(x) for x in items):
            return [[int(x) for x in items]] if items else []
        if all(isinstance(x, list | tuple) and all(map(_is_id, x)) for x in items):
            return [list(x) for x in items]
    _refuse(f"a {type(given).__name__} cannot be the input of a trace", f"Give {_FORMS}.")


def _is_id(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _mask(given: Any, rows: Rows) -> Rows:
    if hasattr(given, "tolist"):
        given = given.tolist()
    if given and not isinstance(given[0], list | tuple):
        given = [given]
    masked, tokens = [len(row) for row in given], [len(row) for row in rows]
    if masked != tokens:
        _refuse(
            f"the attention mask has rows of {masked} tokens, the input of {tokens}",
            "They must have the same sizes.",
        )
    return [[1 if x else 0 for x in row] for row in given]
