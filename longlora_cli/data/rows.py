"""Rows of JSONL files and datasets: find out what kind a row is, check it, make a text or a chat of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from longlora_cli.data.chat_template import Message
from longlora_cli.data.faults import did_you_mean, shown

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_FORMS = (("messages",), ("conversations",), ("prompt", "completion"), ("input", "outputs"), ("text",))
KEYS = tuple(key for form in _FORMS for key in form)
"""Keys of a row that are read; others (ids, sources, ...) are left alone."""
_KINDS = "text, messages, conversations, prompt + completion, input + outputs"


class RowFault(ValueError):
    """Why a row cannot be used; one line without its place."""


def read_row(row: Any) -> str | list[Message]:
    """The text or chat of one row; a row that holds both is taken as a chat.

    Args:
        row: A decoded JSON object; keys besides those of its kind (ids, sources, ...) are left alone.

    Returns:
        A text, or messages with the roles system (first only), user and assistant (in turn, the last one).

    Raises:
        RowFault: The row is of no known kind, or a part of it is missing, mistyped or out of order.
    """
    if not isinstance(row, dict):
        raise RowFault(f"a row is a JSON object, not {_kind(row)}")
    form = _form(row)
    if form is None:
        raise RowFault(unknown_keys(row) or "the row cannot be read")
    if form[0] in ("messages", "conversations"):
        return _chat(row[form[0]], form[0])
    return checked_text(row["text"], "text") if form == ("text",) else _pair(row, *form)


def _form(row: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The keys that make the row a document: the first form whose values are there, else whose keys are.

    In tables and datasets every row has every key, and a null is what a row lacks.
    """
    there = [form for form in _FORMS if all(key in row for key in form)]
    full = [form for form in there if all(row[key] is not None for key in form)]
    some = [form for form in there if any(row[key] is not None for key in form)]
    return next(iter(full + some + there), None)


def unknown_keys(keys: Iterable[str]) -> str | None:
    """Why keys (or columns) can be no row's; None where they can."""
    row = list(keys)
    if any(all(key in row for key in form) for form in _FORMS):
        return None
    for key in row:
        hint = did_you_mean(key, KEYS)
        if hint and key not in KEYS:
            return f"unknown key {shown(key)}{hint}"
    partner = {"prompt": "completion", "completion": "prompt", "input": "outputs", "outputs": "input"}
    for key, other in partner.items():
        if key in row:
            return f"{key!r} without {other!r}"
    if not row:
        return f"the row is empty; a row has {_KINDS}"
    return f"a row has {_KINDS}; this one has {', '.join(shown(key).strip(chr(39)) for key in row[:8])}"


def checked_text(value: Any, name: str) -> str:
    """`value`, when it is a text that can be encoded.

    Raises:
        RowFault: Not a text, empty, or with a NUL character or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise RowFault(f"{name} is {_kind(value)}, a text is needed")
    if not value or value.isspace():
        raise RowFault(f"{name} is empty")
    if "\0" in value:
        raise RowFault(f"{name} has a NUL character at position {value.index(chr(0))}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        half = f"half a surrogate pair (U+{code:04X})"
        raise RowFault(f"{name} has {half} at position {error.start}") from error
    return value


def _pair(row: dict[str, Any], question: str, answer: str) -> list[Message]:
    value = row[answer]
    if answer == "outputs" and isinstance(value, list):
        if not value:
            raise RowFault("outputs is empty")
        value = value[0]  # the first of several accepted answers is learnt
    return [
        {"role": "user", "content": checked_text(row[question], question)},
        {"role": "assistant", "content": checked_text(value, answer)},
    ]


def _chat(turns: Any, key: str) -> list[Message]:
    if not isinstance(turns, list):
        raise RowFault(f"{key} is {_kind(turns)}, a list of messages is needed")
    if not turns:
        raise RowFault(f"{key} is empty")
    messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    body = messages[1:] if messages[0]["role"] == "system" else messages
    skipped = len(messages) - len(body)
    for index, message in enumerate(body):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            place, role = index + 1 + skipped, message["role"]
            raise RowFault(f"message {place} is by {role}, {expected} must speak here")
    if not body or body[-1]["role"] != "assistant":
        raise RowFault("the chat does not end with the assistant, so its last turn teaches nothing")
    return messages


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RowFault(f"message {number} is {_kind(turn)}, an object is needed")
    role_key, content_key = ("from", "value") if "from" in turn or "value" in turn else ("role", "content")
    for key, value in turn.items():
        # A null key is what datasets writes for a key that only other rows have.
        if key not in (role_key, content_key) and value is not None:
            hint = did_you_mean(key, (role_key, content_key))
            raise RowFault(f"message {number} has the unknown key {shown(key)}{hint}")
    for key in (role_key, content_key):
        if key not in turn:
            raise RowFault(f"message {number} has no {key!r}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        hint = did_you_mean(role, _ROLES) if isinstance(role, str) else ""
        raise RowFault(f"message {number} has the unknown {role_key} {shown(role)}{hint}")
    return {
        "role": _ROLES[role],
        "content": checked_text(turn[content_key], f"{content_key} of message {number}"),
    }


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float) and value != value:
        return "NaN"
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
