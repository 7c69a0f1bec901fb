"""Documents read one by one for training window by window: which, with which labels, in how many windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longlora_cli.data.chunk import Chunk
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.long_documents import LongDocuments, window_counts


@pytest.fixture
def packed(tmp_path: Path) -> ChunkDataset:
    """Two chunks with documents of 10, 30 and 9, 8, 17 tokens; ids count on through each chunk."""
    chunks = []
    for lengths in ([10, 30], [9, 8, 17]):
        ids = np.arange(sum(lengths), dtype=np.int32)
        labels = ids.copy()
        labels[np.cumsum(lengths) - lengths] = -100
        chunks.append(Chunk(ids, labels, np.array(lengths, dtype=np.int32)))
    hashes = {"tokenizer_sha256": "t", "template_sha256": "t", "max_length": 40}
    return ChunkDataset.write(tmp_path / "packed", chunks, hashes)


def test_each_long_document_of_a_packed_chunk_is_a_sample(packed: ChunkDataset) -> None:
    documents = LongDocuments(packed, 8, 8, learn_first=True)
    assert [documents[i].input_ids.tolist() for i in range(len(documents))] == [
        list(range(10)), list(range(10, 40)), list(range(9)), list(range(17, 34)),
    ]  # fmt: skip
    assert [documents.document_lengths(i).tolist() for i in range(4)] == [[10], [30], [9], [17]]
    assert documents.longest_chunk == 30


def test_documents_of_one_window_are_left_out_and_counted(packed: ChunkDataset) -> None:
    assert LongDocuments(packed, 8, 8, learn_first=True).short_documents == 1
    documents = LongDocuments(packed, 30, 30, learn_first=True)
    assert (len(documents), documents.short_documents, documents.longest_chunk) == (0, 5, 0)


def test_the_first_token_of_a_document_has_no_label(packed: ChunkDataset) -> None:
    documents = LongDocuments(packed, 8, 8, learn_first=True)
    for index in range(len(documents)):
        chunk = documents[index]
        assert chunk.labels[0] == -100
        assert chunk.labels[1:].tolist() == chunk.input_ids[1:].tolist()


def test_without_its_first_window_a_document_is_learnt_from_what_the_second_predicts(
    packed: ChunkDataset,
) -> None:
    chunk = LongDocuments(packed, 8, 8, learn_first=False)[3]  # 17 tokens: 8 of them lie behind token 8
    assert np.flatnonzero(chunk.labels != -100).tolist() == list(range(9, 17))
    assert packed[1].labels[18] == 18  # the prepared labels were not written over


@pytest.mark.parametrize(
    ("window", "stride", "tokens", "windows"),
    [(8, 8, 8, 1), (8, 8, 9, 2), (8, 8, 16, 2), (8, 8, 17, 3), (8, 4, 12, 2), (8, 4, 13, 3), (8, 2, 9, 2)],
)
def test_a_document_has_as_many_windows_as_it_begins(
    window: int, stride: int, tokens: int, windows: int
) -> None:
    assert window_counts(np.array([tokens]), window, stride).tolist() == [windows]


def test_window_counts_are_those_of_the_plan() -> None:
    from longlora_cli.beacon.settings import BeaconSettings
    from longlora_cli.beacon.windows import training_steps

    for settings in (BeaconSettings(8), BeaconSettings(8, 4, position="append")):
        tokens = np.arange(1, 60)
        planned = [len(list(training_steps(int(n), settings, lambda _: 2))) for n in tokens]
        assert window_counts(tokens, settings.window, settings.hop).tolist() == planned
