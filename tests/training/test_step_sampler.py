"""The trainer's data loader reads in `reading_order`."""

from __future__ import annotations

import numpy as np
from torch.utils.data import DataLoader

from longlora_cli.data.ordering import reading_order
from longlora_cli.training.step_sampler import StepSampler


def test_a_data_loader_reads_in_the_order_of_the_epoch_that_is_asked_for() -> None:
    costs, epoch = np.random.default_rng(0).uniform(1, 3, 40), 0
    sampler = StepSampler(costs, 5, 4, lambda: epoch)
    loader = DataLoader(list(range(40)), sampler=sampler, batch_size=None)  # type: ignore[arg-type]
    assert list(loader) == reading_order(costs, 5, 0, 4)
    epoch = 1
    assert list(loader) == reading_order(costs, 5, 1, 4)
    assert len(loader) == 40
