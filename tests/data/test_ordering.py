from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.data.ordering import GROUP, cost_balance, reading_order

COSTS = st.lists(st.floats(1, 100), max_size=300).map(np.array)


@given(costs=COSTS, seed=st.integers(0, 9), epoch=st.integers(0, 3), step=st.integers(1, 20))
def test_a_step_reads_what_the_seed_says_and_the_costliest_first(
    costs: np.ndarray, seed: int, epoch: int, step: int
) -> None:
    drawn, order = reading_order(costs, seed, epoch), reading_order(costs, seed, epoch, step)
    assert sorted(order) == list(range(len(costs)))
    for start in range(0, len(costs), step):
        assert sorted(order[start : start + step]) == sorted(drawn[start : start + step])
        assert (np.diff(costs[order[start : start + step]]) <= 0).all()


@given(costs=COSTS)
def test_costs_do_not_decide_which_chunks_a_step_reads(costs: np.ndarray) -> None:
    assert reading_order(costs, 3) == reading_order(np.ones(len(costs)), 3)


@given(costs=COSTS)
def test_the_balance_is_the_work_over_what_groups_wait_for(costs: np.ndarray) -> None:
    groups = [costs[n : n + GROUP].tolist() for n in range(0, len(costs), GROUP)]
    waited = sum(max(group) for group in groups for _ in group)
    assert (
        cost_balance(costs) == 1.0 if not groups else abs(cost_balance(costs) - sum(costs) / waited) < 1e-12
    )


def test_the_order_is_the_seeds_and_the_epochs() -> None:
    costs = np.random.default_rng(0).uniform(1, 3, 500)
    assert reading_order(costs, 3) == reading_order(costs.copy(), 3)
    assert reading_order(costs, 3) != reading_order(costs, 4)
    assert reading_order(costs, 3) != reading_order(costs, 3, epoch=1)
    # The same for any computer: random.Random's stream is the same in all versions of Python.
    assert reading_order(np.ones(10), 0) == [9, 3, 7, 8, 1, 0, 6, 4, 2, 5]


def test_processes_with_several_micro_batches_a_step_wait_less() -> None:
    costs = np.random.default_rng(0).uniform(1, 3, 1024)
    balances = [cost_balance(costs[reading_order(costs, 0, 0, 8 * micro)]) for micro in (1, 4, 8)]
    assert balances[0] < 0.75
    assert balances[1] > 0.88
    assert balances[2] > 0.93
