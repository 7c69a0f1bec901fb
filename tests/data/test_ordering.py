from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from longlora_cli.data.ordering import GROUP, WINDOW, GroupedSampler, cost_balance, grouped_order

COSTS = st.lists(st.floats(1, 100), max_size=300).map(np.array)


@given(costs=COSTS, seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_every_chunk_is_read_once(costs: np.ndarray, seed: int, epoch: int) -> None:
    assert sorted(grouped_order(costs, seed, epoch)) == list(range(len(costs)))


@given(costs=COSTS)
def test_the_balance_is_the_work_over_what_groups_wait_for(costs: np.ndarray) -> None:
    groups = [costs[n : n + GROUP].tolist() for n in range(0, len(costs), GROUP)]
    waited = sum(max(group) for group in groups for _ in group)
    assert (
        cost_balance(costs) == 1.0 if not groups else abs(cost_balance(costs) - sum(costs) / waited) < 1e-12
    )


def test_the_order_is_the_seeds_and_the_epochs() -> None:
    costs = np.random.default_rng(0).uniform(1, 3, 500)
    assert grouped_order(costs, 3) == grouped_order(costs.copy(), 3)
    assert grouped_order(costs, 3) != grouped_order(costs, 4)
    assert grouped_order(costs, 3) != grouped_order(costs, 3, epoch=1)
    # The same for any computer: random.Random's stream is the same in all versions of Python.
    assert grouped_order(np.ones(10), 0) == [9, 6, 1, 4, 0, 8, 3, 7, 2, 5]


def test_chunks_side_by_side_cost_alike() -> None:
    costs = np.random.default_rng(0).uniform(1, 3, 1000)
    random = cost_balance(costs)
    assert random < 0.75
    for seed in range(5):
        assert cost_balance(costs[grouped_order(costs, seed)]) > 0.93


def test_a_chunks_place_is_as_random_as_in_a_plain_shuffle() -> None:
    # The costliest and the cheapest of 256 chunks come anywhere: mean place within 4 standard errors of the middle.
    costs = np.arange(256.0)
    places = np.array([np.argsort(grouped_order(costs, seed))[[0, 255]] for seed in range(400)])
    error = 256 / np.sqrt(12 * 400)
    assert (np.abs(places.mean(axis=0) - 127.5) < 4 * error).all()


def test_neighbours_change_from_epoch_to_epoch() -> None:
    costs = np.random.default_rng(0).uniform(1, 3, 8 * WINDOW)

    def neighbours(epoch: int) -> set[frozenset[int]]:
        order = grouped_order(costs, 0, epoch)
        groups = [order[n : n + GROUP] for n in range(0, len(order), GROUP)]
        return {frozenset((a, b)) for group in groups for a in group for b in group if a != b}

    first, second = neighbours(0), neighbours(1)
    assert len(first & second) < 0.15 * len(first)


def test_chunks_that_fill_no_group_are_drawn_at_random_and_come_last() -> None:
    costs = np.arange(9.0)
    assert len({grouped_order(costs, seed)[-1] for seed in range(60)}) == 9


def test_a_data_loader_reads_in_the_order_of_the_epoch_that_is_asked_for() -> None:
    costs, epoch = np.random.default_rng(0).uniform(1, 3, 40), 0
    loader = DataLoader(list(range(40)), sampler=GroupedSampler(costs, 5, lambda: epoch), batch_size=None)  # type: ignore[arg-type]
    assert list(loader) == grouped_order(costs, 5, 0)
    epoch = 1
    assert list(loader) == grouped_order(costs, 5, 1)
    assert len(loader) == 40
