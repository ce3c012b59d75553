"""The tokenizer of a model: what Hugging Face users expect of ``model.tokenizer``, on the engine's tokenizer.

The work is done by ``nng_tokenizer_*`` (``capi/nng.h``); this module adds what belongs to Python:
batches, padding, truncation, tensors and chat templates. Names, arguments and results are those of
transformers' tokenizers; ids, tokens, offsets and texts are equal to theirs.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

from . import _ffi, chat
from .errors import TokenizerError

Side: TypeAlias = Literal["left", "right"]

# What transformers gives as model_max_length where a model has no limit.
NO_LIMIT = int(1e30)

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# What save_pretrained copies.
_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

# The padding of each column of a batch; input_ids take the pad token.
_FILL: dict[str, Any] = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1, "offset_mapping": (0, 0)}


class BatchEncoding(dict[str, Any]):
    """Encoded texts: a dict (``input_ids``, ``attention_mask``, ...) whose entries are attributes too.

    The values are lists of ints for one text, lists of lists for a list of texts, or tensors of
    dtype int64 and shape ``[batch, seq]``.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this encoding has no {name!r}; it has {', '.join(self) or 'nothing'}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchEncoding, (dict(self),)

    def to(self, device: Any, *, non_blocking: bool = False) -> BatchEncoding:
        """Moves the tensors to a device, in place, and returns self."""
        for key, value in self.items():
            if hasattr(value, "to"):
                self[key] = value.to(device, non_blocking=non_blocking)
        return self

    def convert_to_tensors(self, tensor_type: str | None = "pt") -> BatchEncoding:
        """Turns lists into tensors ("pt") or arrays ("np"), in place, and returns self."""
        for key, value in self.items():
            self[key] = _tensor(value, tensor_type, key)
        return self


class _Binding:
    """The C functions; ``argtypes`` stand beside the class that uses them."""

    def __init__(self) -> None:
        lib = _ffi.lib()
        handle, buf, i64, i32 = ctypes.c_uint64, ctypes.POINTER(_ffi.Buf), ctypes.c_int64, ctypes.c_int32
        ids = ctypes.POINTER(ctypes.c_int64)
        for name, arguments in {
            "open": [ctypes.c_char_p, ctypes.POINTER(handle), buf],
            "close": [handle, buf],
            "describe": [handle, buf, buf],
            "encode": [handle, ctypes.c_char_p, i64, i32, buf, buf],
            "ids": [handle, ctypes.c_char_p, i64, i32, buf, buf],
            "decode": [handle, ids, i64, i32, buf, buf],
            "tokens": [handle, ids, i64, buf, buf],
            "lookup": [handle, ctypes.c_char_p, buf, buf],
            "vocab": [handle, buf, buf],
        }.items():
            function = getattr(lib, "nng_tokenizer_" + name)
            function.argtypes, function.restype = arguments, ctypes.c_int
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class _Native:
    """An open tokenizer of the engine. Closing is idempotent and happens by itself when nobody holds it."""

    def __init__(self, directory: str) -> None:
        self._c = _Binding()
        handle = ctypes.c_uint64()
        _ffi.check(self._c.open, os.fsencode(directory), ctypes.byref(handle))
        self._handle = handle.value
        self.close: Callable[[], Any] = weakref.finalize(self, _close, self._c, handle.value)
        self.description: dict[str, Any] = json.loads(_ffi.call(self._c.describe, self._handle))

    def encode(self, text: str, special: bool) -> dict[str, Any]:
        data = text.encode()
        return cast(dict[str, Any], json.loads(_ffi.call(self._c.encode, self._handle, data, len(data), special)))

    def ids(self, text: str, special: bool) -> list[int]:
        data = text.encode()
        return memoryview(_ffi.call(self._c.ids, self._handle, data, len(data), special)).cast("q").tolist()

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return _ffi.call(self._c.decode, self._handle, _array(ids), len(ids), skip_special).decode()

    def tokens(self, ids: Sequence[int]) -> list[str | None]:
        return cast(list[str | None], json.loads(_ffi.call(self._c.tokens, self._handle, _array(ids), len(ids))))

    def lookup(self, tokens: Sequence[str]) -> list[int | None]:
        return cast(list[int | None], json.loads(_ffi.call(self._c.lookup, self._handle, _json(tokens))))

    def vocab(self) -> dict[str, int]:
        return cast(dict[str, int], json.loads(_ffi.call(self._c.vocab, self._handle)))


