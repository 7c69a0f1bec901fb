from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longlora_cli.data.boundaries import Boundaries
from longlora_cli.data.chunk import IGNORE
from longlora_cli.data.chunking import Counts, Cutter, TokenizedDocument
from longlora_cli.data.tokenizing import encode_texts
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
    pieces = list(cutter.cut(document(tokens), counts))
    joined = np.concatenate([ids[overlap if n else 0 :] for n, (ids, _) in enumerate(pieces)])
    assert np.array_equal(joined, document(tokens).ids)
    assert all(len(ids) <= max_length for ids, _ in pieces)
    assert len(pieces) == 1 or len(pieces[-1][0]) > overlap  # no piece holds only what another holds

    counts = Counts()
    kept = list(Cutter(max_length, min_length, overlap, "split").cut(document(tokens), counts))
    assert all(len(ids) >= min_length for ids, _ in kept)
    held = sum(len(ids) for ids, _ in kept)
    assert counts.tokens_read == tokens
    assert counts.tokens_read + counts.tokens_repeated - counts.tokens_dropped == held


@given(tokens=st.integers(1, 200), max_length=st.integers(8, 64), overlap=st.integers(0, 63))
def test_each_token_is_learnt_at_most_once(tokens: int, max_length: int, overlap: int) -> None:
    pieces = list(Cutter(max_length, 0, min(overlap, max_length - 1)).cut(document(tokens), Counts()))
    learnt = np.concatenate([labels[labels != IGNORE] for _, labels in pieces])
    assert len(set(learnt.tolist())) == len(learnt)
    assert all(labels[0] == IGNORE for _, labels in pieces)


def test_truncation_keeps_the_beginning_and_counts_the_rest() -> None:
    counts = Counts()
    [(ids, _)] = list(Cutter(16, on_long="truncate").cut(document(50), counts))
    assert ids.tolist() == document(50).ids[:16].tolist()
    assert (counts.documents_truncated, counts.tokens_dropped) == (1, 34)


def test_dropping_leaves_long_texts_out_and_counts_them() -> None:
    counts = Counts()
    assert list(Cutter(16, on_long="drop").cut(document(50), counts)) == []
    assert (counts.documents_dropped, counts.tokens_dropped) == (1, 50)


@pytest.mark.parametrize("on_long", ["split", "truncate", "drop"])
def test_long_chats_are_left_out_whole(on_long: str) -> None:
    counts = Counts()
    assert list(Cutter(16, on_long=on_long).cut(document(50, is_chat=True), counts)) == []  # type: ignore[arg-type]
    assert (counts.chats_dropped, counts.documents_split, counts.documents_truncated) == (1, 0, 0)


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_long_document_is_an_error_when_asked_for(is_chat: bool) -> None:
    with pytest.raises(DataError, match=r"book.txt: 50 tokens, more than --max-length 16"):
        Cutter(16, on_long="error").cut(document(50, is_chat=is_chat), Counts())


def test_short_documents_and_short_ends_are_counted_apart() -> None:
    counts = Counts()
    cutter = Cutter(16, min_length=10)
    assert list(cutter.cut(document(5), counts)) == []
    assert len(list(cutter.cut(document(35), counts))) == 2
    assert (counts.documents_split, counts.documents_truncated, counts.cuts_at_token) == (1, 0, 2)
    assert (counts.documents_dropped, counts.pieces_dropped, counts.tokens_dropped) == (1, 1, 8)


def test_truncation_at_the_left_keeps_the_end() -> None:
    counts = Counts()
    [(ids, labels)] = list(Cutter(16, on_long="truncate-left").cut(document(50), counts))
    assert ids.tolist() == document(50).ids[-16:].tolist()
    assert labels.tolist() == [IGNORE, *ids.tolist()[1:]]
    assert (counts.documents_truncated, counts.tokens_dropped) == (1, 34)


