"""Cut long documents to the chunk length, and count exactly what was cut."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from longlora_cli.data.chunk import IGNORE, Int32
from longlora_cli.errors import DataError

OnLong = Literal["split", "truncate", "drop", "error"]


@dataclass(frozen=True)
class TokenizedDocument:
    """A document's tokens.

    Args:
        source: Where it comes from.
        is_chat: Chats are never split or truncated.
        ids: int32 `[tokens]`.
        labels: int32 `[tokens]`, `IGNORE` where nothing is learnt.
    """

    source: str
    is_chat: bool
    ids: Int32
    labels: Int32


@dataclass
class Counts:
    """What went in and what was cut; always `tokens_read + tokens_repeated - tokens_dropped` = tokens kept.

    Args:
        documents: Texts read.
        chats: Chats read, synthetic ones included.
        documents_split: Texts that became several pieces.
        documents_truncated: Texts that lost their end.
        documents_dropped: Texts left out whole: too long under `drop`, or too short.
        chats_dropped: Chats left out: too long, or too short.
        pieces_dropped: Ends of split texts left out for being shorter than the least length.
        tokens_read: Tokens of everything read.
        tokens_dropped: Tokens that no chunk holds.
        tokens_repeated: Tokens that two pieces hold, by the overlap.
    """

    documents: int = 0
    chats: int = 0
    documents_split: int = 0
    documents_truncated: int = 0
    documents_dropped: int = 0
    chats_dropped: int = 0
    pieces_dropped: int = 0
    tokens_read: int = 0
    tokens_dropped: int = 0
    tokens_repeated: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts by name, for the manifest and the result."""
        return asdict(self)


@dataclass(frozen=True)
class Cutter:
    """The rule by which documents are cut.

    Args:
        max_length: Most tokens of a piece.
        min_length: Pieces and documents with fewer tokens are left out.
        overlap: Tokens that consecutive pieces of a text share; below `max_length`.
        on_long: What happens to longer texts. Longer chats are left out, or an error under `error`.
    """

    max_length: int
    min_length: int = 0
    overlap: int = 0
    on_long: OnLong = "split"

    def cut(self, document: TokenizedDocument, counts: Counts) -> list[tuple[Int32, Int32]]:
        """The pieces (ids, labels) of one document; `counts` is kept up.

        The first label of every piece is `IGNORE`, and so are those of the tokens that the piece before it
        already holds: an overlap is context, each token is learnt once.

        Raises:
            DataError: The document is too long and `on_long` is `error`.
        """
        tokens = len(document.ids)
        counts.tokens_read += tokens
        counts.chats += document.is_chat
        counts.documents += not document.is_chat
        spans = self._spans(document)
        kept = [span for span in spans if span[1] - span[0] >= self.min_length]
        if not kept:
            counts.chats_dropped += document.is_chat
            counts.documents_dropped += not document.is_chat
        else:
            counts.documents_split += len(spans) > 1
            counts.documents_truncated += spans[-1][1] < tokens
            counts.pieces_dropped += len(spans) - len(kept)
        held = sum(end - start for start, end in kept)
        repeated = self.overlap * max(len(kept) - 1, 0)
        counts.tokens_repeated += repeated
        counts.tokens_dropped += tokens - (held - repeated)
        return [self._piece(document, start, end) for start, end in kept]

    def _spans(self, document: TokenizedDocument) -> list[tuple[int, int]]:
        tokens = len(document.ids)
        if tokens <= self.max_length:
            return [(0, tokens)]
        if self.on_long == "error":
            raise DataError(
                f"{document.source}: {tokens:,} tokens, more than --max-length {self.max_length:,}",
                hint="Raise --max-length, or choose another --on-long.",
            )
        if document.is_chat or self.on_long == "drop":
            return []
        if self.on_long == "truncate":
            return [(0, self.max_length)]
        step = self.max_length - self.overlap
        starts = range(0, tokens - self.overlap, step)
        return [(start, min(start + self.max_length, tokens)) for start in starts]

    def _piece(self, document: TokenizedDocument, start: int, end: int) -> tuple[Int32, Int32]:
        labels = document.labels[start:end].copy()
        labels[: max(1, self.overlap if start else 1)] = IGNORE
        return np.ascontiguousarray(document.ids[start:end]), labels
