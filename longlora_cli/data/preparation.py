"""From tokenized documents to packed chunks: cut, spool, pack, write.

Tokens go to a temporary file as they come; in memory stay three numbers a piece. A million documents of 4,096
tokens need 24 MB of memory and 32 GB of disk, whatever packing does.
"""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol

import numpy as np

from longlora_cli.data.chunk import IGNORE, Int32
from longlora_cli.data.chunk_cost import ChunkCost, chunk_costs
from longlora_cli.data.chunking import Counts, Cutter, TokenizedDocument
from longlora_cli.data.ordering import cost_balance, reading_order
from longlora_cli.data.packing import pack

_INT_BYTES = 4


class TakesChunks(Protocol):
    """What chunks can be written to."""

    def add(self, input_ids: Int32, labels: Int32, document_lengths: Int32) -> None:
        """See `ChunkWriter.add`."""


class Preparation:
    """Pieces on their way into chunks.

    Args:
        cutter: How documents are cut.
        spool_folder: Where the temporary file of tokens is made; None only counts, and nothing is written.
    """

    def __init__(self, cutter: Cutter, spool_folder: Path | None) -> None:
        self.cutter = cutter
        self.counts = Counts()
        self._lengths, self._learnt = (
            array("q"),
            array("q"),
        )  # tokens of each piece, and those that are learnt
        # Closed by `close`, after the chunks were written.
        self._spool: Any = TemporaryFile(dir=spool_folder) if spool_folder else None  # noqa: SIM115

    def add(self, document: TokenizedDocument) -> None:
        """Cut one document and keep its pieces.

        Raises:
            DataError: It is too long and the cutter's rule is `error`.
        """
        for ids, labels in self.cutter.cut(document, self.counts):
            self._lengths.append(len(ids))
            self._learnt.append(int(np.count_nonzero(labels != IGNORE)))
            if self._spool is not None:
                # Not ndarray.tofile: its error does not say that the disk is full.
                self._spool.write(np.ascontiguousarray(ids, dtype=np.int32).data)
                self._spool.write(np.ascontiguousarray(labels, dtype=np.int32).data)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each piece, int64 `[pieces]`."""
        return np.array(self._lengths, dtype=np.int64)

    @property
    def learnt(self) -> np.ndarray:
        """Tokens of each piece that are learnt, int64 `[pieces]`."""
        return np.array(self._learnt, dtype=np.int64)

    def layout(self, cost: ChunkCost, *, packed: bool, seed: int) -> list[list[int]]:
        """The pieces of each chunk; chunks in the seed's order.

        Args:
            cost: What pieces cost.
            packed: Put several pieces into a chunk.
            seed: Of the order.
        """
        lengths = self.lengths
        chunks = pack(lengths, self.cutter.max_length, cost) if packed else [[i] for i in range(len(lengths))]
        order = reading_order(chunk_costs([lengths[chunk] for chunk in chunks], cost), seed)
        return [chunks[number] for number in order]

    def balance(self, layout: list[list[int]], cost: ChunkCost) -> float:
        """`cost_balance` of a layout."""
        lengths = self.lengths
        return cost_balance(chunk_costs([lengths[chunk] for chunk in layout], cost))

    def write(self, layout: list[list[int]], writer: TakesChunks) -> None:
        """Write the chunks of a layout.

        Raises:
            ValueError: This preparation only counts.
        """
        if self._spool is None:
            raise ValueError("nothing was spooled")
        self._spool.flush()
        file = self._spool.fileno()
        lengths = self.lengths
        starts = 2 * _INT_BYTES * (np.cumsum(lengths) - lengths)
        for chunk in layout:
            ends = np.cumsum(lengths[chunk])
            ids, labels = np.empty(ends[-1], dtype=np.int32), np.empty(ends[-1], dtype=np.int32)
            for number, end in zip(chunk, ends, strict=True):
                place = slice(end - lengths[number], end)
                _read_whole(file, [ids[place], labels[place]], int(starts[number]))
            writer.add(ids, labels, lengths[chunk].astype(np.int32))

    def close(self) -> None:
        """Remove the temporary file; it has no name on disk, so a killed process leaves none either."""
        if self._spool is not None:
            self._spool.close()


def _read_whole(file: int, arrays: list[Int32], start: int) -> None:
    """Fill arrays from a place in a file, one after the other.

    Not by a memory map: the pages that it has touched count as the process's memory, and they are the whole corpus.
    """
    if (
        missing := sum(array.nbytes for array in arrays)
        - os.preadv(file, [array.data for array in arrays], start)
    ) > 0:
        raise OSError(f"{missing} bytes of the temporary file of tokens are missing")


def length_histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Pieces by length: (upper bound in tokens, a power of two; pieces above half of it and up to it)."""
    if not len(lengths):
        return []
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(powers)
    first = int(np.flatnonzero(counts)[0])
    return [(1 << power, int(counts[power])) for power in range(first, len(counts))]
