from __future__ import annotations

import itertools
import math
import random
from statistics import NormalDist

import pytest

from longlora_cli.evaluation.paired import holm, is_binary, mcnemar, mcnemar_by_text, paired_bootstrap


@pytest.mark.parametrize(
    ("first_only", "second_only", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (6, 0, 2 / 64),
        (8, 2, 2 * (1 + 10 + 45) / 1024),  # 0.109375, as R's binom.test(2, 10)
        (10, 10, 1.0),
        # Agresti 1990, approval of a prime minister asked twice: 150 and 86 changed their minds.
        (150, 86, 2 * sum(math.comb(236, k) for k in range(87)) / 2**236),
    ],
)
def test_mcnemar_is_the_two_sided_binomial_test_of_the_discordant_questions(first_only, second_only, p):
    assert mcnemar(first_only, second_only) == pytest.approx(p, rel=1e-12)
    assert mcnemar(second_only, first_only) == mcnemar(first_only, second_only)


def test_mcnemar_counts_every_outcome_of_the_coins():
    for n in range(1, 13):
        outcomes = [sum(coins) for coins in itertools.product((0, 1), repeat=n)]
        for right in range(n + 1):
            tail = sum(outcome <= min(right, n - right) for outcome in outcomes)
            assert mcnemar(right, n - right) == pytest.approx(min(1.0, 2 * tail / 2**n), rel=1e-12)


def test_mcnemar_of_thousands_of_questions_does_not_overflow():
    normal = 2 * NormalDist().cdf(-(400 - 1) / math.sqrt(10_000))  # with the correction for continuity
    assert mcnemar(5200, 4800) == pytest.approx(normal, rel=5e-3)
    assert mcnemar(100_000, 0) == 0.0
    with pytest.raises(ValueError, match="-1"):
        mcnemar(-1, 3)


def test_texts_of_one_question_give_mcnemar_and_shared_texts_are_swapped_whole():
    for first, second in [(0, 0), (3, 1), (8, 2), (20, 7)]:
        assert mcnemar_by_text([1] * first + [-1] * second + [0] * 5) == pytest.approx(mcnemar(first, second))
    assert mcnemar(20, 0) < 1e-5
    assert mcnemar_by_text([5, 5, 5, 5]) == 2 / 16  # 20 questions in 4 texts are 4 coins
    differences = [3, -1, 2, 2, -2, 0, 1]
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=7)
    ]
    assert mcnemar_by_text(differences) == sum(abs(total) >= 5 for total in sums) / 128


def test_two_equal_models_differ_by_nothing():
    assert paired_bootstrap([0.0] * 20, [1] * 20) == ((0.0, 0.0), 1.0)
    assert mcnemar_by_text([0] * 20) == 1.0


def test_the_paired_bootstrap_agrees_with_the_t_test_for_many_samples():
    rng = random.Random(3)
    noise = [rng.gauss(0, 1) for _ in range(400)]
    mean = sum(noise) / 400
    spread = (sum((v - mean) ** 2 for v in noise) / 399) ** 0.5
    shift = 2.2 * spread / 20  # 2.2 standard errors: p = 0.0284 by t with 399 degrees of freedom
    (low, high), p = paired_bootstrap([v - mean + shift for v in noise], [1] * 400)
    assert p == pytest.approx(0.0284, abs=0.006)
    assert (low, high) == pytest.approx((shift - 1.966 * spread / 20, shift + 1.966 * spread / 20), abs=0.01)
    reversed_p = paired_bootstrap([mean - v - shift for v in noise], [1] * 400)[1]
    assert reversed_p == pytest.approx(p, abs=0.005)


def test_clusters_are_drawn_whole():
    rng = random.Random(1)
    by_text = [rng.gauss(0.1, 1) for _ in range(20)]
    alone = paired_bootstrap([10 * v for v in by_text], [10] * 20)[0]
    as_if_independent = paired_bootstrap([v for v in by_text for _ in range(10)], [1] * 200)[0]
    assert alone[1] - alone[0] > 2.5 * (as_if_independent[1] - as_if_independent[0])  # sqrt(10) = 3.2


def test_few_clusters_never_give_a_smaller_p_than_their_signs_could():
    assert paired_bootstrap([0.3], [1]) == (None, 1.0)
    assert paired_bootstrap([0.3, 0.3, 0.3], [1, 1, 1]) == ((pytest.approx(0.3), pytest.approx(0.3)), 0.25)
    # No draw falls on the other side; Student's t with 39 degrees of freedom makes 2 / 10,001 of it 0.00072.
    assert paired_bootstrap([0.3] * 40, [1] * 40)[1] == pytest.approx(0.00072, abs=5e-6)


def test_the_interval_leaves_0_out_exactly_where_p_is_below_5_per_cent():
    rng = random.Random(5)
    for _ in range(60):
        differences = [rng.gauss(0.45, 1) for _ in range(20)]
        (low, high), p = paired_bootstrap(differences, [1] * 20)
        assert (p < 0.05) == (not low <= 0 <= high) or p == pytest.approx(0.05, abs=0.004)


def test_holm_steps_down_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_yes_no_results_are_told_from_graded_ones():
    assert is_binary([0.0, 1.0, 1])
    assert not is_binary([0.0, 0.5])
    assert not is_binary([float("nan")])