@pytest.mark.parametrize(("most", "head", "tail"), [(16, 8, 8), (15, 8, 7)])
def test_truncation_in_the_middle_keeps_both_ends(most: int, head: int, tail: int) -> None:
    counts = Counts()
    [(ids, labels)] = list(Cutter(most, on_long="truncate-middle").cut(document(50), counts))
    whole = document(50).ids.tolist()
    assert ids.tolist() == whole[:head] + whole[-tail:]
    assert (counts.documents_truncated, counts.tokens_dropped) == (1, 50 - most)
    # What follows the gap cannot be told from what is before it.
    assert np.flatnonzero(labels == IGNORE).tolist() == [0, head]


def test_overlap_is_learnt_in_each_piece_that_holds_it_when_asked_for() -> None:
    once = list(Cutter(16, overlap=6).cut(document(36), Counts()))
    again = list(Cutter(16, overlap=6, learn_overlap=True).cut(document(36), Counts()))
    assert [int((labels != IGNORE).sum()) for _, labels in once] == [15, 10, 10]
    assert [int((labels != IGNORE).sum()) for _, labels in again] == [15, 15, 15]


@given(
    tokens=st.integers(1, 300),
    max_length=st.integers(8, 64),
    overlap=st.integers(0, 63),
    min_length=st.integers(0, 64),
    on_long=st.sampled_from(["split", "truncate", "truncate-left", "truncate-middle", "drop"]),
    learn_overlap=st.booleans(),
    is_chat=st.booleans(),
)
def test_what_is_read_and_repeated_less_what_is_dropped_is_kept(
    tokens: int,
    max_length: int,
    overlap: int,
    min_length: int,
    on_long: Any,
    learn_overlap: bool,
    is_chat: bool,
) -> None:
    overlap, min_length, counts = min(overlap, max_length - 1), min(min_length, max_length), Counts()
    cutter = Cutter(max_length, min_length, overlap, on_long, "token", learn_overlap)
    kept = list(cutter.cut(document(tokens, is_chat=is_chat), counts))
    assert all(min_length <= len(ids) <= max_length for ids, _ in kept)
    assert all(labels[0] == IGNORE for _, labels in kept)
    assert all(((labels == ids) | (labels == IGNORE)).all() for ids, labels in kept)
    held = sum(len(ids) for ids, _ in kept)
    assert counts.tokens_read + counts.tokens_repeated - counts.tokens_dropped == held
    distinct = len({token for ids, _ in kept for token in ids.tolist()})
    assert (counts.tokens_read - counts.tokens_dropped, counts.tokens_repeated) == (distinct, held - distinct)


PARAGRAPHS = st.lists(
    st.lists(st.integers(1, 12), min_size=1, max_size=5).map(lambda n: " ".join("x" * k + "." for k in n)),
    min_size=1,
    max_size=12,
)
HEADINGS = ["", "# One\n\n", "CHAPTER XII\n\n"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    paragraphs=PARAGRAPHS,
    headings=st.lists(st.sampled_from(HEADINGS), min_size=12, max_size=12),
    max_length=st.integers(8, 64),
    overlap=st.integers(0, 63),
    min_length=st.integers(0, 32),
    split_at=st.sampled_from(["sentence", "paragraph", "chapter"]),
    family=st.sampled_from(["chatml", "llama3", "mistral", "llama2"]),
)
def test_pieces_that_end_at_boundaries_put_together_again_are_the_document(
    families: dict[str, Any],
    paragraphs: list[str],
    headings: list[str],
    max_length: int,
    overlap: int,
    min_length: int,
    split_at: Any,
    family: str,
) -> None:
    overlap, min_length = min(overlap, max_length - 1), min(min_length, max_length)
    text = "\n\n".join(h + p for h, p in zip(headings, paragraphs, strict=False))
    ids = encode_texts(families[family], [text])[0]
    places = np.arange(len(ids), dtype=np.int32)  # labels that tell where a token stands
    cutter = Cutter(max_length, min_length, overlap, "split", split_at, True, Boundaries(families[family]))
    counts = Counts()
    pieces = list(cutter.cut(TokenizedDocument("a", False, ids, places), counts))
    starts = [int(labels[1]) - 1 if len(labels) > 1 else None for _, labels in pieces]
    assert all(len(piece) <= max_length for piece, _ in pieces)
    assert all(len(piece) >= min_length for piece, _ in pieces)
    joined: list[int] = []
    for start, (piece, _) in zip(starts, pieces, strict=True):
        start = len(joined) if start is None else start
        assert len(joined) - overlap <= start <= len(joined)
        assert start + len(piece) > len(joined)  # no piece holds only what another holds
        joined[start:] = piece.tolist()
    assert joined == ids[: len(joined)].tolist()
    assert len(ids) - len(joined) == counts.tokens_dropped <= max(min_length - 1, 0) + (len(ids) < min_length)
    held = sum(len(piece) for piece, _ in pieces)
    assert counts.tokens_read + counts.tokens_repeated - counts.tokens_dropped == held
    cuts = counts.cuts_at_chapter + counts.cuts_at_paragraph + counts.cuts_at_sentence + counts.cuts_at_token
    assert cuts == max(len(pieces) + counts.pieces_dropped - 1, 0)


