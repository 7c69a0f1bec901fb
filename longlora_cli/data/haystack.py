"""Real text to hide facts in, cut at sentences, with the tokens of each sentence counted once."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from longlora_cli.data.counting import token_counter

# A sentence ends at . ! or ? with its closing quotes and brackets, before a space.
_SENTENCE_END = re.compile(r"[.!?][\"'”’»)\]]*\s+")
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
# After these a sentence goes on, though it is cut there.
_TITLE = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St)\.$")
# Tables and verse without full stops are cut into pieces of at most this many characters, at spaces.
_LONGEST_SENTENCE = 400


@dataclass(frozen=True)
class Sentence:
    """A sentence, and what joins it to the next: a space, a blank line at a paragraph's end, or nothing.

    Nothing stands between the pieces of a text without spaces.
    """

    text: str
    joint: str
    place: tuple[int, int]  # text and sentence number: the key of its token count

    @property
    def is_title(self) -> bool:
        """It ends with a title such as `Mr.`, so that the next one goes on with it."""
        return _TITLE.search(self.text) is not None


def split_sentences(text: str, number: int = 0) -> list[Sentence]:
    """Cut a text into sentences; line breaks inside paragraphs become spaces."""
    found: list[Sentence] = []
    for paragraph in _BLANK_LINE.split(text):
        words = " ".join(paragraph.split())
        pieces = [piece for sentence in _cut_at_ends(words) for piece in _cut_long(sentence)]
        for index, (piece, joint) in enumerate(pieces):
            end = "\n\n" if index == len(pieces) - 1 else joint
            found.append(Sentence(piece, end, (number, len(found))))
    return found


def _cut_at_ends(paragraph: str) -> Iterator[str]:
    start = 0
    for match in _SENTENCE_END.finditer(paragraph):
        yield paragraph[start : match.end()].rstrip()
        start = match.end()
    if start < len(paragraph):
        yield paragraph[start:]


def _cut_long(sentence: str) -> Iterator[tuple[str, str]]:
    """Pieces, and what stood between each and the next: Chinese has no spaces, and gets none."""
    while len(sentence) > _LONGEST_SENTENCE:
        space = sentence.rfind(" ", 0, _LONGEST_SENTENCE)
        if space <= 0:
            rest = sentence[_LONGEST_SENTENCE:].lstrip()
            yield sentence[:_LONGEST_SENTENCE], " " if sentence[_LONGEST_SENTENCE] == " " else ""
            sentence = rest
        else:
            yield sentence[:space], " "
            sentence = sentence[space + 1 :]
    if sentence:
        yield sentence, " "


class Haystack:
    """Texts to take context from.

    Args:
        texts: At least one text with a word in it. They are kept; each is split into sentences on first use.

    Raises:
        ValueError: There is no text.
    """

    def __init__(self, texts: list[str]) -> None:
        self._texts = [text for text in texts if text.strip()]
        if not self._texts:
            raise ValueError("a haystack needs a text")
        self._ends = list(itertools.accumulate(len(text) for text in self._texts))
        self._sentences: dict[int, list[Sentence]] = {}
        self._counts: WeakKeyDictionary[Any, dict[tuple[int, int], int]] = WeakKeyDictionary()

    @property
    def sha256(self) -> str:
        """Of its texts, in their order, in hex."""
        digest = hashlib.sha256()
        for text in self._texts:
            digest.update(hashlib.sha256(text.encode()).digest())  # so that where a text ends counts too
        return digest.hexdigest()

    def sentences(self, rng: random.Random) -> Iterator[Sentence]:
        """Sentences without end, from a random one on.

        A text is chosen by its share of the characters; after its end the next text follows, so that nothing
        comes again before every text was read once.
        """
        first = bisect.bisect_right(self._ends, rng.randrange(self._ends[-1]))
        start = rng.randrange(len(self._split(first)))
        yield from self._split(first)[start:]
        for number in itertools.count(first + 1):
            yield from self._split(number % len(self._texts))

    def token_counts(self, tokenizer: Any, sentences: list[Sentence]) -> list[int]:
        """Tokens of each sentence after a space, encoded alone; counted once per tokenizer and sentence."""
        known = self._counts.setdefault(tokenizer, {})
        new = [s for s in dict.fromkeys(sentences) if s.place not in known]
        counts = token_counter(tokenizer).count_each([" " + s.text for s in new])
        for sentence, count in zip(new, counts, strict=True):
            known[sentence.place] = max(1, count)  # none for characters that a tokenizer drops
        return [known[sentence.place] for sentence in sentences]

    def _split(self, number: int) -> list[Sentence]:
        if number not in self._sentences:
            self._sentences[number] = split_sentences(self._texts[number], number)
        return self._sentences[number]
