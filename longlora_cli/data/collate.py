"""Put chunks into one batch of tensors for a model that isolates documents by their lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from longlora_cli.data.chunk import IGNORE, Chunk


def collate(chunks: list[Chunk], *, pad_id: int) -> dict[str, Any]:
    """Pad chunks on the right to the longest one.

    Padding is a document of its own at the end of its row: nothing attends to it, no attention mask is
    needed, and the lengths of every row sum to the batch's width.

    Args:
        chunks: At least one chunk.
        pad_id: Token id at padding; its value does not matter to the loss.

    Returns:
        `input_ids`, `labels` (`IGNORE` at padding) and `position_ids` (from 0 in each document), int64
        `[batch, tokens]`, and `document_lengths`, one list of ints per row.
    """
    width = max(len(chunk) for chunk in chunks)
    shape = (len(chunks), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    document_lengths: list[list[int]] = []
    for row, chunk in enumerate(chunks):
        tokens = len(chunk)
        input_ids[row, :tokens] = chunk.input_ids
        labels[row, :tokens] = chunk.labels
        position_ids[row, :tokens] = chunk.position_ids
        position_ids[row, tokens:] = np.arange(width - tokens)
        lengths = [int(length) for length in chunk.document_lengths]
        document_lengths.append(lengths + [width - tokens] * (width > tokens))
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(position_ids),
        "document_lengths": document_lengths,
    }
