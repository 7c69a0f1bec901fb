"""Ids in a file are those in memory, and a document is gone before the next one is read."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longlora_cli.commands.prepare_inputs import Texts, watched
from longlora_cli.data import token_file, tokenizing
from longlora_cli.data.boundaries import Boundaries
from longlora_cli.data.chunking import Counts, Cutter, OnLong
from longlora_cli.data.document import Document, Source
from longlora_cli.data.documents import read_documents
from longlora_cli.data.duplicates import find_duplicates
from longlora_cli.data.token_file import FileIds, JoinedIds
from longlora_cli.data.tokenizing import tokenize
from longlora_cli.errors import DataError

TEXT = "The miller slept. The river was old.\n\nWas it? It was the age of wisdom.\n\n" * 40
ON_LONG: list[OnLong] = ["split", "truncate", "truncate-left", "truncate-middle"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_file, "_HELD_TOKENS", 50)
    monkeypatch.setattr(tokenizing, "_PIECE_CHARACTERS", 100)


@pytest.mark.parametrize("on_long", ON_LONG)
@pytest.mark.usefixtures("small")
def test_pieces_of_a_text_whose_ids_are_in_a_file_are_those_of_one_in_memory(
    tokenizer: Any, tmp_path: Path, on_long: OnLong
) -> None:
    splits = on_long == "split"
    cutter = Cutter(
        64, 0, 8 * splits, on_long, "sentence" if splits else "token", boundaries=Boundaries(tokenizer)
    )
    documents = [Document("a", TEXT), Document("b", "Short."), Document("c", TEXT[:-1] + " end.")]
    found = []
    for folder in (None, tmp_path):
        counts = Counts()
        pieces = []
        for document in tokenize(documents, tokenizer, labels="all", spool=folder):
            is_long = document.source != "b"
            assert isinstance(document.ids, FileIds) == (is_long and folder is not None)
            pieces += [(ids.tolist(), labels.tolist()) for ids, labels in cutter.cut(document, counts)]
        found.append((pieces, counts))
    assert found[0] == found[1]
    assert list(tmp_path.iterdir()) == []


def test_ids_in_a_file_have_an_arrays_length_and_ranges(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(token_file, "_HELD_TOKENS", 5)
    whole = np.arange(100, dtype=np.int32)
    with JoinedIds(tmp_path) as joined:
        for _ in range(2):  # a second document overwrites the first
            for part in np.split(whole, [1, 3, 3, 20, 99]):
                joined.add(part)
            ids = joined.taken()
            assert isinstance(ids, FileIds)
            assert len(ids) == 100
            for start, stop in [(0, 100), (0, 0), (7, 30), (95, 200), (30, 7)]:
                assert np.array_equal(ids[start:stop], whole[start:stop])
            assert np.array_equal(ids[-5:], whole[-5:])
            with pytest.raises(ValueError, match="ranges only"):
                ids[::2]


def test_few_ids_stay_in_memory(tmp_path: Path) -> None:
    with JoinedIds(tmp_path) as joined:
        for number in (1, 2):
            joined.add(np.full(3, number, np.int32))
            assert np.array_equal(joined.taken(), np.full(3, number))


def test_a_text_that_can_be_cut_nowhere_is_refused_from_4_mib_on(chatml: Any, tmp_path: Path) -> None:
    for unit, count in (("🙂", 1 << 20), ("ACGT", 1 << 20)):
        text = "Before it. " * 5000 + unit * count
        with pytest.raises(DataError) as caught:
            list(tokenize([Document("a.txt", text + "x")], chatml, labels="all", spool=tmp_path))
        place = re.match(r"a\.txt: ([\d,]+) characters from character ([\d,]+) on", caught.value.message)
        assert place is not None
        characters, start = (int(number.replace(",", "")) for number in place.groups())
        # The last cut before it is a piece of 32,768 characters apart at most.
        assert len(unit) * count < characters < len(unit) * count + 50_000
        assert 0 < start < 55_000
        assert caught.value.hint == "Put spaces or line ends into them."


def documents_that_must_go(contents: list[Any]) -> Iterator[Document]:
    """Documents; reading the next one fails while anything holds the one before."""
    before = None
    for number, content in enumerate(contents):
        assert before is None or before() is None, f"document {number - 1} is held while {number} is read"
        document = Document(f"a:{number}", content, size_bytes=1)
        before = weakref.ref(document)
        yield document
        del document


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize("sample", [None, 9])
@pytest.mark.parametrize("weight", [None, 1.0])
@pytest.mark.parametrize("dedup", [False, True])
def test_a_document_is_gone_before_the_next_one_is_read(
    chatml: Any, tmp_path: Path, sample: int | None, weight: float | None, dedup: bool
) -> None:
    contents = [TEXT + str(n) for n in range(9)]
    source = Source("a", lambda: documents_that_must_go(contents), sample=sample, weight=weight)
    if dedup:
        [found] = find_duplicates([source], threshold=0.99, folder=tmp_path, advance=lambda size: None)
        source = found.source
    documents = watched(read_documents([source], seed=0), Texts(keep=False), lambda size: None)
    count = sum(1 for _ in tokenize(documents, chatml, labels="all", spool=tmp_path))
    assert count == 9
