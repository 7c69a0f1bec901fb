from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.data.chunk_cost import ChunkCost, default_cost
from longlora_cli.data.packing import _Chunks, best_fit, pack

COST = ChunkCost(per_token=100.0, per_squared_token=1.0, model="a model")
LENGTHS = st.lists(st.integers(1, 100), max_size=200)


@given(lengths=LENGTHS)
def test_every_piece_is_in_exactly_one_chunk_and_no_chunk_overflows(lengths: list[int]) -> None:
    chunks = pack(np.array(lengths, dtype=np.int64), 100, COST)
    assert sorted(piece for chunk in chunks for piece in chunk) == list(range(len(lengths)))
    assert all(sum(lengths[piece] for piece in chunk) <= 100 for chunk in chunks)


@given(lengths=LENGTHS)
def test_at_most_one_chunk_is_half_empty(lengths: list[int]) -> None:
    chunks = pack(np.array(lengths, dtype=np.int64), 100, COST)
    assert sum(sum(lengths[piece] for piece in chunk) <= 50 for chunk in chunks) <= 1


def naive_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    rooms: list[int] = []
    chunks: list[list[int]] = []
    for piece in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        fitting = [number for number, room in enumerate(rooms) if room >= lengths[piece]]
        if not fitting:
            fitting = [len(rooms)]
            rooms.append(capacity)
            chunks.append([])
        chunk = min(fitting, key=rooms.__getitem__)
        rooms[chunk] -= lengths[piece]
        chunks[chunk].append(piece)
    return chunks


@given(lengths=LENGTHS)
def test_as_many_chunks_as_the_textbook_algorithm(lengths: list[int]) -> None:
    pieces = np.array(lengths, dtype=np.int64)
    assert len(best_fit(pieces, 100, COST)) == len(naive_best_fit(lengths, 100))
    assert len(pack(pieces, 100, COST)) == len(naive_best_fit(lengths, 100))


def test_a_piece_longer_than_a_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="101 tokens does not fit into 100"):
        pack(np.array([5, 101]), 100, COST)


def spread_of(chunks: list[list[int]], lengths: np.ndarray, cost: ChunkCost) -> float:
    costs = np.array([cost.of(lengths[chunk]).sum() for chunk in chunks])
    return float(costs.std() / costs.mean())


def test_of_equally_full_chunks_the_ones_of_equal_cost_are_made() -> None:
    # Best fit puts 50 + 50 together and leaves ten chunks of small pieces; each chunk can have one 50.
    lengths = np.array([50] * 20 + [1] * 1000)
    chunks = pack(lengths, 100, COST)
    assert [int(lengths[chunk].sum()) for chunk in chunks] == [100] * 20
    assert [int((lengths[chunk] == 50).sum()) for chunk in chunks] == [1] * 20


def test_of_chunks_with_equal_room_best_fit_takes_the_cheapest() -> None:
    assert best_fit(np.array([8, 5, 3, 2]), 10, COST) == [[0], [1, 2, 3]]


def test_costs_of_many_short_chats_are_closer_than_best_fits_at_the_same_fill() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(32768, rng.lognormal(7, 1.2, 3000)).astype(np.int64)
    cost = default_cost()
    alone, chunks = best_fit(lengths, 32768, cost), pack(lengths, 32768, cost)
    assert len(chunks) == len(alone)
    assert spread_of(chunks, lengths, cost) < 0.9 * spread_of(alone, lengths, cost)


def test_where_equal_costs_would_need_another_chunk_the_fill_goes_first() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.integers(20, 60, 40)
    fewest = len(naive_best_fit(lengths.tolist(), 100))
    spread = _Chunks(100, fewest)
    order = np.argsort(-lengths, kind="stable")
    pieces = [(int(n), int(lengths[n]), float(COST.of(lengths[[n]])[0])) for n in order]
    assert not spread.spread(pieces)
    assert len(pack(lengths, 100, COST)) == fewest


# Tokens of 22 books and of the 197 meetings of QMSum by the embedded tokenizer.
def test_books_and_meetings_fill_98_percent_of_chunks_of_32k() -> None:
    content = json.loads((Path(__file__).parent / "books_and_meetings.json").read_text())
    lengths = []
    for tokens in content["books"] + content["meetings"]:
        lengths += [32768] * (tokens // 32768) + ([tokens % 32768] if tokens % 32768 else [])
    chunks = pack(np.array(lengths), 32768, default_cost())
    assert sum(lengths) / (len(chunks) * 32768) >= 0.98


@pytest.mark.alone
def test_a_million_pieces_pack_in_seconds() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6.5, 1.5, 1_000_000), 1, 32768).astype(np.int64)
    start = time.process_time()
    chunks = pack(lengths, 32768, default_cost())
    assert time.process_time() - start < 20  # 4 s on one core of a server
    assert sum(map(len, chunks)) == 1_000_000
