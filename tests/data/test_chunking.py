from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.data.chunk import IGNORE
from longlora_cli.data.chunking import Counts, Cutter, TokenizedDocument
from longlora_cli.errors import DataError


def document(tokens: int, *, is_chat: bool = False) -> TokenizedDocument:
    ids = np.arange(100, 100 + tokens, dtype=np.int32)
    labels = ids.copy()
    labels[:1] = IGNORE
    return TokenizedDocument("book.txt", is_chat, ids, labels)


@given(
    tokens=st.integers(1, 300),
    max_length=st.integers(8, 64),
    overlap=st.integers(0, 63),
    min_length=st.integers(0, 64),
)
def test_pieces_put_together_again_are_the_document(
    tokens: int, max_length: int, overlap: int, min_length: int
) -> None:
    overlap, min_length = min(overlap, max_length - 1), min(min_length, max_length)
    cutter, counts = Cutter(max_length, 0, overlap, "split"), Counts()
    pieces = cutter.cut(document(tokens), counts)
    joined = np.concatenate([ids[overlap if n else 0 :] for n, (ids, _) in enumerate(pieces)])
    assert np.array_equal(joined, document(tokens).ids)
    assert all(len(ids) <= max_length for ids, _ in pieces)
    assert len(pieces) == 1 or len(pieces[-1][0]) > overlap  # no piece holds only what another holds

    counts = Counts()
    kept = Cutter(max_length, min_length, overlap, "split").cut(document(tokens), counts)
    assert all(len(ids) >= min_length for ids, _ in kept)
    held = sum(len(ids) for ids, _ in kept)
    assert counts.tokens_read == tokens
    assert counts.tokens_read + counts.tokens_repeated - counts.tokens_dropped == held


@given(tokens=st.integers(1, 200), max_length=st.integers(8, 64), overlap=st.integers(0, 63))
def test_each_token_is_learnt_at_most_once(tokens: int, max_length: int, overlap: int) -> None:
    pieces = Cutter(max_length, 0, min(overlap, max_length - 1)).cut(document(tokens), Counts())
    learnt = np.concatenate([labels[labels != IGNORE] for _, labels in pieces])
    assert len(set(learnt.tolist())) == len(learnt)
    assert all(labels[0] == IGNORE for _, labels in pieces)


def test_truncation_keeps_the_beginning_and_counts_the_rest() -> None:
    counts = Counts()
    [(ids, _)] = Cutter(16, on_long="truncate").cut(document(50), counts)
    assert ids.tolist() == document(50).ids[:16].tolist()
    assert (counts.documents_truncated, counts.tokens_dropped) == (1, 34)


def test_dropping_leaves_long_texts_out_and_counts_them() -> None:
    counts = Counts()
    assert Cutter(16, on_long="drop").cut(document(50), counts) == []
    assert (counts.documents_dropped, counts.tokens_dropped) == (1, 50)


@pytest.mark.parametrize("on_long", ["split", "truncate", "drop"])
def test_long_chats_are_left_out_whole(on_long: str) -> None:
    counts = Counts()
    assert Cutter(16, on_long=on_long).cut(document(50, is_chat=True), counts) == []  # type: ignore[arg-type]
    assert (counts.chats_dropped, counts.documents_split, counts.documents_truncated) == (1, 0, 0)


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_long_document_is_an_error_when_asked_for(is_chat: bool) -> None:
    with pytest.raises(DataError, match=r"book.txt: 50 tokens, more than --max-length 16"):
        Cutter(16, on_long="error").cut(document(50, is_chat=is_chat), Counts())


def test_short_documents_and_short_ends_are_counted_apart() -> None:
    counts = Counts()
    cutter = Cutter(16, min_length=10)
    assert cutter.cut(document(5), counts) == []
    assert len(cutter.cut(document(35), counts)) == 2
    assert (counts.documents_dropped, counts.pieces_dropped, counts.tokens_dropped) == (1, 1, 8)
