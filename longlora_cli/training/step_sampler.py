"""`reading_order` as torch's data loader asks for it; apart from it, because `prepare` orders chunks without torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from longlora_cli.data.ordering import reading_order


class StepSampler(Sampler[int]):
    """`reading_order` for a `DataLoader`; every process makes the same one.

    Args:
        costs: Cost of each chunk, `[chunks]`.
        seed: Of the order.
        step_chunks: Chunks of an optimizer step, over all processes and micro-batches.
        epoch: Says which pass begins. It is asked rather than told, because a data loader that skips what a run
            read before it was interrupted does not pass `set_epoch` on in several processes (accelerate 1.15).
    """

    def __init__(
        self, costs: npt.NDArray[np.float64], seed: int, step_chunks: int, epoch: Callable[[], int]
    ) -> None:
        self.costs, self.seed, self.step_chunks, self.epoch = costs, seed, step_chunks, epoch

    def __len__(self) -> int:
        return len(self.costs)

    def __iter__(self) -> Iterator[int]:
        return iter(reading_order(self.costs, self.seed, self.epoch(), self.step_chunks))
