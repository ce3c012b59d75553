"""Chat templates: a list of messages becomes the text a chat model was trained on.

A template is Jinja source that comes with a model, so it is not trusted: it runs in Jinja's
immutable sandbox and sees plain data only. What templates may use beyond Jinja itself is what
transformers gives them: ``raise_exception``, ``strftime_now``, a ``tojson`` that keeps characters
as they are, ``break`` and ``continue``, and ``{% generation %}`` blocks, which print their body.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

# Marks the place up to which a message to be continued is kept. The space at its end shows whether the
# template trimmed the message.
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``, which marks what the model itself says: the body."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """``namespace(...)`` without names that begin with an underscore, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a chat template may not set the attribute {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
    return environment.from_string(template)


def _plain(value: Any) -> Any:
    """The value rebuilt of plain types, so that a template finds no methods to call; others become a placeholder."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return f"<{type(value).__name__}>"


def _schema(tool: Any) -> Any:
    """A tool as its JSON schema; functions are turned into one by transformers, where it is installed."""
    if isinstance(tool, Mapping) or not callable(tool):
        return tool
    try:
        from transformers.utils import get_json_schema  # type: ignore[attr-defined]
    except ImportError:
        raise TypeError(
            f"the tool {tool!r} is a function; without transformers installed, pass its JSON schema (a dict)"
        ) from None
    return get_json_schema(tool)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """Renders one conversation, a list of ``{"role": ..., "content": ...}``, to text.

    ``continue_final_message`` ends the text with the last message, without what the template puts
    after it. Everything else, ``variables`` included, is what the template sees.

    Raises ``jinja2.TemplateError`` if the template refuses or is wrong, and ``ValueError`` if the
    last message cannot be continued.
    """
    chat = [_plain({key: value for key, value in message.items() if value is not None}) for message in messages]
    final = ""
    if continue_final_message:
        if add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        final = chat[-1].get("content", "") if chat else ""
        if not isinstance(final, str) or not final:
            raise ValueError("continue_final_message needs a last message whose content is text")
        chat[-1]["content"] = final + _MARK
    text = _compiled(template).render(
        messages=chat,
        tools=None if tools is None else _plain([_schema(tool) for tool in tools]),
        documents=_plain(documents),
        add_generation_prompt=add_generation_prompt,
        **_plain(variables),
    )
    if not continue_final_message:
        return text
    at = text.rfind(_MARK.strip())
    if at < 0 or final.strip() not in text:
        raise ValueError("the chat template changes the last message, so it cannot be continued")
    # A template that trims its messages has taken the space off the mark; then the message loses its own too.
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()
