"""What tasks are made of: names and numbers that a text does not hold, groups of lines, lists in words."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

from longlora_cli.data.synthetic.sheet import Form, Request
from longlora_cli.data.wordings import draw_keys
from longlora_cli.errors import DataError

_TRIES = 10_000
# Shorter beginnings, such as `The`, say nothing; what follows them in the line does.
_SHORTEST_BEGINNING = 8


class Fresh:
    """Draws names and values that neither the text nor anything drawn before holds, or is part of.

    Args:
        request: Its context is the text.
    """

    def __init__(self, request: Request) -> None:
        self._context = request.context
        self._drawn: list[str] = []

    def draw(self, make: Callable[[], str]) -> str:
        """The first result of `make` that is new.

        Raises:
            DataError: Ten thousand results in a row were not.
        """
        for _ in range(_TRIES):
            name = make()
            if name in self._context or any(name in other or other in name for other in self._drawn):
                continue
            self._drawn.append(name)
            return name
        raise DataError(
            "the text to hide lines in holds nearly every name and number that could be invented",
            hint="Use prose rather than tables and lists of words.",
        )

    def number(self, rng: random.Random) -> str:
        """Five digits, the first not 0."""
        return self.draw(lambda: str(rng.randint(10_000, 99_999)))

    def numbers(self, rng: random.Random, count: int) -> list[str]:
        """`count` numbers."""
        return [self.number(rng) for _ in range(count)]

    def things(self, rng: random.Random, count: int) -> list[str]:
        """`count` things such as `amber falcon`."""
        return [self.draw(lambda: draw_keys(rng, 1, "train")[0]) for _ in range(count)]


def free_form(request: Request, rng: random.Random, forms: Sequence[Form]) -> Form:
    """One of the forms whose `line` begins as nothing in the text does: essays turn to topics of their own.

    Raises:
        DataError: The text has all of these beginnings.
    """
    for form in rng.sample(forms, len(forms)):
        beginning = form["line"].partition("{")[0]
        if len(beginning) < _SHORTEST_BEGINNING or beginning not in request.context:
            return form
    raise DataError(
        f"the text to hide lines in has {forms[0]['line'].partition('{')[0]!r} and the like already",
        hint="Leave this task out of --synthetic, or give other texts.",
    )


def group_sizes(rng: random.Random, lines: int, questions: int, *, least: int) -> list[int]:
    """How many lines each thing gets that is asked about: about three in the mean, at most one thing a question.

    Args:
        rng: Decides.
        lines: Their sum.
        questions: Most groups.
        least: Each group's least size, where there are lines enough.
    """
    groups = max(1, min(questions, (lines + 1) // 3))
    rest = lines - groups * least
    if rest < 0:
        return [lines]
    # Every way to share out the rest is as likely as any other: bars among stars.
    bars = sorted(rng.sample(range(rest + groups - 1), groups - 1))
    edges = [-1, *bars, rest + groups - 1]
    return [least + after - before - 1 for before, after in pairwise(edges)]


def interleaved(rng: random.Random, sizes: Sequence[int]) -> list[int]:
    """The group of each line, in random order."""
    owners = [group for group, size in enumerate(sizes) for _ in range(size)]
    rng.shuffle(owners)
    return owners


def in_words(things: Sequence[str], joint: str) -> str:
    """`the amber falcon, the blue hawk and the red owl`."""
    named = [f"the {thing}" for thing in things]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} {joint} {named[-1]}"
