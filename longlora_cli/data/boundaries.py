"""Where a text may be cut between tokens: at chapters, paragraphs and sentences, found from its ids alone.

Each vocabulary entry is spelt out once as the bytes it stands for. The bytes of a window of ids are then its text,
as the tokenizer normalized it, and every token's place in it is known, so that a boundary between two characters
is one between two tokens. A tokenizer that leaves line ends out (BERT's, T5's) leaves only sentences to be found.

- A chapter begins at a Markdown heading (`# ...` to `###### ...`); after a blank line, at a short line that begins
  with Chapter, Book, Part, Volume, Section, Letter, Act, Scene, Canto or Appendix, capitalized or in capitals, and a
  number (digits, Roman, one to twenty, the First ...), or that is only a Roman number in capitals; or after a form
  feed.
- A paragraph begins after a blank line.
- A sentence begins after `.`, `!`, `?` or `…`, closing quotes and brackets, and white space, but not after a
  common title such as `Mr.`; also after the full stops of Chinese and Japanese.
"""

from __future__ import annotations

import bisect
import json
import re
from typing import Any, Literal

import numpy as np

from longlora_cli.data.chunk import Int32
from longlora_cli.data.token_file import Ids

Boundary = Literal["chapter", "paragraph", "sentence", "token"]
ORDER: tuple[Boundary, ...] = ("chapter", "paragraph", "sentence", "token")
"""From the strongest to the weakest; where one is not found, the next is looked for."""

# A heading is recognized by what follows it.
_AHEAD_TOKENS = 128
_SPACE = b" \t\r\n\f\v"
_ROMAN = rb"(?=[IVXLCDM])M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})"
_NUMBER = (
    rb"(?:\d{1,4}|" + _ROMAN + b"|" + _ROMAN.lower() + b"|(?i:(?:the )?(?:"
    rb"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    rb"|eighteen|nineteen|twenty|thirty|forty|fifty|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth"
    rb"|last)))"
)
_NAMES = b"Chapter Book Part Volume Section Letter Act Scene Canto Appendix".split()
_NAME = b"(?:" + b"|".join(name + b"|" + name.upper() for name in _NAMES) + b")"
# The number may stand in the line after the name; alone, it is Roman and in capitals.
_HEADING = (
    rb"(?:" + _NAME + rb"(?:[ \t]+|[ \t]*\r?\n[ \t]*)" + _NUMBER + rb"\b[^\n]{0,80}(?:\n|\Z)"
    rb"|" + _ROMAN + rb"\.?[ \t\r]*(?:\n|\Z))"
)
# Each begins with a line end or a punctuation mark and takes all white space after it, giving none back: long runs of
# spaces or line ends are passed over once. The end of the match is where the new part begins.
_PATTERNS: dict[Boundary, re.Pattern[bytes]] = {
    "chapter": re.compile(
        rb"\n[ ]{0,3}(?=#{1,6}[ \t]+[^\s#])|\n[ \t\r]*+\n[ \t]*+(?=" + _HEADING + rb")|\f\s*+"
    ),
    "paragraph": re.compile(rb"\n[ \t\r\f\v]*+\n\s*+"),
    "sentence": re.compile(
        rb"(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)"
        rb"(?:[.!?]|\xe2\x80\xa6)(?:[\"')\]]|\xe2\x80[\x99\x9d]|\xc2\xbb){0,4}\s++"
        rb"|\xe3\x80\x82|\xef\xbc[\x81\x9f]"
    ),
}


