from __future__ import annotations

import numpy as np
import torch

from longlora_cli.data.chunk import IGNORE, Chunk
from longlora_cli.data.collate import collate


def chunk(ids: list[int], lengths: list[int]) -> Chunk:
    array = np.array(ids, dtype=np.int32)
    return Chunk(array, array.copy(), np.array(lengths, dtype=np.int32))


def test_padding_is_a_document_of_its_own_at_the_end() -> None:
    batch = collate([chunk([5, 6, 7, 8, 9], [2, 3]), chunk([1, 2, 3], [3])], pad_id=42)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 42, 42]]
    assert batch["labels"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, IGNORE, IGNORE]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]]
    assert batch["document_lengths"] == [[2, 3], [3, 2]]


def test_lengths_of_every_row_sum_to_the_width() -> None:
    batch = collate([chunk(list(range(n)), [n]) for n in (1, 4, 9)], pad_id=0)
    assert [sum(lengths) for lengths in batch["document_lengths"]] == [9, 9, 9]


def test_tensors_are_int64_and_there_is_no_attention_mask() -> None:
    batch = collate([chunk([1, 2], [2])], pad_id=0)
    assert set(batch) == {"input_ids", "labels", "position_ids", "document_lengths"}
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "position_ids"))
