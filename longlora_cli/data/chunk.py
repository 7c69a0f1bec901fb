"""What training reads: one window of token ids with labels, positions and the document of each token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IGNORE = -100
"""The label of a token that is not learnt, as torch's cross entropy expects it."""

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Chunk:
    """One training window; all arrays are int32 `[tokens]`.

    Args:
        input_ids: Token ids.
        labels: The same ids where they are learnt, `IGNORE` elsewhere. Not shifted: `labels[t]` is predicted
            from the tokens before `t`. The first token of each document is always `IGNORE`.
        document_lengths: Tokens of each document of the chunk, in order, int32 `[documents]`; they sum to
            `tokens`.
    """

    input_ids: Int32
    labels: Int32
    document_lengths: Int32

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def position_ids(self) -> Int32:
        """Positions that restart at 0 with each document."""
        starts = np.cumsum(self.document_lengths) - self.document_lengths
        positions = np.arange(len(self.input_ids)) - np.repeat(starts, self.document_lengths)
        return positions.astype(np.int32)

    @property
    def document_ids(self) -> Int32:
        """The number of each token's document within the chunk, from 0."""
        return np.repeat(np.arange(len(self.document_lengths), dtype=np.int32), self.document_lengths)