def _close(c: _Binding, handle: int) -> None:
    # In a forked child the library refuses, and the parent's handle is not the child's to close: nothing is lost.
    error = _ffi.Buf()
    c.close(handle, ctypes.byref(error))
    _ffi.lib().nng_free(ctypes.byref(error))


def _array(ids: Sequence[int]) -> Any:
    try:
        return (ctypes.c_int64 * len(ids))(*ids)
    except TypeError:
        raise TypeError(f"token ids must be ints, not {ids!r}") from None


def _json(tokens: Sequence[str]) -> bytes:
    return json.dumps(list(tokens), ensure_ascii=False).encode()


class _Token:
    """A special token by its part: ``bos_token`` and kin. None where there is none; settable to any token of the
    vocabulary."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name

    def __get__(self, tokenizer: Tokenizer | None, owner: type) -> str | None:
        entry = tokenizer._special.get(self._role) if tokenizer is not None else None
        return entry[0] if entry else None

    def __set__(self, tokenizer: Tokenizer, token: str | None) -> None:
        tokenizer._set_token(self._role, token)


class _TokenId:
    """The id of a special token: ``bos_token_id`` and kin. None where there is none; settable like the token."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._role = name.removesuffix("_id")

    def __get__(self, tokenizer: Tokenizer | None, owner: type) -> int | None:
        entry = tokenizer._special.get(self._role) if tokenizer is not None else None
        return entry[1] if entry else None

    def __set__(self, tokenizer: Tokenizer, id: int | None) -> None:
        token = None if id is None else tokenizer._native.tokens([id])[0]
        if id is not None and token is None:
            raise TokenizerError(f"{self._role}_id cannot be {id}: the vocabulary has {len(tokenizer)} tokens")
        tokenizer._set_token(self._role, token)


