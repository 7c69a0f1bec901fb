from __future__ import annotations

import pytest

from longlora_cli.evaluation.statistics import bootstrap_ratio, mean, share, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (20, 20, 83.9, 100),
        (18, 20, 69.9, 97.2),
        (10, 20, 29.9, 70.1),
        (450, 500, 87.1, 92.3),
        (0, 50, 0, 7.1),
    ],
)
def test_wilson_gives_the_published_intervals(successes, n, low, high):
    found = [100 * value for value in wilson(successes, n)]
    assert found == pytest.approx([low, high], abs=0.051)


def test_wilson_is_exact_at_the_ends_and_refuses_impossible_counts():
    assert wilson(0, 3)[0] == 0.0
    assert wilson(3, 3)[1] == 1.0
    for successes, n in [(1, 0), (4, 3), (-1, 3)]:
        with pytest.raises(ValueError, match="successes"):
            wilson(successes, n)


def test_the_bootstrap_interval_is_that_of_the_normal_law_for_many_samples():
    values = [float(i % 10) for i in range(1000)]  # mean 4.5, standard deviation 2.872
    low, high = bootstrap_ratio(values, [1.0] * 1000)
    half = 1.96 * 2.8723 / 1000**0.5
    assert (low, high) == pytest.approx((4.5 - half, 4.5 + half), abs=0.03)


def test_clusters_are_drawn_whole_and_weighted_by_their_counts():
    # Both clusters have the same mean, so whatever is drawn gives 2.
    assert bootstrap_ratio([2.0, 200.0], [1, 100]) == (2.0, 2.0)
    low, high = bootstrap_ratio([0.0, 300.0], [100, 100])
    assert (low, high) == (0.0, 3.0)


def test_one_cluster_has_no_interval():
    assert bootstrap_ratio([5.0], [1.0]) is None
    assert mean([0.3])["ci95"] is None
    assert mean([1.0], binary=True)["ci95"] == share([1.0])["ci95"] != None  # noqa: E711
