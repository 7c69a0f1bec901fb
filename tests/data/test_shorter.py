"""Chunks cut for a shorter context lose nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora_cli.data.chunk import IGNORE, Chunk
from longlora_cli.data.chunk_cost import ChunkCost, default_cost
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.shorter import ShorterChunks, cut


def chunk(*lengths: int) -> Chunk:
    ids = np.arange(sum(lengths), dtype=np.int32)
    labels = ids.copy()
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORE
    return Chunk(ids, labels, np.array(lengths, dtype=np.int32))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_pieces_put_together_are_the_chunk(lengths: list[int], limit: int) -> None:
    whole = chunk(*lengths)
    pieces = [cut(whole, start, start + limit) for start in range(0, len(whole), limit)]
    assert np.concatenate([piece.input_ids for piece in pieces]).tolist() == whole.input_ids.tolist()
    assert all(int(piece.document_lengths.sum()) == len(piece) <= limit for piece in pieces)


def test_a_cut_document_starts_again_at_position_0() -> None:
    piece = cut(chunk(5, 4), 3, 8)
    assert piece.document_lengths.tolist() == [2, 3]
    assert piece.position_ids.tolist() == [0, 1, 0, 1, 2]


def test_the_first_token_of_each_piece_is_not_learnt() -> None:
    assert cut(chunk(9), 4, 9).labels.tolist() == [IGNORE, 5, 6, 7, 8]


def test_the_dataset_counts_what_it_cut(tmp_path: Path) -> None:
    meta = {"tokenizer_sha256": "a", "template_sha256": "b", "max_length": 9}
    data = ChunkDataset.write(tmp_path / "data", [chunk(9), chunk(2, 2), chunk(4)], meta)
    short = ShorterChunks(data, 4)
    assert [len(short[i]) for i in range(len(short))] == [4, 4, 1, 4, 4]
    assert short.cut_chunks == 1
    assert short.longest_chunk == 4


def test_a_context_of_one_token_is_refused(tmp_path: Path) -> None:
    meta = {"tokenizer_sha256": "a", "template_sha256": "b", "max_length": 9}
    data = ChunkDataset.write(tmp_path / "data", [chunk(3)], meta)
    with pytest.raises(ValueError, match="nothing to predict"):
        ShorterChunks(data, 1)


def test_lengths_and_costs_are_told_without_reading_the_pieces(tmp_path: Path) -> None:
    cost = {"per_token": 1.0, "per_squared_token": 2.0, "model": "a model"}
    data = ChunkDataset.write(tmp_path / "d", [chunk(5, 4), chunk(3)], {"cost": cost})
    shorter = ShorterChunks(data, 4)
    assert [shorter.document_lengths(n).tolist() for n in range(4)] == [[4], [1, 3], [1], [3]]
    assert [shorter[n].document_lengths.tolist() for n in range(4)] == [[4], [1, 3], [1], [3]]
    assert data.document_lengths(0).tolist() == [5, 4]
    assert shorter.cost == data.cost == ChunkCost(**cost)  # type: ignore[arg-type]
    older = ChunkDataset.write(tmp_path / "older", [chunk(3)], {})
    assert older.cost == default_cost()
