"""Tests of two models that were asked the same questions: exact for yes/no results, a bootstrap for all others.

Questions asked of both models remove what makes a question easy or hard, so that pairs show smaller gaps than two
separate scores can (`statistics.smallest_paired_gap`). Everything here is exact arithmetic or seeded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from longlora_cli.evaluation.statistics import Interval, tail_share, widened_p

# The smallest share that these can tell is 1 / 10,001 a side: enough to stay below 5 % after Holm over 250 cells.
_DRAWS = 10_000
_BLOCK = 1 << 22


def mcnemar(first_only: int, second_only: int) -> float:
    """Two-sided p that two models are right equally often, from the questions that only one of them got right.

    Questions that both got right, or both wrong, say nothing about a difference. If none was, each of the others was
    equally likely to fall to either side: the p is that of a fair coin, twice the smaller tail, at most 1.

    Raises:
        ValueError: A count is negative.

    Source:
        McNemar 1947, Psychometrika 12(2); exact instead of by chi-square, which is too small for few questions.
    """
    if first_only < 0 or second_only < 0:
        raise ValueError(f"{first_only} and {second_only} questions")
    n = first_only + second_only
    term = tail = 1
    for k in range(min(first_only, second_only)):
        term = term * (n - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)  # whole numbers of any size, divided once


def mcnemar_by_text(differences: Sequence[int]) -> float:
    """`mcnemar` for questions of which several share a text: whole texts change sides, not single questions.

    Answers about one text rise and fall together, so that 10 questions about one text are no 10 coins. The p is the
    share of all ways to swap the two models within texts whose sum is as far from 0 as the one found, exactly; with
    one question a text it is `mcnemar`. `n` texts that all differ cannot give less than `2 / 2^n`.

    Args:
        differences: For each text, right answers of the first model minus those of the second.

    Source:
        Fisher 1935, The Design of Experiments, section 21 (the randomization test of pairs).
    """
    found = abs(sum(differences))
    ways: Counter[int] = Counter({0: 1})
    for size in (abs(d) for d in differences if d):
        after: Counter[int] = Counter()
        for total, count in ways.items():
            after[total + size] += count
            after[total - size] += count
        ways = after
    return sum(count for total, count in ways.items() if abs(total) >= found) / sum(ways.values())


def paired_bootstrap(
    differences: Sequence[float], counts: Sequence[float], *, seed: int = 0
) -> tuple[Interval | None, float]:
    """95 % interval and two-sided p of `sum(differences) / sum(counts)` when whole clusters are drawn again.

    The p is twice the smaller share of draws on either side of 0. Both are widened for few clusters by Student's t
    (`statistics.tail_share`), so that p is below 5 % where the interval leaves 0 out. Yet `n` clusters with a
    difference can be told from chance by 2 / 2^n at best, however equal they are: a smaller p is raised to it.

    Args:
        differences: First model minus second, summed over each cluster (a text, a window, a sample).
        counts: How many values each sum holds.
        seed: Of the draws.

    Returns:
        The interval, None for fewer than two clusters, and the p, 1 when no cluster differs.
    """
    top, below = np.asarray(differences, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    changed = int(np.count_nonzero(top))
    if len(top) < 2:
        return None, 1.0
    if changed == 0:
        return (0.0, 0.0), 1.0
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(top))
    pieces = []
    for start in range(0, _DRAWS, rows):
        drawn = rng.integers(0, len(top), (min(rows, _DRAWS - start), len(top)))
        pieces.append(top[drawn].sum(1) / below[drawn].sum(1))
    means = np.concatenate(pieces)
    tail = tail_share(len(top))
    low, high = np.quantile(means, [tail, 1 - tail])
    # One more draw on each side: no number of draws can show that a p is 0 (Davison and Hinkley 1997, 4.2).
    tails = [(np.count_nonzero(side) + 1) / (_DRAWS + 1) for side in (means <= 0, means >= 0)]
    p = widened_p(min(1.0, 2 * min(tails)), len(top))
    return (float(low), float(high)), max(p, 2.0 ** (1 - changed))


def holm(values: Sequence[float]) -> list[float]:
    """p values that stay right though several are looked at: below 5 % each, and the chance that any is so without a
    difference is below 5 %.

    Source:
        Holm 1979, Scandinavian Journal of Statistics 6(2).
    """
    adjusted = [0.0] * len(values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda index: values[index])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


def is_binary(values: Sequence[float]) -> bool:
    """All values are 0 or 1, so that `mcnemar` applies."""
    return all(value in (0.0, 1.0) for value in values) and not any(math.isnan(value) for value in values)