class Boundaries:
    """The boundaries of tokenized texts.

    Args:
        tokenizer: A fast tokenizer; its vocabulary is spelt out once (0.1 s for 128,000 entries).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._spelt = _spelling(tokenizer)
        self._sizes = np.array([len(text) for text in self._spelt], dtype=np.int64)

    def last(self, ids: Ids, first: int, limit: int, wanted: Boundary) -> tuple[int, Boundary]:
        """The last place up to `limit` where a part of the wanted kind begins, or else of the next weaker kind.

        Args:
            ids: A text, int32 `[tokens]`; only tokens around the range are looked at if it is a view.
            first: The earliest token that may begin a part, at least 1.
            limit: The latest one, at least `first`.
            wanted: What to look for first.

        Returns:
            The token that begins the part, and the kind found; `limit` itself where there is only `token`.
        """
        start = first - 1  # a blank line may begin in the token before; what is before that does not matter
        window = ids[start : limit + _AHEAD_TOKENS]
        text, offsets = self._text(window)
        for kind in ORDER[ORDER.index(wanted) :]:
            if kind == "token":
                break
            found = _token_places(_PATTERNS[kind], text, offsets)
            place = bisect.bisect_right(found, limit - start) - 1
            if place >= 0 and found[place] + start >= first:
                return found[place] + start, kind
        return limit, "token"

    def first(self, ids: Ids, first: int, limit: int) -> int:
        """The first place in `first ... limit - 1` where a paragraph begins, or else a sentence; else `first`."""
        start = max(first - 1, 0)
        text, offsets = self._text(ids[start : limit + 1])
        for kind in ("paragraph", "sentence"):
            found = _token_places(_PATTERNS[kind], text, offsets)  # type: ignore[index]
            place = bisect.bisect_left(found, first - start)
            if place < len(found) and found[place] + start < limit:
                return found[place] + start
        return first

    def _text(self, ids: Int32) -> tuple[bytes, list[int]]:
        """The bytes of ids, and where each token begins in them, and where the last one ends."""
        text = b"".join(map(self._spelt.__getitem__, ids.tolist()))
        offsets = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(self._sizes[ids], out=offsets[1:])
        return text, offsets.tolist()


def _token_places(pattern: re.Pattern[bytes], text: bytes, offsets: list[int]) -> list[int]:
    """Tokens that begin a part, rising.

    The white space before a part may be one token with it, or with the part before: a token that begins anywhere in
    that white space will do, the last one of them. Where a token holds the end of one part and the beginning of the
    next there is no place between them.
    """
    places = []
    for match in pattern.finditer(text):
        begin = match.end()
        # Tokens of no bytes (special ones) stand before what begins there.
        token = bisect.bisect_right(offsets, begin) - 1
        earliest = begin
        while earliest > match.start() and text[earliest - 1 : earliest] in _WHITE:
            earliest -= 1
        if offsets[token] >= earliest:
            places.append(token)
    return places


_WHITE = frozenset(_SPACE[i : i + 1] for i in range(len(_SPACE)))


def _spelling(tokenizer: Any) -> list[bytes]:
    """The bytes each id stands for; none for special tokens and ids without an entry."""
    backend = tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    size = max([*vocabulary.values(), *added, -1]) + 1
    state = json.loads(backend.to_str())
    # The model's entries are left out: they may spell the names of components.
    parts = json.dumps([state.get(part) for part in ("pre_tokenizer", "decoder", "normalizer")])
    spell = (
        _byte_level if '"ByteLevel"' in parts else _word_piece if '"WordPiece"' in parts else _sentence_piece
    )
    spelt = [b""] * size
    for entry, number in vocabulary.items():
        spelt[number] = spell(entry)
    for number, token in added.items():
        spelt[number] = b"" if token.special else token.content.encode("utf-8", "replace")
    return spelt


def _byte_characters() -> dict[str, int]:
    """GPT-2's table of printable characters for all bytes (Radford et al. 2019): the others are moved above 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(moved)}


_BYTES = _byte_characters()
_BYTE_ENTRY = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level(entry: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in entry)
    except KeyError:
        return entry.encode("utf-8", "replace")


def _sentence_piece(entry: str) -> bytes:
    if match := _BYTE_ENTRY.fullmatch(entry):
        return bytes([int(match[1], 16)])
    return entry.replace("▁", " ").encode("utf-8", "replace")


def _word_piece(entry: str) -> bytes:
    return entry[2:].encode() if entry.startswith("##") else b" " + entry.encode("utf-8", "replace")
