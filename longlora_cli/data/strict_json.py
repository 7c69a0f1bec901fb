"""JSON as strict as prepared data must be."""

from __future__ import annotations

import json
import re
from typing import Any

from longlora_cli.data.faults import shown
from longlora_cli.data.row_values import RowFault

_SPACE = re.compile(r"[ \t\n\r]*")

# Memory of what each of these characters stands for: a list and its place, an object with a few keys, a value and its
# place, a key with its pair while the object is made.
_COSTS = {"[": 72, "{": 240, ",": 72, ":": 200}


def objects_bytes(text: bytes | str, enough: int) -> int:
    """Memory of the objects and lists of a JSON text and of their values, without long texts' characters.

    Args:
        text: JSON, perhaps cut off.
        enough: From here on the sum need not be exact.

    Returns:
        An upper bound; for small values texts' own commas and brackets count, too.
    """
    rough = _costs(text, 0, len(text))
    if rough <= enough:
        return rough
    quote: Any = b'"' if isinstance(text, bytes) else '"'
    total = place = 0
    while total <= enough:
        start = text.find(quote, place)
        total += _costs(text, place, start if start >= 0 else len(text))
        place = _end_of_string(text, start, quote) if start >= 0 else 0
        if not place:
            break
    return total


def _costs(text: Any, start: int, stop: int) -> int:
    is_bytes = isinstance(text, bytes)
    return sum(cost * text.count(ord(c) if is_bytes else c, start, stop) for c, cost in _COSTS.items())


def _end_of_string(text: Any, start: int, quote: Any) -> int:
    """The place behind the string that begins at `start`; 0 where it does not end."""
    backslash = b"\\" if isinstance(text, bytes) else "\\"
    end = start
    while (end := text.find(quote, end + 1)) > 0:
        first = end
        while text[first - 1 : first] == backslash:
            first -= 1
        if (end - first) % 2 == 0:
            return end + 1
    return 0


def end_of_space(text: str, start: int) -> int:
    """Where the white space that begins at `start` ends."""
    match = _SPACE.match(text, start)
    return match.end() if match else start


class Decoder:
    """Standard JSON; what `json` lets pass although it loses or makes up data is refused."""

    def __init__(self) -> None:
        self._noted: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)

    def value(self, text: str, start: int = 0) -> tuple[Any, int]:
        """The value that begins at `start`, and where it ends.

        Raises:
            json.JSONDecodeError: Not JSON, or cut off.
            RowFault: What cannot be read, though it may be JSON.
        """
        self._noted.clear()
        try:
            return self._decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            raise
        except RecursionError as error:
            raise RowFault("not JSON that can be read: nested too deeply") from error
        except ValueError as error:  # a number of thousands of digits
            raise RowFault(f"not JSON that can be read: {error}") from error

    def raise_if_noted(self) -> None:
        """Raise what was wrong with the last value although it could be decoded.

        Raises:
            RowFault: A key that is there twice, NaN or an infinite number.
        """
        if self._noted:
            raise RowFault(self._noted[0])

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for index, key in enumerate(keys) if key in keys[:index])
            self._noted.append(f"the key {shown(twice)} is there twice in one object")
        return row

    def _constant(self, name: str) -> None:
        self._noted.append(f"{name} is no JSON value; a missing value is null")


def parse_json(text: str) -> Any:
    """The value of a text that holds one, as strict as a prepared row must be.

    Raises:
        RowFault: Not JSON (with the column), nested too deeply, a key twice, NaN or an infinite number.
    """
    decoder = Decoder()
    try:
        value, end = decoder.value(text, end_of_space(text, 0))
        end = end_of_space(text, end)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise RowFault(f"column {error.colno}: not JSON: {error.msg.removesuffix(' at')}") from error
    decoder.raise_if_noted()
    return value
