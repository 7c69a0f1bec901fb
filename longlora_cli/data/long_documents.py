"""Prepared chunks read document by document, for training that goes through a document window by window.

Chunks are packed for attention that keeps documents apart. Memory that grows along a document cannot: it has to begin
anew with each. So every document of a chunk is a sample of its own, and those that fit into one window are left out,
because nothing of them is ever compressed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from longlora_cli.data.chunk import IGNORE, Chunk, Int32
from longlora_cli.data.chunk_cost import ChunkCost
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.shorter import cut

Int64 = npt.NDArray[np.int64]


def window_counts(tokens: Int64, window: int, stride: int) -> Int64:
    """Windows of documents of so many tokens, `[documents]`; a document that fills its last window ends with it."""
    more = -(-np.maximum(np.asarray(tokens, dtype=np.int64) - window, 0) // stride)
    counts: Int64 = more + 1
    return counts


class LongDocuments:
    """A map-style dataset of the documents that are longer than one window, each as a chunk of one document.

    Args:
        chunks: The prepared data.
        window: Tokens of a window.
        stride: Tokens from one window's first to the next one's.
        learn_first: The tokens of the first window are learnt too. Else labels begin with the second one, which is
            the first that reads something compressed.
    """

    def __init__(self, chunks: ChunkDataset, window: int, stride: int, *, learn_first: bool) -> None:
        self.chunks, self.window, self.learn_first = chunks, window, learn_first
        lengths = [chunks.document_lengths(index).astype(np.int64) for index in range(len(chunks))]
        tokens = np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
        starts = np.concatenate([np.cumsum(n) - n for n in lengths]) if lengths else tokens
        chunk_of = np.repeat(np.arange(len(lengths)), [len(n) for n in lengths])
        long = tokens > window
        self._tokens, self._starts, self._chunk_of = tokens[long], starts[long], chunk_of[long]
        self.windows = window_counts(self._tokens, window, stride)
        self.short_documents = int(np.count_nonzero(~long))

    @property
    def longest_chunk(self) -> int:
        """Tokens of the longest document."""
        return int(self._tokens.max(initial=0))

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Chunk:
        """The document at `index`."""
        start = int(self._starts[index])
        document = cut(self.chunks[int(self._chunk_of[index])], start, start + int(self._tokens[index]))
        if not self.learn_first:
            # The hidden state of the window's last token predicts the one behind it.
            document.labels[: self.window + 1] = IGNORE
        return document

    def document_lengths(self, index: int) -> Int32:
        """Tokens of the document at `index`, int32 `[1]`."""
        return self._tokens[index : index + 1].astype(np.int32)

    @property
    def cost(self) -> ChunkCost:
        """What the prepared chunks were packed by."""
        return self.chunks.cost
