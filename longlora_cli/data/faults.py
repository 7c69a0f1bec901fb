"""Collect what is wrong with one input file, so that the user sees all of it at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from longlora_cli.errors import DataError

MOST = 20
"""Faults of one file that are told; reading it stops there."""

_SHOWN_CHARACTERS = 60


class Faults:
    """The faults of one input.

    Args:
        name: How the input is called in messages: a path, `hf:NAME`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._found: list[tuple[int, str]] = []
        self._hint: str | None = None

    def __len__(self) -> int:
        return len(self._found)

    @property
    def is_full(self) -> bool:
        """True when no more faults are needed."""
        return len(self._found) >= MOST

    def add(self, line: int, reason: str, *, hint: str | None = None) -> None:
        """Note a fault.

        Args:
            line: Its line or row, counted from 1; 0 for a fault of the file as a whole.
            reason: One line.
            hint: What to type instead; the first one is told.
        """
        if not self.is_full:
            self._found.append((line, reason))
            self._hint = self._hint or hint

    def has_line(self, line: int) -> bool:
        """True when a fault of this line was noted."""
        return any(number == line for number, _ in self._found)

    def move_to(self, faults: Faults, prefix: str) -> None:
        """Add these faults to those of the file that this is a part of, where lines count for nothing.

        Args:
            faults: The file's.
            prefix: Names the part.
        """
        for line, reason in self._found:
            faults.add(0, f"{prefix}line {line}: {reason}" if line else prefix + reason)

    def raise_if_any(self) -> None:
        """Raise one `DataError`: the first fault by line as its message, the others a line each, equal ones together.

        Raises:
            DataError: At least one fault was noted.
        """
        if not self._found:
            return
        # Bytes are decoded ahead of the rows in them, so that faults may come out of order.
        (line, reason), *others = sorted(self._found, key=lambda found: found[0])
        lines: dict[str, list[str]] = {}
        for number, why in others:
            lines.setdefault(why, []).append(str(number))
        same = lines.pop(reason, []) if line else []
        told = [f"the same on line {', '.join(same)}"] if same else []
        for why, (first, *more) in lines.items():
            also = f" (and on line {', '.join(more)})" if more else ""
            told.append(f"{self.name}: {why}" if first == "0" else f"{self.name}:{first}: {why}{also}")
        if self.is_full:
            told.append(f"reading stopped after {MOST} faults")
        raise DataError(
            f"{self.name}:{line}: {reason}" if line else f"{self.name}: {reason}",
            rule="\n".join(told) or None,
            hint=self._hint,
        )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known word, or nothing."""
    close = difflib.get_close_matches(word[:_SHOWN_CHARACTERS], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def shown(value: Any) -> str:
    """A value from a file as a message may hold it: short, in one line, without control characters."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
