"""Prepared chunks as runs of learnt and of masked tokens, for people to look at."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np

from longlora_cli.data.chunk import IGNORE, Chunk, Int32


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens of one document that are all learnt, or all masked.

    Args:
        ids: int32 `[tokens]`, at least one.
        is_learnt: Whether the loss counts them.
    """

    ids: Int32
    is_learnt: bool


def token_runs(chunk: Chunk) -> list[list[TokenRun]]:
    """The runs of each document of a chunk, in order; put together they are its ids."""
    documents = []
    start = 0
    for length in chunk.document_lengths.tolist():
        ids, labels = (part[start : start + length] for part in (chunk.input_ids, chunk.labels))
        learnt = labels != IGNORE
        edges = [0, *(np.flatnonzero(np.diff(learnt)) + 1).tolist(), length]
        documents.append([TokenRun(ids[a:b], bool(learnt[a])) for a, b in itertools.pairwise(edges)])
        start += length
    return documents


def sampled_chunks(chunks: int, count: int, seed: int) -> list[int]:
    """Which of `chunks` chunks to look at: `count` of them, or all, in rising order; the seed decides."""
    return sorted(random.Random(f"{seed}:show").sample(range(chunks), min(count, chunks)))
