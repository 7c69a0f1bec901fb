"""Does training data hold what evaluation will ask? Runs of 13 words that both have.

Thirteen words in a row that two texts share are hardly ever chance, and are what Brown et al. 2020 (arXiv:2005.14165,
appendix C) looked for. Words are compared without case and punctuation; a Chinese, Japanese or Korean character counts
as a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from longlora_cli.errors import DataError

RUN_WORDS = 13
_EAST_ASIAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(f"[{_EAST_ASIAN}]|[^\\W_{_EAST_ASIAN}]+")
"""A word of lower-cased text, or a Chinese, Japanese or Korean character."""
# Odd, so that no word's place is lost modulo 2^64.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_UNKNOWN = -1  # a word that the evaluation data lack: no run with it can be there
# Windows are compared in pieces of so many, 13 numbers each: 100 MB at a time whatever the text's length.
_WINDOWS_AT_ONCE = 1 << 20

Numbers = npt.NDArray[np.int64]


class OverlapCheck:
    """The runs of words of evaluation data. Memory: about 30 bytes a word of it.

    Args:
        texts: The evaluation data.

    Raises:
        DataError: None of them has 13 words.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._numbers: dict[str, int] = {}
        parts = [self._learn(text) for text in texts]
        # Texts are kept apart by a word that is none, so that no run goes from one to the next.
        apart = np.array([_UNKNOWN])
        self._words = np.concatenate([piece for part in parts for piece in (part, apart)] or [apart])
        hashes, places = _windows(self._words)
        if not len(places):
            raise DataError(
                f"--overlap-check: no text of the evaluation data has {RUN_WORDS} words",
                hint="Name files that hold what evaluation asks.",
            )
        self._hashes, first = np.unique(hashes, return_index=True)
        self._places = places[first]
        self._marked = np.zeros(len(first), bool)

    def mark(self, texts: Iterable[str]) -> None:
        """Remember which runs of the evaluation data these texts have; see `marked`."""
        for text in texts:
            for found, _ in self._pieces(text):
                self._marked[found] = True

    def marked(self, groups: Sequence[str]) -> dict[str, tuple[int, int]]:
        """How many different runs of each group of the evaluation data were met by `mark`, and how many it has.

        Args:
            groups: The group of each text of the evaluation data.
        """
        hashes, places = _windows(self._words)
        runs = np.searchsorted(self._hashes, hashes)
        texts = np.searchsorted(np.flatnonzero(self._words == _UNKNOWN), places)
        names = sorted(set(groups))
        group = np.array([names.index(name) for name in groups])[texts]
        found = {}
        for number, name in enumerate(names):
            own = np.unique(runs[group == number])
            found[name] = (int(self._marked[own].sum()), len(own))
        return found

    def _learn(self, text: str) -> Numbers:
        numbers = self._numbers
        words = WORD.findall(text.lower())
        return np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64, len(words))

    def shared(self, texts: Iterable[str]) -> tuple[int, int]:
        """How many runs of 13 words of some texts are in the evaluation data, and how many they have."""
        found = total = 0
        for text in texts:
            for runs, size in self._pieces(text):
                found += len(runs)
                total += size
        return found, total

    def _pieces(self, text: str) -> Iterator[tuple[Numbers, int]]:
        """Piece by piece of a text the places of those of its runs that are known, and how many runs it has."""
        words = WORD.findall(text.lower())
        numbers = np.fromiter((self._numbers.get(w, _UNKNOWN) for w in words), np.int64, len(words))
        for start in range(0, len(numbers) - RUN_WORDS + 1, _WINDOWS_AT_ONCE):
            piece = numbers[start : start + _WINDOWS_AT_ONCE + RUN_WORDS - 1]
            yield self._found(piece), len(piece) - RUN_WORDS + 1

    def _found(self, numbers: Numbers) -> Numbers:
        """For each run of the numbers that the evaluation data have, which of their runs it is."""
        hashes, places = _windows(numbers)
        if not len(places):
            return np.zeros(0, np.int64)
        nearest = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        alike = self._hashes[nearest] == hashes
        ours, theirs = places[alike], self._places[nearest[alike]]
        along = np.arange(RUN_WORDS)
        # Equal hashes are compared word by word: a report of what is not there would be worse than a slow one.
        same = (numbers[ours[:, None] + along] == self._words[theirs[:, None] + along]).all(1)
        found: Numbers = nearest[alike][same]
        return found


def _windows(numbers: Numbers) -> tuple[npt.NDArray[np.uint64], Numbers]:
    """Hash and place of every run of 13 known words."""
    count = len(numbers) - RUN_WORDS + 1
    if count <= 0:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    unknown = np.concatenate([[0], np.cumsum(numbers == _UNKNOWN)])
    places = np.flatnonzero(unknown[RUN_WORDS:] == unknown[:-RUN_WORDS])
    words = numbers.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(len(places), np.uint64)
    for offset in range(RUN_WORDS):
        hashes = hashes * _MULTIPLIER + words[places + offset]
    return hashes, places
