"""Cut long documents to the chunk length, and count exactly what was cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from longlora_cli.data.boundaries import Boundaries, Boundary
from longlora_cli.data.chunk import IGNORE, Int32
from longlora_cli.data.token_file import Ids
from longlora_cli.errors import DataError

OnLong = Literal["split", "truncate", "truncate-left", "truncate-middle", "drop", "error"]
Spans = list[tuple[int, int]]
"""The parts of a document, from token to token, that one piece is made of."""


@dataclass(frozen=True)
class TokenizedDocument:
    """A document's tokens.

    Args:
        source: Where it comes from.
        is_chat: Chats are never split or truncated.
        ids: int32 `[tokens]`.
        labels: int32 `[tokens]`, `IGNORE` where nothing is learnt; None where all but the first token is.
    """

    source: str
    is_chat: bool
    ids: Ids
    labels: Int32 | None


@dataclass
class Counts:
    """What went in and what was cut; always `tokens_read + tokens_repeated - tokens_dropped` = tokens kept.

    Args:
        documents: Texts read.
        chats: Chats read, synthetic ones included.
        documents_split: Texts that became several pieces.
        documents_truncated: Texts that lost their end, their beginning or their middle.
        documents_dropped: Texts left out whole: too long under `drop`, or too short.
        chats_dropped: Chats left out: too long, or too short.
        pieces_dropped: Ends of split texts left out for being shorter than the least length.
        tokens_read: Tokens of everything read.
        tokens_dropped: Tokens that no chunk holds.
        tokens_repeated: Tokens that a piece holds and the one before it too, by the overlap.
        cuts_at_chapter: Cuts of split texts before a chapter.
        cuts_at_paragraph: Before a paragraph.
        cuts_at_sentence: Before a sentence.
        cuts_at_token: Anywhere, because that was asked for or nothing better was within reach.
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
    cuts_at_chapter: int = 0
    cuts_at_paragraph: int = 0
    cuts_at_sentence: int = 0
    cuts_at_token: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counts by name, for the manifest and the result."""
        return asdict(self)


@dataclass(frozen=True)
class Cutter:
    """The rule by which documents are cut.

    Args:
        max_length: Most tokens of a piece.
        min_length: Pieces and documents with fewer tokens are left out.
        overlap: Tokens that consecutive pieces of a text share; below `max_length`. At most so many with
            boundaries: the next piece then begins with a paragraph or sentence, if one begins among them.
        on_long: What happens to longer texts: they are split, lose their end (`truncate`), their beginning
            (`truncate-left`) or their middle, are left out, or are an error. Longer chats are left out, or an
            error under `error`.
        split_at: A piece ends at the last boundary of this kind within `max_length`; where there is none, at one
            of the next weaker kind: chapter, paragraph, sentence, token. A boundary that would leave less than
            `min_length`, or nothing beyond the overlap, does not count.
        learn_overlap: Tokens of an overlap are learnt in each piece that holds them.
        boundaries: Finds the boundaries; needed but for `split_at="token"`.
    """

    max_length: int
    min_length: int = 0
    overlap: int = 0
    on_long: OnLong = "split"
    split_at: Boundary = "token"
    learn_overlap: bool = False
    boundaries: Boundaries | None = None

    def cut(self, document: TokenizedDocument, counts: Counts) -> Iterator[tuple[Int32, Int32]]:
        """The pieces (ids, labels) of one document, each copied when it is asked for; `counts` is kept up at once.

        The first label of every piece is `IGNORE`, and that of the first token after a cut-out middle. Unless
        `learn_overlap`, so are those of the tokens that the piece before it already holds: an overlap is
        context, each token is learnt once.

        Raises:
            DataError: The document is too long and `on_long` is `error`.
        """
        tokens = len(document.ids)
        counts.tokens_read += tokens
        counts.chats += document.is_chat
        counts.documents += not document.is_chat
        pieces = self._pieces(document, counts)
        kept = [spans for spans in pieces if _size(spans) >= self.min_length]
        if not kept:
            counts.chats_dropped += document.is_chat
            counts.documents_dropped += not document.is_chat
        else:
            counts.documents_split += len(pieces) > 1
            counts.documents_truncated += len(pieces) == 1 and _size(pieces[0]) < tokens
            counts.pieces_dropped += len(pieces) - len(kept)
        ends = [0, *(spans[-1][1] for spans in kept)]
        repeated = [max(ends[number] - spans[0][0], 0) for number, spans in enumerate(kept)]
        counts.tokens_repeated += sum(repeated)
        counts.tokens_dropped += tokens - (sum(map(_size, kept)) - sum(repeated))
        masked = [0] * len(kept) if self.learn_overlap else repeated
        return (_piece(document, spans, shared) for spans, shared in zip(kept, masked, strict=True))

    def _pieces(self, document: TokenizedDocument, counts: Counts) -> list[Spans]:
        tokens = len(document.ids)
        if tokens <= self.max_length:
            return [[(0, tokens)]]
        if self.on_long == "error":
            raise DataError(
                f"{document.source}: {tokens:,} tokens, more than --max-length {self.max_length:,}",
                hint="Raise --max-length, or choose another --on-long.",
            )
        if document.is_chat or self.on_long == "drop":
            return []
        if self.on_long == "truncate":
            return [[(0, self.max_length)]]
        if self.on_long == "truncate-left":
            return [[(tokens - self.max_length, tokens)]]
        if self.on_long == "truncate-middle":
            tail = self.max_length // 2
            return [[(0, self.max_length - tail), (tokens - tail, tokens)]]
        return self._split(document.ids, counts)

    def _split(self, ids: Ids, counts: Counts) -> list[Spans]:
        pieces: list[Spans] = []
        start = 0
        while len(ids) - start > self.max_length:
            end, begin, kind = start + self.max_length, start + self.max_length - self.overlap, "token"
            if self.split_at != "token" and self.boundaries is not None:
                least = start + max(self.overlap + 1, self.min_length)
                end, kind = self.boundaries.last(ids, least, end, self.split_at)
                begin = self.boundaries.first(ids, end - self.overlap, end) if self.overlap else end
            name = f"cuts_at_{kind}"
            setattr(counts, name, getattr(counts, name) + 1)
            pieces.append([(start, end)])
            start = begin
        return [*pieces, [(start, len(ids))]]


def _size(spans: Spans) -> int:
    return sum(end - start for start, end in spans)


def _piece(document: TokenizedDocument, spans: Spans, shared: int) -> tuple[Int32, Int32]:
    """Ids and labels of a piece, the first `shared` labels masked."""
    ids = np.concatenate([document.ids[start:end] for start, end in spans])
    learnt = document.labels
    labels = ids.copy() if learnt is None else np.concatenate([learnt[start:end] for start, end in spans])
    labels[:shared] = IGNORE
    labels[np.cumsum([0, *(end - start for start, end in spans[:-1])])] = IGNORE
    return ids, labels
