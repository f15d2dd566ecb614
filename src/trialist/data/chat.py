"""Conversations in rows: lists of messages checked, and rendered by a tokenizer's chat template.

The formats are those of TRL: beside its messages a row may hold `tools` (a list, or the JSON of one) and
`chat_template_kwargs`, further values for the template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trialist.data.columns import listed

Message = dict[str, Any]


def checked_messages(value: Any, where: str, expected: str = "a list of messages") -> list[Message]:
    """The messages of a row without entries that are None, the content of each one string.

    where: how errors call the row and its column. Raises ValueError for what is not `expected`, no list of messages with
    `role` and `content`, holds something other than text, or has an empty message of the assistant that calls no tool.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError(f"{where} must be {expected}, not {kind(value)}")
    messages = []
    for index, entry in enumerate(value, start=1):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("role"), str):
            raise ValueError(f"{where}, message {index}: expected {{'role': ..., 'content': ...}}, found {kind(entry)}")
        message = {key: item for key, item in entry.items() if item is not None}
        content = message.get("content", "")
        if not isinstance(content, str):
            parts = content if isinstance(content, Sequence) else ()
            if not parts or any(
                not isinstance(part, Mapping) or not isinstance(part.get("text"), str) for part in parts
            ):
                raise ValueError(f"{where}, message {index}: only text is learnt; its content is {kind(content)}")
            content = "".join(part["text"] for part in parts)
        if message["role"] == "assistant" and not content.strip() and not message.get("tool_calls"):
            raise ValueError(f"{where}, message {index} is empty; drop the row or fill it in")
        messages.append({**message, "content": content})
    return messages


def render(tokenizer: Any, messages: Sequence[Message], row: Mapping[str, Any], place: str, **options: Any) -> Any:
    """What the chat template makes of messages of the row, with the row's tools and values for the template.

    options: of `apply_chat_template`. place: how errors call the row. Raises ValueError for tools or values of another kind,
    and for what the template does not take.
    """
    from jinja2.exceptions import TemplateError

    more = row.get("chat_template_kwargs") or {}
    if not isinstance(more, Mapping):
        raise ValueError(f"{place}: 'chat_template_kwargs' must be an object, not {kind(more)}")
    given = {name: value for name, value in more.items() if value is not None}  # tables fill with None
    try:
        return tokenizer.apply_chat_template(list(messages), **{"tools": _tools(row, place), **given}, **options)
    except (TemplateError, ValueError, TypeError) as error:
        raise ValueError(
            f"{place}: the chat template does not take this conversation ({error}); roles are "
            f"{', '.join(message['role'] for message in messages)}"
        ) from error


def kind(value: Any) -> str:
    """What a value of a row is, for errors."""
    if value is None:
        return "missing"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, Mapping):
        return f"an object with {listed(value)}"
    if isinstance(value, list | tuple):
        return (
            "a list of messages" if value and all(isinstance(v, Mapping) and "role" in v for v in value) else "a list"
        )
    return f"a {type(value).__name__}"


def _tools(row: Mapping[str, Any], place: str) -> Any:
    """None for an empty list, of which some templates make words."""
    tools = row.get("tools") or None
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools) or None
    except ValueError as error:
        raise ValueError(f"{place}: 'tools' is a string that is no JSON ({error}); give a list, or its JSON") from error
