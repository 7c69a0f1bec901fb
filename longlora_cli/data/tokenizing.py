"""Documents to tokens, in batches that keep all cores busy and memory bounded."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from longlora_cli.data.chat_template import render_chats, require_template
from longlora_cli.data.chunk import IGNORE, Int32
from longlora_cli.data.chunking import TokenizedDocument
from longlora_cli.data.documents import Document
from longlora_cli.data.encoding import SafeEncoder, safe_encoder
from longlora_cli.errors import DataError

# Encoding one batch holds about 150 bytes a token beside its ids: 4M characters are some 150 MB.
_BATCH_CHARACTERS = 1 << 22
_BATCH_DOCUMENTS = 4096
# A piece that one core encodes in about 0.1 s, so that cores finish together.
_PIECE_CHARACTERS = 1 << 16
# Text on both sides of a seam that must encode alike with and without the seam.
_SEAM_CHARACTERS = 256
_BLANK_LINE = re.compile(r"\n\n+(?=\S)")


def tokenize(
    documents: Iterable[Document], tokenizer: Any, *, labels: Literal["assistant", "all"]
) -> Iterator[TokenizedDocument]:
    """Tokenize documents in order.

    Texts get the tokens that the tokenizer itself puts around a text (BOS, if it does) and its EOS at the
    end; all but the first token are learnt. Chats are rendered with the tokenizer's template.

    Args:
        documents: Texts and chats.
        tokenizer: A fast tokenizer.
        labels: For chats: learn what the assistant says, or everything.

    Raises:
        DataError: A chat and no template, or a chat that the template refuses; the message names its source.
    """
    for batch in _batches(documents):
        texts = iter(encode_texts(tokenizer, [d.content for d in batch if isinstance(d.content, str)]))
        chats = iter(_render(tokenizer, [d for d in batch if d.is_chat]))
        for document in batch:
            ids, learnt = next(chats) if document.is_chat else (next(texts), None)
            if learnt is None or labels == "all":
                learnt = ids.copy()
                learnt[:1] = IGNORE
            yield TokenizedDocument(document.source, document.is_chat, ids, learnt)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        content = document.content
        characters += len(content) if isinstance(content, str) else sum(len(m["content"]) for m in content)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _render(tokenizer: Any, documents: list[Document]) -> list[tuple[Int32, Int32]]:
    if not documents:
        return []
    require_template(tokenizer)
    chats = [document.content for document in documents if isinstance(document.content, list)]
    try:
        return render_chats(tokenizer, chats)
    except DataError:
        for document, chat in zip(documents, chats, strict=True):  # find the one that is meant
            try:
                render_chats(tokenizer, [chat])
            except DataError as error:
                raise DataError(f"{document.source}: {error.message}", rule=error.rule) from error
        raise


def encode_texts(tokenizer: Any, texts: list[str]) -> list[Int32]:
    """Ids of texts, int32 `[tokens]` each, with the tokenizer's own begin and end tokens, and EOS."""
    encoder = safe_encoder(tokenizer)
    end = list(encoder.end)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in end:
        end.append(tokenizer.eos_token_id)
    frame = (np.array(encoder.begin, dtype=np.int32), np.array(end, dtype=np.int32))
    return [np.concatenate([frame[0], ids, frame[1]]) for ids in encode_long(encoder, texts)]


def encode_long(encoder: SafeEncoder, texts: list[str]) -> list[Int32]:
    """Ids of texts of any length, int32 `[tokens]` each, without begin and end tokens.

    Long texts are cut at blank lines and their pieces encoded at once. A seam is used only if the text around
    it, 256 characters to each side, encodes to the same ids with the seam as without; tokenizers that split
    text at spaces or lines before they merge then give exactly the whole text's ids. A tokenizer for which no
    seam holds encodes each text whole.
    """
    parts = [(number, piece) for number, text in enumerate(texts) for piece in _pieces(encoder, text)]
    found: list[list[Int32]] = [[] for _ in texts]
    for group in _groups(parts):
        for (number, _), ids in zip(group, encoder.encode_batch([p for _, p in group]), strict=True):
            found[number].append(ids)
    return [np.concatenate(pieces) for pieces in found]


def _groups(parts: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    group: list[tuple[int, str]] = []
    characters = 0
    for part in parts:
        group.append(part)
        characters += len(part[1])
        if characters >= _BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _pieces(encoder: SafeEncoder, text: str) -> list[str]:
    seams = _seams(encoder, text) if len(text) >= 2 * _PIECE_CHARACTERS else []
    bounds = [0, *seams, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def _seams(encoder: SafeEncoder, text: str) -> list[int]:
    """Where to cut: in the blank line that ends a piece, before its last newline or after it."""
    candidates: list[tuple[int, int]] = []
    place = _PIECE_CHARACTERS
    while (match := _BLANK_LINE.search(text, place)) is not None:
        candidates.append((match.end() - 1, match.end()))
        place = match.end() + _PIECE_CHARACTERS
    places = [place for pair in candidates for place in pair]
    windows = []
    for place in places:
        left, right = text[max(0, place - _SEAM_CHARACTERS) : place], text[place : place + _SEAM_CHARACTERS]
        windows += [left + right, left, right]
    encoded = [ids.tolist() for ids in encoder.encode_batch(windows)]
    holds = {
        place: encoded[3 * i] == encoded[3 * i + 1] + encoded[3 * i + 2] for i, place in enumerate(places)
    }
    return [next(place for place in pair if holds[place]) for pair in candidates if any(map(holds.get, pair))]
