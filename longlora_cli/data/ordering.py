"""The order in which chunks are read: random, with chunks of similar cost side by side.

Processes and the chunks of a batch that work at the same time wait for the costliest of them. So chunks are
shuffled, then sorted by cost within windows of 64, cut into groups of 8, and the groups are shuffled again. Any
number of processes up to 8 that divides 8 works within one group. What is lost to randomness is bounded: each
window of 64 is drawn at random from everything, anew in each epoch, and a chunk's place in the epoch is as random
as before. The order depends on the seed and the costs alone, so one process that accumulates two chunks reads what
two processes read.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

GROUP = 8
"""Chunks side by side whose costs are similar."""
WINDOW = 8 * GROUP
"""Chunks drawn at random that are sorted into groups."""


def grouped_order(costs: npt.NDArray[np.float64], seed: int, epoch: int = 0) -> list[int]:
    """The numbers of all chunks in reading order.

    Args:
        costs: Cost of each chunk, `[chunks]`.
        seed: With it, the costs and the epoch the order is always the same.
        epoch: Each one has another order.
    """
    rng = random.Random(f"{seed}:order:{epoch}")
    drawn = list(range(len(costs)))
    rng.shuffle(drawn)
    whole = len(drawn) // GROUP * GROUP  # the rest is drawn at random too, and comes last
    groups: list[list[int]] = []
    for start in range(0, whole, WINDOW):
        window = sorted(drawn[start : min(start + WINDOW, whole)], key=lambda chunk: costs[chunk])
        groups += [window[first : first + GROUP] for first in range(0, len(window), GROUP)]
    for group in groups:
        rng.shuffle(group)
    rng.shuffle(groups)
    return [chunk for group in groups for chunk in group] + drawn[whole:]


def cost_balance(costs: npt.NDArray[np.float64]) -> float:
    """The share of 8 processes' time that is work: the costs over 8 times each group's greatest, 1 at best.

    Args:
        costs: Cost of each chunk in reading order; the last group may be smaller.
    """
    groups = [costs[start : start + GROUP] for start in range(0, len(costs), GROUP)]
    taken = sum(len(group) * float(group.max()) for group in groups)
    return float(costs.sum()) / taken if taken else 1.0


class GroupedSampler(Sampler[int]):
    """`grouped_order` for a `DataLoader`; every process makes the same one.

    Args:
        costs: Cost of each chunk, `[chunks]`.
        seed: Of the order.
        epoch: Says which pass begins. It is asked rather than told, because a data loader that skips what a run
            read before it was interrupted does not pass `set_epoch` on in several processes (accelerate 1.15).
    """

    def __init__(self, costs: npt.NDArray[np.float64], seed: int, epoch: Callable[[], int]) -> None:
        self.costs, self.seed, self.epoch = costs, seed, epoch

    def __len__(self) -> int:
        return len(self.costs)

    def __iter__(self) -> Iterator[int]:
        return iter(grouped_order(self.costs, self.seed, self.epoch()))
