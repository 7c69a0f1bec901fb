"""What a task gives: lines to hide in a text, and the questions and answers about them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from longlora_cli.data.haystack import Haystack


@dataclass(frozen=True)
class Line:
    """What is put between two sentences of the user's text.

    Args:
        text: One sentence or more.
        is_paragraph: It stands apart, between blank lines; else within the paragraph.
    """

    text: str
    is_paragraph: bool = False


@dataclass(frozen=True)
class Turn:
    """One question of a chat.

    Args:
        question: How it is asked.
        answer: Exactly what the assistant says.
        lines: Indices of the lines that the answer is found in.
    """

    question: str
    answer: str
    lines: tuple[int, ...]


@dataclass(frozen=True)
class Sheet:
    """All of a chat but the user's text.

    Args:
        lines: What is hidden.
        depths: Where each line goes: the share of the text's tokens before it, 0 to 1.
        turns: What is asked, in order; at least one.
        after_titles: Lines may stand between `Mr.` and the name, as needles always did.
    """

    lines: list[Line]
    depths: list[float]
    turns: list[Turn]
    after_titles: bool = False


@dataclass(frozen=True)
class Request:
    """What a task makes a sheet from.

    Args:
        facts: Lines to hide; a task that needs more than that for one question hides what it needs.
        questions: Questions to ask; where the lines do not allow so many different ones, all they allow.
        key: Decides everything random; no two samples share it.
        context: The text that the lines go into: nothing that is invented may occur in it already.
        haystack: The user's texts.
    """

    facts: int
    questions: int
    key: str
    context: str
    haystack: Haystack

    def rng(self, part: str) -> random.Random:
        """Random numbers for a part of the sample: how many another part draws does not change them."""
        return random.Random(f"{self.key}:{part}")


Task = Callable[[Request], Sheet]
Form = Mapping[str, str]
"""One way to word a task: templates by what they are for. A chat has one form; none of evaluation's is among them."""


def spread_depths(rng: random.Random, count: int) -> list[float]:
    """One random depth in each of `count` equal parts of the text, rising: together uniform from 0 to 1."""
    return [(number + rng.random()) / count for number in range(count)]
