from __future__ import annotations

import numpy as np
import pytest

from longlora_cli.evaluation.statistics import (
    bootstrap_ratio,
    mean,
    mean_clustered,
    share,
    share_clustered,
    smallest_gap,
    smallest_paired_gap,
    student_t95,
    tail_share,
    widened_p,
    wilson,
    wilson_clustered,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (20, 20, 83.9, 100),
        (18, 20, 69.9, 97.2),
        (10, 20, 29.9, 70.1),
        (50, 50, 92.9, 100),
        (45, 50, 78.6, 95.7),
        (25, 50, 36.6, 63.4),
        (100, 100, 96.3, 100),
        (90, 100, 82.6, 94.5),
        (50, 100, 40.4, 59.6),
        (200, 200, 98.1, 100),
        (180, 200, 85.1, 93.4),
        (100, 200, 43.1, 56.9),
        (500, 500, 99.2, 100),
        (450, 500, 87.1, 92.3),
        (250, 500, 45.6, 54.4),
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
    assert bootstrap_ratio([0.0, 300.0], [100, 100]) == (0.0, 3.0)
    # 50 clusters of one value 1 and 50 of a hundred values 3: nearly all values are 3.
    low, high = bootstrap_ratio([1.0] * 50 + [300.0] * 50, [1] * 50 + [100] * 50)
    assert 2.9 < low < high < 3


def test_one_cluster_has_no_interval():
    assert bootstrap_ratio([5.0], [1.0]) is None
    assert mean([0.3])["ci95"] is None
    assert mean([1.0], binary=True)["ci95"] == share([1.0])["ci95"] != None  # noqa: E711


@pytest.mark.parametrize(
    ("freedom", "point"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042), (1000, 1.962)],
)
def test_student_t_has_the_tabled_points(freedom, point):
    assert student_t95(freedom) == pytest.approx(point, abs=5e-4)


def test_shared_texts_are_worth_fewer_answers():
    assert wilson_clustered([1, 0, 1, 1], [1, 1, 1, 1]) == wilson(3, 4)
    # 5 answers in each of 4 texts that are all right or all wrong: 4 answers.
    assert wilson_clustered([5, 5, 5, 0], [5] * 4) == wilson(3, 4)
    # Answers that vary within texts only are worth all of themselves.
    assert wilson_clustered([4] * 20, [5] * 20) == wilson(80, 100)
    # All right: nothing is seen of their likeness, so only the number of texts counts, by t.
    worth = 20 * (student_t95(19) / student_t95(3)) ** 2
    assert wilson_clustered([5] * 4, [5] * 4) == wilson(worth, worth)
    assert wilson_clustered([5] * 4, [5] * 4)[0] == pytest.approx(0.692, abs=1e-3)
    # In between, by hand: 14 of 20, variance between texts 4/3 * 5, so deff = 6.667 / 4.2.
    worth = 20 / (20 / 3 / 4.2) * (student_t95(19) / student_t95(3)) ** 2
    assert wilson_clustered([3, 5, 2, 4], [5] * 4) == pytest.approx(wilson(0.7 * worth, worth))
    assert worth == pytest.approx(5.45, abs=0.01)
    assert wilson_clustered([3], [5]) == wilson(0.6, 1.0)  # one text says next to nothing
    assert wilson_clustered([0] * 4, [5] * 4)[0] == 0.0
    for sums, counts in [([], []), ([1], [0]), ([2], [1]), ([-1, 1], [1, 1])]:
        with pytest.raises(ValueError, match="successes"):
            wilson_clustered(sums, counts)


