"""Strings that end an answer: seen while it grows, and cut off it afterwards by the same rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longlora_cli.generation.text_stream import TextStream


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the strings; a blank answer before it is passed over, so that an answer after a line
    break is one.
    """
    place = _place(text, stop)
    return text if place is None else text[:place]


def is_decided(text: str, stop: Sequence[str]) -> bool:
    """Whether `cut_at` gives the same for this text and for all that begin with it.

    It does once a string was met, unless another one has begun before that one and may still be completed.
    """
    place = _place(text, stop)
    if place is None:
        return False
    return not any(
        word.startswith(text[start:]) for start in range(_answer_start(text), place) for word in stop
    )


def _place(text: str, stop: Sequence[str]) -> int | None:
    start = _answer_start(text)
    return min((place for word in stop if (place := text.find(word, start)) >= 0), default=None)


def _answer_start(text: str) -> int:
    return len(text) - len(text.lstrip())


class StopWatch:
    """Watches a growing answer for the strings that end it.

    Args:
        tokenizer: A fast tokenizer.
        stop: The strings, at least one.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer)
        self._stop = tuple(stop)
        self._text = ""

    def is_met(self, token: int) -> bool:
        """Take the next token: whether the answer's text before its stop is known now, whatever would follow."""
        piece = self._stream.push(token)
        self._text += piece
        return bool(piece) and is_decided(self._text, self._stop)