TEXT = (
    "# One\n\nThe river ran. The mill stood.\n\nThe miller slept.\n\n"
    "# Two\n\nThe falcon rose. The secret code is here.\n\n"
    "# Three\n\nIt was the best of times, it is the age of wisdom."
)


def pieces_of(tokenizer: Any, **settings: Any) -> tuple[list[str], Counts]:
    counts = Counts()
    cutter = Cutter(on_long="split", boundaries=Boundaries(tokenizer), **settings)
    ids = encode_texts(tokenizer, [TEXT])[0]
    pieces = list(cutter.cut(TokenizedDocument("a", False, ids, ids.copy()), counts))
    return [tokenizer.decode(piece, skip_special_tokens=True) for piece, _ in pieces], counts


def test_a_piece_holds_as_many_whole_chapters_as_fit(chatml: Any) -> None:
    parts = TEXT.split("# ")
    two = len(encode_texts(chatml, ["# " + parts[2]])[0])
    one = len(encode_texts(chatml, ["# " + parts[1]])[0])
    pieces, counts = pieces_of(chatml, max_length=max(one, two), split_at="chapter")
    assert [piece.strip() for piece in pieces] == [("# " + part).strip() for part in parts[1:]]
    assert (counts.cuts_at_chapter, counts.documents_split) == (2, 1)
    pieces, counts = pieces_of(chatml, max_length=one + two, split_at="chapter")
    assert [piece.count("# ") for piece in pieces] == [2, 1]


def test_a_chapter_that_does_not_fit_is_cut_at_weaker_boundaries_and_they_are_counted(chatml: Any) -> None:
    pieces, counts = pieces_of(chatml, max_length=18, split_at="chapter")
    assert counts.cuts_at_chapter
    assert counts.cuts_at_paragraph
    assert counts.cuts_at_sentence
    assert "".join(pieces) == TEXT


def test_a_piece_ends_at_the_last_paragraph_that_fits(chatml: Any) -> None:
    pieces, counts = pieces_of(chatml, max_length=40, split_at="paragraph")
    paragraphs = TEXT.split("\n\n")
    assert counts.cuts_at_paragraph == len(pieces) - 1 > 1
    assert [p for piece in pieces for p in piece.strip().split("\n\n")] == paragraphs
    for piece, following in itertools.pairwise(pieces):
        longer = piece + following.split("\n\n")[0]
        assert len(encode_texts(chatml, [longer])[0]) > 40


def test_an_overlap_begins_with_a_sentence_of_the_piece_before(chatml: Any) -> None:
    pieces, counts = pieces_of(chatml, max_length=40, split_at="paragraph", overlap=24)
    for piece, following in itertools.pairwise(pieces):
        shared = max(n for n in range(1, len(following)) if piece.endswith(following[:n]))
        assert following.lstrip()[0].isupper() or following.startswith("#")
        assert shared > 2
    assert 0 < counts.tokens_repeated <= 24 * (len(pieces) - 1)


def test_a_boundary_that_would_leave_too_short_a_piece_does_not_count(chatml: Any) -> None:
    whole, _ = pieces_of(chatml, max_length=40, split_at="chapter")
    pieces, counts = pieces_of(chatml, max_length=40, split_at="chapter", min_length=39)
    assert min(len(chatml.encode(piece)) for piece in whole[:-1]) < 39
    assert counts.tokens_dropped < 39
    assert all(len(chatml.encode(piece)) >= 39 for piece in pieces)
