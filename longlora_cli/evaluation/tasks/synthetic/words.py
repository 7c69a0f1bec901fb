"""The words, numbers and names that synthetic tasks are made of."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path

from longlora_cli.data.wordings import may_be_trained_on
from longlora_cli.errors import DataError

_FILE = Path(__file__).parent / "words.txt"
_TRIES = 10_000
_CONSONANTS = "bdfgklmnprstvz"
_VOWELS = "aeiou"


@cache
def word_lists() -> dict[str, tuple[str, ...]]:
    """`adjectives`, `nouns` and `verbs`, each sorted."""
    found: dict[str, tuple[str, ...]] = {}
    text = "\n".join(line for line in _FILE.read_text("utf-8").splitlines() if not line.startswith("#"))
    for block in text.split("[")[1:]:
        name, _, words = block.partition("]")
        found[name] = tuple(words.split())
    return found


@cache
def all_words() -> tuple[str, ...]:
    """All words once, sorted: 8,054 of them."""
    return tuple(sorted({word for words in word_lists().values() for word in words}))


def shuffled_words(rng: random.Random) -> Iterator[str]:
    """All words in random order, then invented ones without end: a long list of different words needs more than the
    dictionary has.
    """
    yield from rng.sample(all_words(), len(all_words()))
    known = set(all_words())
    while True:
        word = invented_word(rng, 4)
        if word not in known:
            known.add(word)
            yield word


def invented_word(rng: random.Random, syllables: int) -> str:
    """A pronounceable word that means nothing, such as `mirotan`."""
    pairs = [rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(syllables)]
    return "".join(pairs) + rng.choice(_CONSONANTS)


def endings() -> list[str]:
    """All 980 endings of a consonant, a vowel and a consonant."""
    return ["".join(parts) for parts in product(_CONSONANTS, _VOWELS, _CONSONANTS)]


def word_key(rng: random.Random) -> str:
    """An adjective and a noun, `amber-falcon`, as RULER's keys are; none of what `prepare --synthetic` draws."""
    lists = word_lists()
    return "-".join(new_pair(rng, lists["adjectives"], lists["nouns"]))


def new_pair(rng: random.Random, adjectives: Sequence[str], nouns: Sequence[str]) -> tuple[str, str]:
    """An adjective and a noun that are together no key of `prepare --synthetic`: a model may have learnt those."""
    while True:
        pair = rng.choice(adjectives), rng.choice(nouns)
        if not may_be_trained_on(*pair):
            return pair


def seven_digits(rng: random.Random) -> str:
    """A number of seven digits, the first not 0, as RULER's values are."""
    return str(rng.randint(1_000_000, 9_999_999))


def new_uuid(rng: random.Random) -> str:
    """A random UUID of version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


class Fresh:
    """Draws what neither a text nor anything drawn before holds, or is part of.

    Args:
        text: The text that the drawn things go into.
    """

    def __init__(self, text: str) -> None:
        self._text = text.lower()
        self._drawn: list[str] = []

    def draw(self, make: Callable[[], str]) -> str:
        """The first result of `make` that is new, case folded.

        Raises:
            DataError: Ten thousand results in a row were not.
        """
        for _ in range(_TRIES):
            made = make()
            low = made.lower()
            if low not in self._text and not any(low in other or other in low for other in self._drawn):
                self._drawn.append(low)
                return made
        raise DataError(
            "the haystack holds nearly everything that could be hidden in it",
            hint="Give other texts with --haystack.",
        )


class Distinct:
    """Draws things of one form and length, of which none can be part of another: they only have to differ.

    A list of 128K tokens has ten thousand of them; `Fresh`, which looks into each, takes seconds there.
    """

    def __init__(self) -> None:
        self._drawn: set[str] = set()

    def draw(self, make: Callable[[], str]) -> str:
        """The first result of `make` that was not drawn before.

        Raises:
            DataError: Ten thousand results in a row were.
        """
        for _ in range(_TRIES):
            made = make()
            if made not in self._drawn:
                self._drawn.add(made)
                return made
        raise DataError(
            "a list of this length needs more different names than there are", hint="Use shorter --lengths."
        )
