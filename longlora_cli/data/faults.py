"""Collect what is wrong with one input file, so that the user sees all of it at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from longlora_cli.errors import DataError

MOST = 20
"""Faults of one file that are told; reading it stops there."""


class Faults:
    """The faults of one input.

    Args:
        name: How the input is called in messages: a path, `hf:NAME`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._found: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._found)

    @property
    def is_full(self) -> bool:
        """True when no more faults are needed."""
        return len(self._found) >= MOST

    def add(self, line: int, reason: str) -> None:
        """Note a fault of a line (or row), counted from 1."""
        if not self.is_full:
            self._found.append((line, reason))

    def raise_if_any(self) -> None:
        """Raise one `DataError`: the first fault as its message, the others in one line.

        Raises:
            DataError: At least one fault was noted.
        """
        if not self._found:
            return
        line, reason = self._found[0]
        lines: dict[str, list[str]] = {}
        for number, why in self._found[1:]:
            lines.setdefault(why, []).append(str(number))
        same = lines.pop(reason, [])
        told = [f"the same on line {', '.join(same)}"] if same else []
        told += [f"line {', '.join(numbers)}: {why}" for why, numbers in lines.items()]
        if self.is_full:
            told.append(f"reading stopped after {MOST} faults")
        raise DataError(f"{self.name}:{line}: {reason}", rule=f"Also {'; '.join(told)}" if told else None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
