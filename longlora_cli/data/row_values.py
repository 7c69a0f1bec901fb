"""Values of rows: texts that can be encoded, and what to say of those that cannot be used."""

from __future__ import annotations

from typing import Any

# Deeper than any schema of a tool; Python's own limit is met at some hundred levels.
_MOST_LEVELS = 64


class RowFault(ValueError):
    """Why a row cannot be used; one line without its place.

    Args:
        reason: The line.
        hint: What to type instead.
    """

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


def checked_text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """`value`, when it is a text that can be encoded.

    Args:
        value: What the row has.
        name: How the message calls it.
        may_be_empty: An empty text is one too.

    Raises:
        RowFault: Not a text, empty, or with a NUL character or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise RowFault(f"{name} is {kind_of_value(value)}, a text is needed")
    if not may_be_empty and (not value or value.isspace()):
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


def checked_tree(value: Any, name: str, level: int = 0) -> Any:
    """`value`, when it is plain JSON whose keys and texts can be encoded.

    Args:
        value: Objects, lists, texts, numbers, true, false, null.
        name: How the message calls it.
        level: Levels above this value.

    Raises:
        RowFault: Something else (NaN, a date), a text that `checked_text` refuses, or more than 64 levels.
    """
    if level > _MOST_LEVELS:
        raise RowFault(f"{name} is nested deeper than {_MOST_LEVELS} levels")
    if isinstance(value, dict):
        for key, part in value.items():
            checked_text(key, f"a key of {name}", may_be_empty=True)
            checked_tree(part, name, level + 1)
    elif isinstance(value, list):
        for part in value:
            checked_tree(part, name, level + 1)
    elif isinstance(value, str):
        checked_text(value, f"a text in {name}", may_be_empty=True)
    elif value is not None and (not isinstance(value, int | float) or value - value != 0):
        raise RowFault(f"{name} holds {kind_of_value(value)}, which is no JSON value")
    return value


def kind_of_value(value: Any) -> str:
    """What a value is, in words: `null`, `a list`, `NaN`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float) and value != value:
        return "NaN"
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
