"""The same chunks for a shorter context: longer ones are cut, nothing is left out.

`train --max-length auto` finds the longest context that fits the machine, which may be less than the data was prepared
for. A chunk is cut where the limit falls; a document that is cut goes on in the next piece as a document of its own,
with positions from 0, and its first token there is not learnt, as with every document.
"""

from __future__ import annotations

import bisect

import numpy as np

from longlora_cli.data.chunk import IGNORE, Chunk, Int32
from longlora_cli.data.chunk_cost import ChunkCost
from longlora_cli.data.dataset import ChunkDataset


class ShorterChunks:
    """A map-style dataset of pieces of at most `limit` tokens.

    Args:
        chunks: The prepared data.
        limit: Tokens of the longest piece.

    Raises:
        ValueError: `limit` is below 2, so that nothing could be learnt.
    """

    def __init__(self, chunks: ChunkDataset, limit: int) -> None:
        if limit < 2:
            raise ValueError(f"pieces of {limit} tokens have nothing to predict")
        self.chunks, self.limit = chunks, limit
        pieces = [-(-len(chunks[index]) // limit) for index in range(len(chunks))]
        self._ends = [int(end) for end in np.cumsum(pieces)]
        self.cut_chunks = sum(number > 1 for number in pieces)

    @property
    def longest_chunk(self) -> int:
        """Tokens of the longest piece."""
        return min(self.limit, self.chunks.longest_chunk)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Chunk:
        """The piece at `index`."""
        number, start = self._place(index)
        return cut(self.chunks[number], start, start + self.limit)

    def document_lengths(self, index: int) -> Int32:
        """Tokens of each document of the piece at `index`, int32 `[documents]`."""
        number, start = self._place(index)
        return _lengths_within(self.chunks.document_lengths(number), start, start + self.limit)

    @property
    def cost(self) -> ChunkCost:
        """What the prepared chunks were packed by."""
        return self.chunks.cost

    def _place(self, index: int) -> tuple[int, int]:
        """The chunk of a piece, and the piece's first token in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"piece {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        first = self._ends[number - 1] if number else 0
        return number, (index - first) * self.limit


def cut(chunk: Chunk, start: int, stop: int) -> Chunk:
    """Tokens `start` to `stop` of a chunk, as a chunk."""
    stop = min(stop, len(chunk))
    labels = chunk.labels[start:stop].copy()
    if start < stop:
        labels[0] = IGNORE
    lengths = _lengths_within(chunk.document_lengths, start, stop)
    return Chunk(chunk.input_ids[start:stop], labels, lengths)


def _lengths_within(lengths: Int32, start: int, stop: int) -> Int32:
    """Tokens of each document that lie between `start` and `stop`."""
    ends = np.cumsum(lengths)
    inside = np.minimum(ends, stop) - np.maximum(ends - lengths, start)
    return inside[inside > 0].astype(np.int32)
