"""Put short pieces together into chunks that are as full, and then as equal in cost, as possible."""

from __future__ import annotations

import bisect
import heapq

import numpy as np
import numpy.typing as npt

from longlora_cli.data.chunk_cost import ChunkCost

# Where spreading ends and filling begins, as shares of a chunk: at first nothing is left for filling.
_SPREAD_DOWN_TO = (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)


def pack(lengths: npt.NDArray[np.int64], capacity: int, cost: ChunkCost) -> list[list[int]]:
    """As few chunks as best-fit-decreasing bin packing makes, with costs as equal as that number allows.

    Best fit puts the longest piece first, each into the chunk that it leaves the least room in (Ding et al. 2024,
    Fewer Truncations Improve Language Modeling, arXiv:2404.10830). That gives the number of chunks. Then the
    long pieces, whose n^2 makes the costs differ, are spread anew over that many chunks: longest first, each into
    the cheapest chunk with room for it (Graham 1969, Bounds on Multiprocessing Timing Anomalies); short pieces
    then fill the rooms by best fit. Spreading goes down to the shortest piece, or if the pieces do not all fit in
    that way, to 1/64, 1/32, ... of a chunk; if that never succeeds, best fit alone stands.

    Args:
        lengths: Tokens of each piece, at most `capacity`, `[pieces]`.
        capacity: Tokens of a chunk.
        cost: What a piece costs.

    Returns:
        The pieces of each chunk, in rising order; every piece is in exactly one.

    Raises:
        ValueError: A piece is longer than a chunk.
    """
    pieces = _longest_first(lengths, capacity, cost)
    best = _Chunks(capacity, 0)
    best.fill(pieces)
    for share in _SPREAD_DOWN_TO:
        long = int(np.count_nonzero(np.asarray(lengths) >= share * capacity))
        spread = _Chunks(capacity, len(best.pieces))
        if spread.spread(pieces[:long]) and spread.fill(pieces[long:]) == 0:
            # Both are heuristics: with a few pieces either can come out ahead.
            best = min(best, spread, key=lambda chunks: sum(c * c for c in chunks.costs))
            break
    return [sorted(chunk) for chunk in best.pieces]


def best_fit(lengths: npt.NDArray[np.int64], capacity: int, cost: ChunkCost) -> list[list[int]]:
    """The packing by best fit alone, equal rooms by cost; arguments and errors as `pack`'s."""
    chunks = _Chunks(capacity, 0)
    chunks.fill(_longest_first(lengths, capacity, cost))
    return [sorted(chunk) for chunk in chunks.pieces]


_Piece = tuple[int, int, float]


def _longest_first(lengths: npt.NDArray[np.int64], capacity: int, cost: ChunkCost) -> list[_Piece]:
    """The pieces as (number, tokens, cost)."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and int(np.max(lengths)) > capacity:
        raise ValueError(f"a piece of {int(np.max(lengths))} tokens does not fit into {capacity}")
    order = np.argsort(-lengths, kind="stable")
    return list(zip(order.tolist(), lengths[order].tolist(), cost.of(lengths)[order].tolist(), strict=True))


class _Chunks:
    """Chunks being packed; pieces come longest first."""

    def __init__(self, capacity: int, count: int) -> None:
        self.capacity = capacity
        self.pieces: list[list[int]] = [[] for _ in range(count)]
        self.rooms = [capacity] * count
        self.costs = [0.0] * count

    def _put(self, chunk: int, piece: _Piece) -> int:
        self.pieces[chunk].append(piece[0])
        self.rooms[chunk] -= piece[1]
        self.costs[chunk] += piece[2]
        return self.rooms[chunk]

    def spread(self, pieces: list[_Piece]) -> bool:
        """Each piece into the cheapest chunk with room for it; False, and half done, where there is none.

        Lengths fall, so a chunk that has room for a piece has it for the next one too until it gets one; the
        others wait by their room.
        """
        ready = [(0.0, chunk) for chunk in range(len(self.pieces))]
        waiting: list[tuple[int, int]] = []
        for piece in pieces:
            while waiting and -waiting[0][0] >= piece[1]:
                _, chunk = heapq.heappop(waiting)
                heapq.heappush(ready, (self.costs[chunk], chunk))
            if not ready:
                return False
            _, chunk = heapq.heappop(ready)
            room = self._put(chunk, piece)
            if room >= piece[1]:
                heapq.heappush(ready, (self.costs[chunk], chunk))
            else:
                heapq.heappush(waiting, (-room, chunk))
        return True

    def fill(self, pieces: list[_Piece]) -> int:
        """Best fit, equal rooms by cost; returns the number of chunks added.

        Chunks with equal room are looked up by that room, so a million pieces take seconds.
        """
        by_room: dict[int, list[tuple[float, int]]] = {}
        for chunk, room in enumerate(self.rooms):
            by_room.setdefault(room, []).append((self.costs[chunk], chunk))
        for heap in by_room.values():
            heapq.heapify(heap)
        rooms = sorted(by_room)
        before = len(self.pieces)
        for piece in pieces:
            place = bisect.bisect_left(rooms, piece[1])
            if place == len(rooms):
                chunk = len(self.pieces)
                self.pieces.append([])
                self.rooms.append(self.capacity)
                self.costs.append(0.0)
            else:
                heap = by_room[rooms[place]]
                _, chunk = heapq.heappop(heap)
                if not heap:
                    del by_room[rooms[place]], rooms[place]
            room = self._put(chunk, piece)
            if room:
                if room not in by_room:
                    by_room[room] = []
                    bisect.insort(rooms, room)
                heapq.heappush(by_room[room], (self.costs[chunk], chunk))
        return len(self.pieces) - before
