from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.data.packing import pack, shuffled

LENGTHS = st.lists(st.integers(1, 100), max_size=200)


@given(lengths=LENGTHS)
def test_every_piece_is_in_exactly_one_chunk_and_no_chunk_overflows(lengths: list[int]) -> None:
    chunks = pack(np.array(lengths, dtype=np.int64), 100)
    assert sorted(piece for chunk in chunks for piece in chunk) == list(range(len(lengths)))
    assert all(sum(lengths[piece] for piece in chunk) <= 100 for chunk in chunks)


@given(lengths=LENGTHS)
def test_at_most_one_chunk_is_half_empty(lengths: list[int]) -> None:
    chunks = pack(np.array(lengths, dtype=np.int64), 100)
    assert sum(sum(lengths[piece] for piece in chunk) <= 50 for chunk in chunks) <= 1


def naive_best_fit(lengths: list[int], capacity: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@given(lengths=LENGTHS)
def test_as_many_chunks_as_the_textbook_algorithm(lengths: list[int]) -> None:
    assert len(pack(np.array(lengths, dtype=np.int64), 100)) == naive_best_fit(lengths, 100)


def test_a_piece_longer_than_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="101 tokens does not fit into 100"):
        pack(np.array([5, 101]), 100)


def test_the_order_is_the_seeds_alone() -> None:
    chunks = [[i] for i in range(50)]
    assert shuffled(chunks, 3) == shuffled(chunks, 3) != shuffled(chunks, 4)
    assert sorted(shuffled(chunks, 3)) == chunks