class Tokenizer:
    """The tokenizer of a model directory.

    ``padding_side`` is "left" unless told otherwise, so that the last position is the last token of
    every prompt, as in nnsight; None takes what the model's configuration says. A tokenizer without
    a pad token pads with its eos token.

    Copies and pickles hold the directory and open it again. Any number of threads may use one.

    Raises TokenizerError if a file is missing or broken; the message names it.
    """

    is_fast = True

    bos_token = _Token()
    eos_token = _Token()
    unk_token = _Token()
    sep_token = _Token()
    pad_token = _Token()
    cls_token = _Token()
    mask_token = _Token()
    bos_token_id = _TokenId()
    eos_token_id = _TokenId()
    unk_token_id = _TokenId()
    sep_token_id = _TokenId()
    pad_token_id = _TokenId()
    cls_token_id = _TokenId()
    mask_token_id = _TokenId()

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        padding_side: Side | None = "left",
        name_or_path: str | None = None,
    ) -> None:
        self._directory = os.path.abspath(os.fspath(directory))
        self._native = _Native(self._directory)
        about = self._native.description
        self.name_or_path = name_or_path if name_or_path is not None else os.fspath(directory)
        self.padding_side = padding_side or about["padding_side"]
        self.truncation_side = about["truncation_side"]
        self.model_max_length: int = about["model_max_length"] or NO_LIMIT
        self.clean_up_tokenization_spaces: bool = about["clean_up_tokenization_spaces"]
        # Whether a text gets a bos token before it, and an eos token after it.
        self.add_bos_token: bool = about["add_bos_token"]
        self.add_eos_token: bool = about["add_eos_token"]
        self.model_input_names: list[str] = about["model_input_names"] or ["input_ids", "attention_mask"]
        templates: dict[str, str] = about["chat_templates"] or {}
        self.chat_template: str | dict[str, str] | None = (
            templates if len(templates) > 1 else next(iter(templates.values()), None)
        )
        special: dict[str, Any] = about["special_tokens"]
        self._special: dict[str, tuple[str, int]] = {
            role: (special[role]["token"], special[role]["id"]) for role in _ROLES if role in special
        }
        self.additional_special_tokens: list[str] = [
            entry["token"] for entry in special.get("additional_special_tokens") or []
        ]
        self._added: dict[int, dict[str, Any]] = {entry["id"]: entry for entry in about["added_tokens"] or []}
        if "pad_token" not in self._special and "eos_token" in self._special:
            self._special["pad_token"] = self._special["eos_token"]

    # ---- sides ----

    @property
    def padding_side(self) -> Side:
        """Where padding goes: "left" or "right"."""
        return self._padding_side

    @padding_side.setter
    def padding_side(self, side: Side) -> None:
        self._padding_side = _side("padding_side", side)

    @property
    def truncation_side(self) -> Side:
        """Which end is cut off: "left" or "right"."""
        return self._truncation_side

    @truncation_side.setter
    def truncation_side(self, side: Side) -> None:
        self._truncation_side = _side("truncation_side", side)

    # ---- vocabulary ----

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary without added tokens."""
        return cast(int, self._native.description["vocab_size"])

    def __len__(self) -> int:
        """The size of the vocabulary with added tokens."""
        return cast(int, self._native.description["len"])

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """The whole vocabulary, added tokens included: token to id."""
        return self._native.vocab()

    @property
    def vocab(self) -> dict[str, int]:
        """As ``get_vocab()``."""
        return self.get_vocab()

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens: token to id."""
        return {entry["content"]: id for id, entry in self._added.items()}

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or a list of ids; the unk token's id (or None) where the vocabulary has none."""
        if isinstance(tokens, str):
            return self.convert_tokens_to_ids([tokens])[0]
        unknown = self.unk_token_id
        return [unknown if id is None else id for id in self._native.lookup(list(tokens))]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or a list of tokens, as they stand in the vocabulary; None where there is none."""
        values = _values(ids)
        if isinstance(values, int):
            return self._native.tokens([values])[0]
        if skip_special_tokens:
            special = set(self.all_special_ids)
            values = [id for id in values if id not in special]
        return self._native.tokens(values)

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens of the vocabulary."""
        ids = self._native.lookup(tokens)
        for token, id in zip(tokens, ids, strict=True):
            if id is None:
                raise TokenizerError(f"the token {token!r} is not in the vocabulary")
        return self._native.decode(cast(list[int], ids), False)

    # ---- special tokens ----

    def _set_token(self, role: str, token: str | None) -> None:
        if token is None:
            self._special.pop(role, None)
            return
        id = self._native.lookup([str(token)])[0]
        if id is None:
            raise TokenizerError(
                f"{role} cannot be {token!r}: it is not in the vocabulary, and a model has no embedding for a new token"
            )
        self._special[role] = (str(token), id)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens: "bos_token", "eos_token", ... to token."""
        return {role: self._special[role][0] for role in _ROLES if role in self._special}

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token once, the named ones first."""
        named = [self._special[role][0] for role in _ROLES if role in self._special]
        return list(dict.fromkeys(named + self.additional_special_tokens))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of ``all_special_tokens``."""
        return cast(list[int], self.convert_tokens_to_ids(self.all_special_tokens))

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """The ids of ``additional_special_tokens``."""
        return cast(list[int], self.convert_tokens_to_ids(self.additional_special_tokens))

    def add_special_tokens(self, special_tokens_dict: Mapping[str, str]) -> int:
        """Names special tokens that the vocabulary already has (``{"pad_token": "<pad>"}``); returns 0, the number of
        tokens added. New tokens are refused: the model has no embedding for them."""
        for role, token in special_tokens_dict.items():
            if role not in _ROLES:
                raise TokenizerError(f"{role!r} is not one of {', '.join(_ROLES)}")
            self._set_token(role, token)
        return 0

    # ---- text to ids ----

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: Side | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Encodes a text, or a list of texts.

        ``padding``: True or "longest" (to the longest of the batch), "max_length", or False.
        ``truncation``: True cuts to ``max_length``, or to ``model_max_length`` without one; so does
        a ``max_length`` alone. ``return_tensors``: "pt", "np" or None for lists.
        ``return_offsets_mapping`` gives (start, end) of each token in characters of the text.
        """
        if isinstance(text, str):
            texts, single = [text], True
        elif isinstance(text, Sequence) and all(isinstance(one, str) for one in text):
            texts, single = list(text), False
        else:
            raise TypeError(f"the tokenizer takes a str or a list of str, not {_name(text)}")
        if truncation is None:
            truncation = max_length is not None and padding is False
        limit = None
        if truncation not in (False, "do_not_truncate"):
            limit = max_length if max_length is not None else _limited(self.model_max_length)
        if return_token_type_ids is None:
            return_token_type_ids = "token_type_ids" in self.model_input_names
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        details = return_token_type_ids or return_special_tokens_mask or return_offsets_mapping

        batch = BatchEncoding(input_ids=[])
        if return_token_type_ids:
            batch["token_type_ids"] = []
        if return_attention_mask:
            batch["attention_mask"] = []
        if return_special_tokens_mask:
            batch["special_tokens_mask"] = []
        if return_offsets_mapping:
            batch["offset_mapping"] = []
        if return_length:
            batch["length"] = []
        for one in texts:
            row = self._encode(one, add_special_tokens, limit, details)
            for key in batch:
                batch[key].append(row[key] if key in row else _derived(key, row["input_ids"]))
        self._pad(batch, padding, max_length, pad_to_multiple_of, padding_side)
        if return_length:
            batch["length"] = [len(row) for row in batch["input_ids"]]
        if return_tensors is not None:
            return batch.convert_to_tensors(return_tensors)
        if single:
            # As in transformers, the batch goes from the lists alone: "length" stays a list of one.
            return BatchEncoding({key: value if key == "length" else value[0] for key, value in batch.items()})
        return batch

    def _encode(self, text: str, special: bool, limit: int | None, details: bool) -> dict[str, list[Any]]:
        """One text's columns, cut to limit tokens; only input_ids where no details are asked for."""
        if not details:
            ids = self._native.ids(text, special)
            if limit is None or len(ids) <= limit:
                return {"input_ids": ids}
        encoding = self._native.encode(text, special)
        columns: dict[str, list[Any]] = {
            "input_ids": encoding["ids"],
            "token_type_ids": encoding["type_ids"],
            "special_tokens_mask": encoding["special_tokens_mask"],
            "offset_mapping": [tuple(pair) for pair in encoding["offsets"]],
        }
        if limit is None or len(encoding["ids"]) <= limit:
            return columns
        # Only the text is cut, never what the post-processor put around it.
        mask = encoding["special_tokens_mask"]
        head = next((i for i, put in enumerate(mask) if not put), len(mask))
        tail = next((i for i, put in enumerate(reversed(mask[head:])) if not put), 0)
        keep = limit - head - tail
        if keep < 0:
            raise TokenizerError(
                f"max_length is {limit}, and the tokenizer adds {head + tail} special tokens to a text"
            )
        end = len(mask) - tail
        middle = slice(head, head + keep) if self.truncation_side == "right" else slice(end - keep, end)
        return {key: column[:head] + column[middle] + column[end:] for key, column in columns.items()}

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        **options: Any,
    ) -> Any:
        """The ids of a text: a list of ints, or a tensor ``[1, seq]`` of int64 with ``return_tensors="pt"``.

        ``options`` are those of a call (truncation, max_length, padding, ...).
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes a str, not {_name(text)}; call the tokenizer for a list of texts")
        return self(
            text,
            add_special_tokens=add_special_tokens,
            return_tensors=return_tensors,
            return_attention_mask=False,
            return_token_type_ids=False,
            **options,
        )["input_ids"]

    def tokenize(self, text: str, *, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text, as they stand in the vocabulary."""
        return cast(list[str], self._native.encode(text, add_special_tokens)["tokens"])

    # ---- ids to text ----

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """The text of ids: an int, a list, a tensor or an encoding. A list of lists, or a tensor of two dimensions,
        gives a list of texts.

        Raises TokenizerError if an id is not in the vocabulary.
        """
        ids = _values(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        text = self._native.decode(ids, skip_special_tokens)
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        # The rules are WordPiece's; in BPE texts they would take spaces that were written.
        if clean and self._native.description["model"] != "BPE":
            for old, new in _CLEAN:
                text = text.replace(old, new)
        return text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """As ``decode``, always a list."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    # ---- batches ----

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: Side | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pads encodings: one, or a list of encodings of single texts, or one of a list of texts."""
        if isinstance(encoded_inputs, Mapping):
            columns = {key: _values(value) for key, value in encoded_inputs.items()}
        else:
            rows = list(encoded_inputs)
            columns = {key: [_values(row[key]) for row in rows] for key in (rows[0] if rows else {})}
        if "input_ids" not in columns:
            raise ValueError(f"there are no input_ids to pad, only {', '.join(columns) or 'nothing'}")
        batched = not columns["input_ids"] or isinstance(columns["input_ids"][0], list)
        batch = BatchEncoding(columns if batched else {key: [value] for key, value in columns.items()})
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        if return_attention_mask and "attention_mask" not in batch:
            batch["attention_mask"] = [[1] * len(row) for row in batch["input_ids"]]
        self._pad(batch, padding, max_length, pad_to_multiple_of, padding_side)
        if return_tensors is not None:
            return batch.convert_to_tensors(return_tensors)
        return batch if batched else BatchEncoding({key: value[0] for key, value in batch.items()})

    def _pad(
        self, batch: BatchEncoding, padding: bool | str, max_length: int | None, multiple: int | None, side: Side | None
    ) -> None:
        """Pads every column of the batch, in place."""
        if padding is False or padding == "do_not_pad":
            return
        if padding is True or padding == "longest":
            length = max((len(row) for row in batch["input_ids"]), default=0)
        elif padding == "max_length":
            limit = max_length if max_length is not None else _limited(self.model_max_length)
            if limit is None:
                return  # as transformers: a model without a limit has no length to pad to
            length = limit
        else:
            raise ValueError(f'padding must be True, False, "longest" or "max_length", not {padding!r}')
        if multiple:
            length = -(-length // multiple) * multiple
        if self.pad_token_id is None and any(len(row) < length for row in batch["input_ids"]):
            raise TokenizerError(
                f"{self.name_or_path} has no pad token and no eos token, so texts of different lengths cannot be "
                f"padded. Choose one: tokenizer.pad_token = {self.convert_ids_to_tokens(0)!r}"
            )
        left = _side("padding_side", side or self.padding_side) == "left"
        for key, column in batch.items():
            fill = self.pad_token_id if key == "input_ids" else _FILL.get(key)
            if key != "input_ids" and key not in _FILL:
                continue
            for i, row in enumerate(column):
                missing = [fill] * (length - len(row))
                column[i] = missing + row if left else row + missing

    # ---- chats ----

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """The template for a chat: the one given (source, or the name of one of the model's), or the model's own."""
        known = self.chat_template
        if isinstance(known, dict):
            if chat_template is None:
                chat_template = "tool_use" if tools is not None and "tool_use" in known else "default"
                if chat_template not in known:
                    raise TokenizerError(
                        f"{self.name_or_path} has no default chat template; choose one with chat_template=: "
                        f"{', '.join(sorted(known))}"
                    )
            return known.get(chat_template, chat_template)
        if chat_template is not None:
            return chat_template
        if known is None:
            raise TokenizerError(
                f"{self.name_or_path} has no chat template. Pass one (chat_template=...), or write the prompt as text"
            )
        return known

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A conversation (a list of ``{"role": ..., "content": ...}``), or a list of them, as a model reads it.

        Gives a ``BatchEncoding``; its ``input_ids`` alone with ``return_dict=False``; the text with
        ``tokenize=False``. ``kwargs`` are variables of the template.
        """
        template = self.get_chat_template(chat_template, tools)
        if len(conversation) == 0:
            raise ValueError("the conversation is empty; it needs at least one message")
        batched = isinstance(conversation[0], (list, tuple))
        texts = [
            chat.render(
                template,
                messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **{**self.special_tokens_map, **kwargs},
            )
            for messages in (conversation if batched else [conversation])
        ]
        if not tokenize:
            return texts if batched else texts[0]
        encoding = self(
            texts if batched else texts[0],
            add_special_tokens=False,  # the template writes them
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
            **dict(tokenizer_kwargs or {}),
        )
        return encoding if return_dict else encoding["input_ids"]

    # ---- the object ----

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Writes the tokenizer's files into a directory, with special tokens and sides as they are now."""
        os.makedirs(save_directory, exist_ok=True)
        saved = []
        for name in _FILES:
            source, target = os.path.join(self._directory, name), os.path.join(save_directory, name)
            if os.path.exists(source):
                if not (os.path.exists(target) and os.path.samefile(source, target)):
                    shutil.copyfile(source, target)
                saved.append(target)
        config: dict[str, Any] = {}
        source = os.path.join(self._directory, "tokenizer_config.json")
        if os.path.exists(source):
            with open(source, encoding="utf-8") as file:
                config = json.load(file)
        config.update(self.special_tokens_map)
        config.update(padding_side=self.padding_side, truncation_side=self.truncation_side)
        target = os.path.join(save_directory, "tokenizer_config.json")
        with open(target, "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2, ensure_ascii=False)
        return (*saved, target)

    def close(self) -> None:
        """Frees the tokenizer now rather than when it is collected; using it afterwards is an error."""
        self._native.close()

    def __reduce__(self) -> tuple[Any, ...]:
        state = {key: value for key, value in self.__dict__.items() if key != "_native"}
        return _reopen, (self._directory, state)

    def __repr__(self) -> str:
        limit = "no limit" if self.model_max_length >= NO_LIMIT else self.model_max_length
        return (
            f"Tokenizer(name_or_path={self.name_or_path!r}, model={self._native.description['model']}, "
            f"vocab_size={self.vocab_size}, len={len(self)}, model_max_length={limit}, "
            f"padding_side={self.padding_side!r}, truncation_side={self.truncation_side!r}, "
            f"special_tokens={self.special_tokens_map})"
        )


_CLEAN = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _reopen(directory: str, state: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer(directory)
    tokenizer.__dict__.update(state)
    return tokenizer


def _side(name: str, side: str) -> Side:
    if side not in ("left", "right"):
        raise ValueError(f'{name} must be "left" or "right", not {side!r}')
    return cast(Side, side)


def _limited(length: int) -> int | None:
    return None if length > int(1e20) else length


def _derived(key: str, ids: list[int]) -> Any:
    return [1] * len(ids) if key == "attention_mask" else len(ids)


def _values(ids: Any) -> Any:
    """Ids as an int, a list of ints or a list of lists, whatever held them."""
    if isinstance(ids, Mapping):
        ids = ids["input_ids"]
    if hasattr(ids, "tolist"):
        return ids.tolist()
    if isinstance(ids, int):
        return ids
    if hasattr(ids, "__index__"):
        return ids.__index__()
    if isinstance(ids, Iterable) and not isinstance(ids, (str, bytes)):
        return [_values(id) for id in ids]
    raise TypeError(f"token ids must be ints, lists of ints or tensors, not {_name(ids)}")


def _tensor(value: Any, kind: str | None, key: str) -> Any:
    if kind is None:
        return value
    ragged = f"the rows of {key} have different lengths; pass padding=True (and truncation=True for a limit)"
    if kind == "np":
        import numpy

        try:
            return numpy.asarray(value, dtype=numpy.int64)
        except ValueError as error:
            raise ValueError(ragged) from error
    if kind == "pt":
        import torch

        if isinstance(value, torch.Tensor):
            return value
        try:
            return torch.tensor(value, dtype=torch.int64)
        except ValueError as error:
            raise ValueError(ragged) from error
    raise ValueError(f'return_tensors must be "pt", "np" or None, not {kind!r}')


def _name(value: Any) -> str:
    if isinstance(value, Sequence) and value:
        return f"a {type(value).__name__} that holds {type(value[0]).__name__}"
    return type(value).__name__
