"""JSON as strict as prepared data must be."""

from __future__ import annotations

import json
import re
from typing import Any

from longlora_cli.data.faults import shown
from longlora_cli.data.row_values import RowFault

_SPACE = re.compile(r"[ \t\n\r]*")


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
