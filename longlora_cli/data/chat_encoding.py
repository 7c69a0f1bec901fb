"""Renderings of chats to ids, and which characters each token covers, with memory that does not grow with a chat.

The library's encodings take 200 to 330 bytes for a byte of text while they are made, and 100 more as Python's offsets.
So long contents are cut where that is exact (`seams.Seams`), never at the template's text, and encoded piece by piece;
what is kept of a token are its id and where it begins and ends: 12 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from longlora_cli.data.chunk import Int32
from longlora_cli.data.encoding import SafeEncoder
from longlora_cli.data.rendering import Part
from longlora_cli.errors import DataError

_PIECE_CHARACTERS = 1 << 15
# Pieces that are encoded at once; a stretch without a place to cut is one piece, of at most 0.9 GB.
_BATCH_BYTES = 1 << 20
_MOST_PIECE_BYTES = 5 << 19


class EncodedChat(NamedTuple):
    """A rendering's tokens.

    Args:
        ids: int32 `[tokens]`.
        spans: First character of each token and the one behind its last, special tokens counted by their secret
            names; int32 `[tokens, 2]`.
    """

    ids: Int32
    spans: Int32


class _Piece(NamedTuple):
    chat: int
    start: int
    text: str
    size_bytes: int


def text_of(parts: list[Part], encoder: SafeEncoder) -> str:
    """What is encoded: contents as they are, the template's special tokens by their secret names."""
    return "".join(encoder.secret(part.text) if part.trusted else part.text for part in parts)


def encode_layouts(encoder: SafeEncoder, layouts: list[list[Part]]) -> list[EncodedChat]:
    """Encode chats that were laid out, as whole texts would be; all cores work on them.

    Raises:
        DataError: 2.5 MiB of a chat without a place where the tokenizer can be cut.
    """
    found: list[list[tuple[Int32, Int32]]] = [[] for _ in layouts]
    pieces = (piece for chat, parts in enumerate(layouts) for piece in _pieces(encoder, chat, parts))
    for batch in _batches(pieces):
        encodings = encoder.encode_with_offsets([(piece.text, piece.start == 0) for piece in batch])
        for piece, encoding in zip(batch, encodings, strict=True):
            spans = np.array(encoding.offsets, np.int32).reshape(-1, 2) + np.int32(piece.start)
            found[piece.chat].append((encoder.ids(encoding), spans))
    return [
        EncodedChat(np.concatenate([ids for ids, _ in own]), np.concatenate([spans for _, spans in own]))
        for own in found
    ]


def _pieces(encoder: SafeEncoder, chat: int, parts: list[Part]) -> Iterator[_Piece]:
    text = text_of(parts, encoder)
    for start, stop in pairwise([0, *_cuts(encoder, parts), len(text)]):
        piece = text[start:stop]
        size_bytes = len(piece) if piece.isascii() else len(piece.encode("utf-8", "surrogatepass"))
        if size_bytes > _MOST_PIECE_BYTES:
            raise DataError(
                f"{len(piece):,} characters of the chat have no place where the tokenizer can be cut",
                rule=f"They are tokenized whole, 330 bytes of memory for a byte: {_MOST_PIECE_BYTES:,} bytes at most.",
                hint="Put spaces or line ends into them, or leave this chat out.",
            )
        yield _Piece(chat, start, piece, size_bytes)


def _cuts(encoder: SafeEncoder, parts: list[Part]) -> list[int]:
    """Places to cut, all inside of contents, which hold no special tokens."""
    if (
        encoder.seams.prefixes_again
    ):  # after special tokens, too, which pieces after the first would go without
        return []
    places: list[int] = []
    start = 0
    for part in parts:
        if not part.trusted:
            places += [start + place for place in encoder.seams.cuts(part.text, _PIECE_CHARACTERS)]
        start += len(encoder.secret(part.text) if part.trusted else part.text)
    return places


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size_bytes = 0
    for piece in pieces:
        if batch and size_bytes + piece.size_bytes > _BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
        batch.append(piece)
        size_bytes += piece.size_bytes
    if batch:
        yield batch
