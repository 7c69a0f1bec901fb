from __future__ import annotations

import pytest

from longlora_cli.evaluation.effective_length import effective_lengths, tokens
from longlora_cli.evaluation.statistics import wilson

K = 1024


def scores(n=100, **right):
    return [
        {"length": int(name[1:]) * K, "score": r / n, "ci95": list(wilson(r, n))} for name, r in right.items()
    ]


def test_rulers_rule_takes_the_longest_length_at_or_above_its_threshold():
    found = effective_lengths(scores(n=1000, L4=960, L8=930, L16=856, L32=700, L64=300))["ruler"]
    assert (found["length"], found["threshold"]) == (16 * K, 0.856)
    assert found["not_excluded"] == []
    assert found["certain"] == 8 * K
    assert found["text"] == "16K; certain: 8K"


def test_what_the_interval_does_not_exclude_is_named():
    found = effective_lengths(scores(L4=100, L32=96, L64=82, L128=40))["ruler"]
    assert (found["length"], found["certain"], found["not_excluded"]) == (32 * K, 32 * K, [64 * K])
    assert found["text"] == "32K, but 64K not excluded"


def test_the_longest_length_measured_is_a_lower_bound_and_failures_before_it_are_told():
    found = effective_lengths(scores(n=1000, L4=990, L8=700, L16=980))["ruler"]
    assert (found["length"], found["failed_before"]) == (16 * K, [8 * K])
    assert found["text"] == "16K or more, the longest measured; fails at 8K"


def test_no_length_that_passes_is_told():
    found = effective_lengths(scores(L4=80, L8=20))["ruler"]
    assert (found["length"], found["certain"], found["not_excluded"]) == (None, None, [4 * K])
    assert found["text"] == "below 4K, but 4K not excluded"
    assert effective_lengths(scores(L4=50, L8=20))["ruler"]["text"] == "below 4K"


def test_another_threshold_gives_another_length():
    lengths = scores(n=1000, L4=990, L8=870, L16=600)
    assert effective_lengths(lengths)["ruler"]["length"] == 8 * K
    assert effective_lengths(lengths, threshold=0.95)["ruler"]["length"] == 4 * K
    assert effective_lengths(lengths, threshold=0.5)["ruler"]["length"] == 16 * K


def test_nolimas_rule_takes_85_per_cent_of_the_best_short_score():
    lengths = [
        {"length": length, "score": score, "ci95": [score - 0.01, score + 0.01]}
        for length, score in [(256, 0.90), (512, 0.96), (K, 0.94), (2 * K, 0.90), (4 * K, 0.82), (8 * K, 0.7)]
    ]
    found = effective_lengths(lengths)["nolima"]
    assert (found["base"], found["base_length"]) == (0.96, 512)
    assert found["threshold"] == pytest.approx(0.816)
    assert found["length"] == 4 * K  # 0.82 >= 0.816
    assert found["certain"] == 2 * K


def test_without_short_lengths_the_shortest_is_the_base_and_passes_by_definition():
    found = effective_lengths(scores(L8=40, L4=50, L16=10))["nolima"]
    assert (found["base"], found["base_length"], found["length"]) == (0.5, 4 * K, 4 * K)
    assert (found["certain"], found["not_excluded"]) == (4 * K, [8 * K])


def test_the_chance_in_the_base_widens_nolimas_interval():
    sure = [
        {"length": K, "score": 0.9, "ci95": [0.9, 0.9]},
        {"length": 2 * K, "score": 0.74, "ci95": [0.72, 0.76]},
    ]
    assert effective_lengths(sure)["nolima"]["not_excluded"] == []  # 0.765 is above 0.76
    unsure = [{**sure[0], "ci95": [0.8, 0.95]}, sure[1]]
    assert effective_lengths(unsure)["nolima"]["not_excluded"] == [2 * K]
    passes = {"length": 2 * K, "score": 0.78, "ci95": [0.77, 0.79]}  # above 0.765, but not above 0.85 * 0.95
    assert effective_lengths([sure[0], passes])["nolima"]["certain"] == 2 * K
    assert effective_lengths([unsure[0], passes])["nolima"]["certain"] == K


def test_a_base_of_nothing_has_no_effective_length():
    found = effective_lengths(scores(L1=0, L2=0))["nolima"]
    assert (found["length"], found["text"]) == (None, "below 1K")


def test_one_length_has_no_effective_length_and_without_intervals_nothing_is_excluded():
    assert effective_lengths(scores(L4=100)) is None
    bare = [
        {"length": 4 * K, "score": 0.9, "ci95": None},
        {"length": 8 * K, "score": 0.1, "ci95": None},
    ]
    found = effective_lengths(bare)["ruler"]
    assert (found["length"], found["certain"], found["not_excluded"]) == (4 * K, None, [8 * K])


def test_lengths_are_written_as_people_do():
    assert [tokens(n) for n in (512, 1000, 1024, 32768, 1 << 20)] == ["512", "1,000", "1K", "32K", "1M"]
