"""How many tokens texts have, where most of their sentences were counted before.

A synthetic chat is rendered several times until it has the wanted length, and each rendering differs from the one
before in a few places. A text is cut after its sentences, where that is exact (`seams.Seams`); only pieces that were
never met are encoded. The counts are those of the whole text.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from longlora_cli.data.encoding import SafeEncoder, safe_encoder

# After a full stop with its closing quotes and brackets, before a space.
_SENTENCE_END = re.compile(r"[.!?][\"'”’»)\]]*(?= )")
# Text of the pieces that are remembered: about 100 MB with their counts; then they are forgotten at once.
_MOST_CHARACTERS = 1 << 25


class TokenCounter:
    """Exact token counts with a memory.

    Args:
        encoder: Encodes; its seams say where texts may be cut.
    """

    def __init__(self, encoder: SafeEncoder) -> None:
        self._encoder = encoder
        self._known: dict[tuple[str, bool], int] = {}
        self._characters = 0

    def count(self, text: str) -> int:
        """Tokens of a text, without begin and end tokens; special tokens may stand in it by their secret names."""
        seams = self._encoder.seams
        if seams.prefixes_again:  # after each special token, too
            return len(self._encoder.encode_batch([text])[0])
        ends = (match.end() for match in _SENTENCE_END.finditer(text))
        bounds = [0, *(end for end in ends if seams.exact(text[end - 1], " ")), len(text)]
        begins = not self._encoder.has_inner
        return sum(self._counts([(text[a:b], begins or a == 0) for a, b in pairwise(bounds)]))

    def count_each(self, texts: list[str]) -> list[int]:
        """Tokens of each text."""
        return self._counts([(text, True) for text in texts])

    def _counts(self, pieces: list[tuple[str, bool]]) -> list[int]:
        known = self._known
        if self._characters > _MOST_CHARACTERS:
            known.clear()
            self._characters = 0
        new = [piece for piece in dict.fromkeys(pieces) if piece not in known]
        for piece, ids in zip(new, self._encoder.encode_pieces(new), strict=True):
            known[piece] = len(ids)
            self._characters += len(piece[0])
        return [known[piece] for piece in pieces]


_COUNTERS: WeakKeyDictionary[SafeEncoder, TokenCounter] = WeakKeyDictionary()


def token_counter(tokenizer: Any) -> TokenCounter:
    """The tokenizer's counter, made once."""
    encoder = safe_encoder(tokenizer)
    if encoder not in _COUNTERS:
        _COUNTERS[encoder] = TokenCounter(encoder)
    return _COUNTERS[encoder]
