"""The ids of words, each encoded once: 46 MB of novels say 270,000 different words 8.4 million times.

A text is cut before its spaces and line ends wherever that is exact (`seams.Seams`). Then a word has the same ids in
every text, and a look into a dictionary takes the place of normalizing, splitting and merging it. The library has a
cache too, but only before the merging, and one lock around it for all threads. Groups of texts whose words are mostly
new (no spaces, numbers, many languages at once) are left to the tokenizer.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import repeat
from threading import Lock

import numpy as np
import numpy.typing as npt

from longlora_cli.data.seams import Seams

Int32 = npt.NDArray[np.int32]

# Of a group's characters. A new word costs what it costs without a cache and a tenth more; a quarter of an English
# novel's first megabyte are new words, of languages with more endings more.
_MOST_NEW = 0.7
# After a group that was not worth it, so many groups are not tried.
_NOT_TRIED = 8
# Of a group's words. Cuts that are not exact (after a second space, after a letter that composes) are taken back.
_MOST_TAKEN_BACK = 0.2
# Fewer characters than these are encoded sooner than looked up.
_LEAST_CHARACTERS = 1 << 15
# Full, it begins anew: 0.13 GB.
_MOST_WORDS = 1 << 19
_MOST_IDS = 1 << 22
# New words are encoded together, so many at once by each core.
_PART_WORDS = 1 << 10
# Marks the places to cut; texts that hold it are left to the tokenizer.
_CUT = "\0"
# Never exact between two of these: put together again by the hundred thousand where single ones take a loop.
_PAIRS = [(f"{a}{_CUT}{b}", a + b) for a in " \n" for b in " \n"]
# What is known of a word: that it begins with a line end, and what may be cut off behind it.
_BEGINS_LINE, _CUT_SPACE, _CUT_LINE = 1, 2, 4


class WordCache:
    """Ids of words that one tokenizer encodes; for several threads.

    Args:
        encode: Ids of each of some texts that do not begin their document, int32 `[tokens]`.
        seams: Where such texts can be cut.
        border: Name and id of a special token that is no word's: what stands on its two sides is encoded apart.
    """

    def __init__(
        self, encode: Callable[[list[str]], list[Int32]], seams: Seams, border: tuple[str, int]
    ) -> None:
        self._encode = encode
        self._seams = seams
        self._border, self._border_id = border
        self._lock = Lock()
        self._not_tried = 0
        self._empty()

    def _empty(self) -> None:
        self._numbers: dict[str, int] = {}
        self._new: list[str] = []  # have a number, and no ids yet
        self._known = bytearray()
        self._starts, self._lengths, self._ids = array("i"), array("i"), array("i")

    def encode(self, texts: list[str]) -> list[Int32] | None:
        """Ids of each of a group of texts, int32 `[tokens]`; None where the tokenizer should rather encode them.

        Args:
            texts: Pieces that do not begin their document, unless that makes no difference.
        """
        characters = sum(map(len, texts))
        if not characters or characters < _LEAST_CHARACTERS or any(_CUT in text for text in texts):
            return None
        with self._lock:
            if self._not_tried:
                self._not_tried -= 1
                return None
            try:
                found = self._all_numbers(texts, characters)
                if found is None or not self._encode_new():
                    self._not_tried = _NOT_TRIED
                    return None
                return self._ids_of(found)
            finally:
                self._forget_new()

    def _all_numbers(self, texts: list[str], characters: int) -> list[Int32] | None:
        """The numbers of the words of each text; None where too many of them are new or cannot be cut apart."""
        if len(self._numbers) > _MOST_WORDS or len(self._ids) > _MOST_IDS:
            self._empty()
        found: list[Int32] = []
        words = exact = 0
        for text in texts:
            parts = _words(text)
            found.append(self._joined(parts, self._numbers_of(parts)))
            words, exact = words + len(parts), exact + len(found[-1])
        new_characters = sum(map(len, self._new))
        worth = new_characters <= _MOST_NEW * characters and words - exact <= _MOST_TAKEN_BACK * words
        return found if worth else None

    def _numbers_of(self, words: list[str]) -> Int32:
        numbers = np.fromiter(map(self._numbers.get, words, repeat(-1)), np.int32, len(words))
        for place in np.flatnonzero(numbers < 0).tolist():
            numbers[place] = self._number_of_new(words[place])
        return numbers

    def _number_of_new(self, word: str) -> int:
        if (number := self._numbers.get(word)) is not None:  # new a moment ago
            return number
        self._numbers[word] = number = len(self._known)
        self._new.append(word)
        exact = self._seams.exact
        self._known.append(
            _BEGINS_LINE * (word[0] == "\n")
            + _CUT_SPACE * exact(word[-1], " ")
            + _CUT_LINE * exact(word[-1], "\n")
        )
        return number

    def _joined(self, words: list[str], numbers: Int32) -> Int32:
        """The numbers when words that cannot be cut apart are one word."""
        if len(words) < 2:
            return numbers
        known = np.frombuffer(self._known, np.uint8)[numbers]
        needed = np.where(known[1:] & _BEGINS_LINE, _CUT_LINE, _CUT_SPACE)
        starts = np.concatenate([[0], np.flatnonzero(known[:-1] & needed) + 1])
        lengths = np.diff(starts, append=len(words))
        if len(starts) == len(words):
            return numbers
        places = np.flatnonzero(lengths > 1)
        runs = zip(starts[places].tolist(), lengths[places].tolist(), strict=True)
        joined = numbers[starts]
        joined[places] = self._numbers_of(["".join(words[start : start + length]) for start, length in runs])
        return joined

    def _encode_new(self) -> bool:
        """Give the new words their ids; False where one holds what stands between them."""
        parts = [self._new[start : start + _PART_WORDS] for start in range(0, len(self._new), _PART_WORDS)]
        for words, ids in zip(parts, self._encode([self._border.join(part) for part in parts]), strict=True):
            borders = np.flatnonzero(ids == self._border_id)
            if len(borders) != len(words) - 1:
                return False
            bounds = np.concatenate([[-1], borders, [len(ids)]])
            lengths = (np.diff(bounds) - 1).astype(np.int32)
            starts = len(self._ids) + np.cumsum(lengths, dtype=np.int32) - lengths
            self._starts.frombytes(starts.tobytes())
            self._lengths.frombytes(lengths.tobytes())
            self._ids.frombytes(ids[ids != self._border_id].tobytes())
        self._new = []
        return True

    def _forget_new(self) -> None:
        """Take back the numbers that were given to words without ids."""
        for word in self._new:
            del self._numbers[word]
        self._new = []
        for values in (self._known, self._starts, self._lengths):
            del values[len(self._numbers) :]

    def _ids_of(self, found: list[Int32]) -> list[Int32]:
        """The ids of each text, from the numbers of its words."""
        numbers = np.concatenate(found)
        starts, lengths, ids = (
            np.frombuffer(values, np.int32) for values in (self._starts, self._lengths, self._ids)
        )
        counts = lengths[numbers]
        ends = np.concatenate([[0], np.cumsum(counts)])
        places = np.arange(ends[-1]) + np.repeat(starts[numbers] - ends[:-1], counts)
        return np.split(ids[places], ends[np.cumsum([len(words) for words in found])[:-1]])


def _words(text: str) -> list[str]:
    """A text cut before spaces and line ends, but not where they meet; together the words are the text."""
    marked = text.replace(" ", f"{_CUT} ").replace("\n", f"{_CUT}\n")
    for pair, joined in _PAIRS:
        marked = marked.replace(pair, joined)
    words = marked.split(_CUT)
    return words if words[0] else words[1:]
