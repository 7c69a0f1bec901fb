"""The order in which documents are read that go through a model window by window.

All documents of an optimizer step have equally many windows, over all its micro-batches and processes: processes then
call the model equally often, and a batch of several documents needs no window that one of them does not have. Which
documents form a step, and the order of steps, are drawn anew for each pass; what is left of a window count when its
steps are full waits for the next pass, where others may be left.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler


def grouped_order(
    windows: npt.NDArray[np.int64], seed: int, epoch: int = 0, step_documents: int = 1
) -> list[int]:
    """The numbers of the documents in reading order, a whole number of steps.

    Args:
        windows: Windows of each document, `[documents]`.
        seed: With the epoch it decides which documents each step reads.
        epoch: Each one has another order.
        step_documents: Documents of an optimizer step, over all processes and micro-batches.
    """
    draws = random.Random(f"{seed}:windows:{epoch}")
    order = list(range(len(windows)))
    draws.shuffle(order)
    alike: dict[int, list[int]] = {}
    for document in order:
        alike.setdefault(int(windows[document]), []).append(document)
    steps = [
        group[start : start + step_documents]
        for _, group in sorted(alike.items())
        for start in range(0, len(group) - step_documents + 1, step_documents)
    ]
    draws.shuffle(steps)
    return [document for step in steps for document in step]


def steps_of_a_pass(windows: npt.NDArray[np.int64], step_documents: int) -> int:
    """Optimizer steps of one pass."""
    _, counts = np.unique(windows, return_counts=True)
    return int((counts // step_documents).sum())


class WindowSampler(Sampler[int]):
    """`grouped_order` for a `DataLoader`; every process makes the same one.

    Args:
        windows: Windows of each document, `[documents]`.
        seed: Of the order.
        step_documents: Documents of an optimizer step.
        epoch: Says which pass begins; asked for the reason that `StepSampler` gives.
    """

    def __init__(
        self, windows: npt.NDArray[np.int64], seed: int, step_documents: int, epoch: Callable[[], int]
    ) -> None:
        self.windows, self.seed, self.step_documents, self.epoch = windows, seed, step_documents, epoch

    def __len__(self) -> int:
        return steps_of_a_pass(self.windows, self.step_documents) * self.step_documents

    def __iter__(self) -> Iterator[int]:
        return iter(grouped_order(self.windows, self.seed, self.epoch(), self.step_documents))
