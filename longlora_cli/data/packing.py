"""Put short pieces together into chunks that are as full as possible."""

from __future__ import annotations

import bisect
import random

import numpy as np
import numpy.typing as npt


def pack(lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing.

    The longest piece goes first, each into the chunk that it leaves the least room in (Ding et al. 2024,
    Fewer Truncations Improve Language Modeling, arXiv:2404.10830). Chunks with equal room are looked up by
    that room, so a million pieces take seconds.

    Args:
        lengths: Tokens of each piece, at most `capacity`, `[pieces]`.
        capacity: Tokens of a chunk.

    Returns:
        The pieces of each chunk, in rising order; every piece is in exactly one.

    Raises:
        ValueError: A piece is longer than a chunk.
    """
    if len(lengths) and int(np.max(lengths)) > capacity:
        raise ValueError(f"a piece of {int(np.max(lengths))} tokens does not fit into {capacity}")
    chunks: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, rising
    for piece in np.argsort(-np.asarray(lengths), kind="stable"):
        length = int(lengths[piece])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            chunk, room = len(chunks), capacity
            chunks.append([])
        else:
            room = rooms[place]
            chunk = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        chunks[chunk].append(int(piece))
        left = room - length
        if left:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(chunk)
    return [sorted(chunk) for chunk in chunks]


def shuffled(chunks: list[list[int]], seed: int) -> list[list[int]]:
    """The chunks in an order that the seed and their number decide."""
    order = list(range(len(chunks)))
    random.Random(f"{seed}:order").shuffle(order)
    return [chunks[index] for index in order]