def test_the_clustered_interval_holds_the_truth_where_the_other_two_do_not():
    # 4 texts, 11 depths, 90 % right on average, answers of a text alike (correlation 0.3).
    rng = np.random.default_rng(1)
    held = np.zeros(3)
    for _ in range(400):
        chances = rng.beta(0.9 * (1 / 0.3 - 1), 0.1 * (1 / 0.3 - 1), 4)
        right = rng.binomial(11, chances).astype(float).tolist()
        found = (wilson_clustered(right, [11] * 4), wilson(sum(right), 44), bootstrap_ratio(right, [11] * 4))
        held += [low <= 0.9 <= high for low, high in found]
    clustered, independent, drawn = held / 400
    assert clustered > 0.94
    assert max(independent, drawn) < 0.80


def test_a_bootstrap_of_few_clusters_is_widened_by_students_t():
    assert tail_share(10**6) == pytest.approx(0.025, abs=1e-5)
    assert tail_share(5) == pytest.approx(0.00095, abs=1e-5)
    assert tail_share(20) == pytest.approx(0.01588, abs=1e-5)
    for clusters in (3, 20, 300):  # a p at the interval's own tail is 5 %
        assert widened_p(2 * tail_share(clusters), clusters) == pytest.approx(0.05, abs=1e-9)
    assert widened_p(1.0, 20) == 1.0
    assert widened_p(0.04, 10**6) == 0.04
    assert student_t95(10_001) == pytest.approx(student_t95(10_000), abs=1e-7)


def test_the_widened_bootstrap_holds_the_truth_more_often_than_plain_percentiles():
    rng, held = np.random.default_rng(1), np.zeros(2)
    for _ in range(300):
        values = rng.normal(0, 1, 5)
        low, high = bootstrap_ratio(values.tolist(), [1] * 5)
        plain = np.quantile(values[rng.integers(0, 5, (2000, 5))].mean(1), [0.025, 0.975])
        held += [low <= 0 <= high, plain[0] <= 0 <= plain[1]]
    assert held[0] / 300 > 0.90 > 0.88 > held[1] / 300


def test_clustered_means_group_by_their_marks():
    values, marks = [1.0, 0.0, 1.0, 1.0], ["a", "b", "a", "b"]
    assert share_clustered(values, marks) == {
        "n": 4,
        "score": 0.75,
        "ci95": list(wilson_clustered([2, 1], [2, 2])),
        "clusters": 2,
    }
    graded = mean_clustered([0.2, 0.4, 0.9, 0.5], marks)
    assert graded["ci95"] == list(bootstrap_ratio([1.1, 0.9], [2, 2]))
    assert (graded["n"], graded["score"], graded["clusters"]) == (4, 0.5, 2)
    assert mean_clustered(values, marks, binary=True) == share_clustered(values, marks)
    assert mean_clustered([0.3, 0.4], ["a", "a"])["ci95"] is None
    alone = mean_clustered([0.1, 0.7, 0.3], [1, 2, 3])
    assert alone == {**mean([0.1, 0.7, 0.3]), "clusters": 3}


@pytest.mark.parametrize(
    ("n", "independent", "paired"), [(100, 14.1, 8.9), (200, 10.0, 6.3), (500, 6.3, 4.0)]
)
def test_the_smallest_gap_that_n_questions_show(n, independent, paired):
    assert 100 * smallest_gap(n) == pytest.approx(independent, abs=0.051)
    assert 100 * smallest_paired_gap(n) == pytest.approx(paired, abs=0.051)
    for wrong in (lambda: smallest_gap(0), lambda: smallest_paired_gap(9, disagreement=0.0)):
        with pytest.raises(ValueError, match="n="):
            wrong()


def test_a_gap_of_that_size_is_found_in_four_of_five_comparisons():
    rng, found = np.random.default_rng(0), 0
    gap, n = smallest_gap(200), 200
    for _ in range(2000):
        a, b = rng.binomial(n, 0.85 + gap / 2) / n, rng.binomial(n, 0.85 - gap / 2) / n
        found += abs(a - b) > 1.96 * (2 * 0.85 * 0.15 / n) ** 0.5
    assert found / 2000 == pytest.approx(0.8, abs=0.05)
