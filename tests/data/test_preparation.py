from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longlora_cli.data.chunk import IGNORE
from longlora_cli.data.chunk_cost import ChunkCost
from longlora_cli.data.chunking import Cutter, TokenizedDocument
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.preparation import Preparation, length_histogram

COST = ChunkCost(per_token=10.0, per_squared_token=1.0, model="a model")


def document(tokens: int) -> TokenizedDocument:
    ids = np.arange(1, 1 + tokens, dtype=np.int32)
    return TokenizedDocument("a", False, ids, np.where(ids == 1, IGNORE, ids).astype(np.int32))


def test_every_piece_is_written_where_the_layout_says(tmp_path: Path) -> None:
    preparation = Preparation(Cutter(20), tmp_path)
    for tokens in (5, 20, 45, 3):
        preparation.add(document(tokens))
    assert preparation.lengths.tolist() == [5, 20, 20, 20, 5, 3]
    assert preparation.learnt.tolist() == [4, 19, 19, 19, 4, 2]  # all but the first token of each
    with ChunkDataset.writing(tmp_path / "data", {}) as writer:
        preparation.write([[5, 0, 4], [3]], writer)
    preparation.close()
    data = ChunkDataset.open(tmp_path / "data")
    assert data[0].document_lengths.tolist() == [3, 5, 5]
    assert data[0].input_ids.tolist() == [1, 2, 3, 1, 2, 3, 4, 5, 41, 42, 43, 44, 45]
    assert data[1].labels.tolist() == [IGNORE, *range(22, 41)]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # the temporary file had no name


def test_counting_alone_writes_nothing_and_counts_the_same(tmp_path: Path) -> None:
    real, dry = Preparation(Cutter(20), tmp_path), Preparation(Cutter(20), None)
    for tokens in (5, 45, 3):
        real.add(document(tokens))
        dry.add(document(tokens))
    assert dry.counts == real.counts
    assert dry.learnt.sum() == real.learnt.sum() == 5 + 45 + 3 - 5
    assert dry.layout(COST, packed=True, seed=1) == real.layout(COST, packed=True, seed=1)
    with (
        pytest.raises(ValueError, match="nothing was spooled"),
        ChunkDataset.writing(tmp_path / "data", {}) as writer,
    ):
        dry.write([[0]], writer)
    real.close()


def test_without_packing_each_piece_is_a_chunk() -> None:
    preparation = Preparation(Cutter(20), None)
    preparation.add(document(45))
    assert sorted(preparation.layout(COST, packed=False, seed=0)) == [[0], [1], [2]]


def test_the_balance_of_a_layout_is_that_of_its_costs() -> None:
    preparation = Preparation(Cutter(20), None)
    for tokens in (20, 10, 10):
        preparation.add(document(tokens))
    layout = [[0], [1, 2]]
    assert preparation.layout(COST, packed=True, seed=0) in (layout, layout[::-1])
    # 20 tokens in one document cost 600, in two 400; two chunks at once wait for the first.
    assert preparation.balance(layout, COST) == (600 + 400) / (2 * 600)


def test_the_histogram_counts_each_piece_in_its_power_of_two() -> None:
    lengths = np.array([3, 4, 5, 8, 9, 64])
    assert length_histogram(lengths) == [(4, 2), (8, 2), (16, 1), (32, 0), (64, 1)]
    assert length_histogram(np.array([1])) == [(1, 1)]
    assert length_histogram(np.array([], dtype=np.int64)) == []
