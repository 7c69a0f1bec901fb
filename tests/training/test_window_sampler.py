"""Strict grouping: a step has one window count on every process, and each pass another order."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from longlora_cli.training.window_sampler import WindowSampler, grouped_order, steps_of_a_pass

WINDOWS = np.array([2] * 13 + [3] * 7 + [9] * 5 + [4] * 2, dtype=np.int64)


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("epoch", [0, 1])
def test_all_documents_of_a_step_have_one_window_count(step: int, epoch: int) -> None:
    order = grouped_order(WINDOWS, 0, epoch, step)
    steps = np.array(order).reshape(-1, step)
    assert all(len(set(WINDOWS[row].tolist())) == 1 for row in steps)
    assert len(set(order)) == len(order)
    assert len(steps) == steps_of_a_pass(WINDOWS, step) == sum(n // step for n in (13, 7, 5, 2))


def test_every_process_gets_the_same_window_count_in_each_batch() -> None:
    """Batches of 2 are dealt to 2 processes in turn, as accelerate does."""
    batches = np.array(grouped_order(WINDOWS, 3, 0, 4)).reshape(-1, 2)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert set(WINDOWS[first]) == set(WINDOWS[second])


def test_each_pass_has_another_order_and_leaves_others_out() -> None:
    passes = [grouped_order(WINDOWS, 0, epoch, 4) for epoch in range(8)]
    assert len({tuple(order) for order in passes}) == 8
    assert len({frozenset(order) for order in passes}) > 1
    assert set().union(*passes) == {
        n for n in range(len(WINDOWS)) if WINDOWS[n] != 4
    }  # two are less than a step


def test_steps_of_one_window_count_do_not_stand_together() -> None:
    counts = WINDOWS[grouped_order(WINDOWS, 0, 0, 1)].tolist()
    assert counts != sorted(counts)
    assert sum(a != b for a, b in pairwise(counts)) > 8


def test_the_seed_decides_the_order() -> None:
    assert (
        grouped_order(WINDOWS, 1, 0, 2) == grouped_order(WINDOWS, 1, 0, 2) != grouped_order(WINDOWS, 2, 0, 2)
    )


def test_the_sampler_asks_for_the_pass_when_it_begins_and_knows_its_length() -> None:
    epoch = 0
    sampler = WindowSampler(WINDOWS, 5, 2, lambda: epoch)
    first = list(sampler)
    assert len(first) == len(sampler)
    epoch = 1
    assert list(sampler) == grouped_order(WINDOWS, 5, 1, 2) != first
