"""Intervals: no number is reported without saying how far chance alone could have moved it.

Which one is used where: independent yes/no results have Wilson's; yes/no results of which several belong to one
text have Wilson's with as many results as they are worth (`wilson_clustered`); everything else is a bootstrap that
draws whole texts, windows or samples. Tests of two models on the same questions are in `paired.py`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

_Z95 = 1.959963984540054  # 97.5 % point of the normal distribution
_Z80 = 0.8416212335729143  # 80 % point: the power that a smallest gap is stated for
_DRAWS = 2000
# Draws are made in blocks of about this many indices, so that 100,000 clusters do not take gigabytes.
_BLOCK = 1 << 22
_NORMAL = NormalDist()
_MANY = 10_000  # degrees of freedom from which on two terms of the normal law's expansion are exact to 1e-9

Interval = tuple[float, float]


def wilson(successes: float, n: float) -> Interval:
    """95 % interval of a share of `n` independent yes/no results; `n` need not be whole, see `wilson_clustered`.

    Unlike mean +- 2 standard errors it stays inside [0, 1] and is not empty at 0 % and 100 %: 20 of 20 right
    is "at least 84 %". Source: Wilson 1927, JASA 22(158).

    Raises:
        ValueError: `n` is below 1, or there are more successes than results.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    share, z2 = successes / n, _Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else middle - half  # exactly 0 and 1, not to rounding
    high = 1.0 if successes == n else middle + half
    return low, high


def wilson_clustered(successes: Sequence[float], counts: Sequence[int]) -> Interval:
    """95 % interval of a share of yes/no results that come in clusters, such as all questions about one text.

    Wilson's interval for as many independent results as these are worth: `n / deff * (t(n - 1) / t(clusters - 1))^2`,
    where `deff` is the variance between clusters over that of independent results, and the quantiles of Student's t
    pay for knowing that variance from few clusters only. It is never worth less than one result per cluster nor more
    than `n`; with one result per cluster it is Wilson's own. Unlike a bootstrap of clusters it is not empty when all
    clusters agree: 20 of 20 right in 4 texts is "at least 69 %", where 20 of 20 in 20 texts is "at least 84 %".

    Args:
        successes: Right answers of each cluster.
        counts: Answers of each cluster, at least 1.

    Raises:
        ValueError: No cluster, an empty one, or more successes than answers.

    Source:
        Korn and Graubard 1998, Survey Methodology 24(2), for the effective size; with Wilson's interval as in Franco
        et al. 2019, J. Survey Statistics and Methodology 7(3).
    """
    top, below = np.asarray(successes, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if len(below) < 1 or below.min() < 1 or (top > below).any() or top.min() < 0:
        raise ValueError(f"{list(successes)} successes of {list(counts)}")
    clusters, n, right = len(below), float(below.sum()), math.fsum(successes)
    if clusters == 1 or clusters == n:
        worth = float(clusters)
    else:
        share = right / n
        between = clusters / (clusters - 1) * float(((top - share * below) ** 2).sum())
        # All right or all wrong: nothing is seen of how alike a text's answers are, which leaves t to pay for it.
        deff = between / (n * share * (1 - share)) if 0 < right < n else 1.0
        few = (student_t95(int(n) - 1) / student_t95(clusters - 1)) ** 2
        worth = min(max(n / deff * few if deff > 0 else n, clusters), n)
    return wilson(min(right / n * worth, worth), worth)


@cache
def student_t95(freedom: int) -> float:
    """97.5 % point of Student's t with a whole number of degrees of freedom, to 1e-12.

    Raises:
        ValueError: Less than one degree of freedom.

    Source:
        Abramowitz and Stegun 1964, 26.7.3 and 26.7.4, for the distribution; halving finds the point.
    """
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom")
    if freedom > _MANY:
        return _Z95 + (_Z95**3 + _Z95) / (4 * freedom)
    low, high = 1.0, 13.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (low, middle) if student_within(middle, freedom) >= 0.95 else (middle, high)
    return (low + high) / 2


def student_within(t: float, freedom: int) -> float:
    """Probability that Student's t with a whole number of degrees of freedom lies between -t and t."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for step in range(freedom // 2):
        total += term
        number = 2 * step + 1 + odd
        term *= square * number / (number + 1)
    return (2 / math.pi) * (angle + sine * total) if odd else sine * total


def bootstrap_ratio(sums: Sequence[float], counts: Sequence[float], *, seed: int = 0) -> Interval | None:
    """95 % percentile interval of `sum(sums) / sum(counts)` when whole clusters are drawn again, see `tail_share`.

    Args:
        sums: One sum per cluster (document, window, sample).
        counts: How many values each sum holds.
        seed: Of the draws; the same input gives the same interval.

    Returns:
        The interval, or None for fewer than two clusters, which say nothing about spread.
    """
    top, bottom = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if len(top) < 2:
        return None
    rng = np.random.default_rng(seed)
    ratios: list[npt.NDArray[np.float64]] = []
    rows = max(1, _BLOCK // len(top))
    for start in range(0, _DRAWS, rows):
        drawn = rng.integers(0, len(top), (min(rows, _DRAWS - start), len(top)))
        below = bottom[drawn].sum(1)
        ratios.append(top[drawn].sum(1)[below > 0] / below[below > 0])
    tail = tail_share(len(top))
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return float(low), float(high)


def tail_share(clusters: int) -> float:
    """The share of draws that a 95 % interval leaves out on either side: 2.5 % for many clusters, less for few.

    Draws from few clusters spread too little: by the root of (n - 1) / n, and as if their spread were known. The
    interval is widened to where Student's t would end: 1.5 % at 20 clusters, 0.1 % at 5.

    Source:
        Hesterberg 2015, The American Statistician 69(4), the expanded percentile interval.
    """
    return _NORMAL.cdf(-math.sqrt(clusters / (clusters - 1)) * student_t95(clusters - 1))


def widened_p(p: float, clusters: int) -> float:
    """A bootstrap's two-sided p, made larger for few clusters: 5 % where the interval of `tail_share` ends."""
    if p >= 1 or clusters < 2:
        return 1.0
    t = -_NORMAL.inv_cdf(p / 2) * math.sqrt((clusters - 1) / clusters)
    return 1 - student_within(t, clusters - 1) if clusters <= _MANY else p


def share(values: Sequence[float]) -> dict[str, Any]:
    """Mean of yes/no results with its Wilson interval: `{"n", "score", "ci95"}`."""
    successes = sum(values)
    return {"n": len(values), "score": successes / len(values), "ci95": list(wilson(successes, len(values)))}


def mean(values: Sequence[float], *, binary: bool = False) -> dict[str, Any]:
    """Mean with an interval: Wilson's for yes/no results, else a bootstrap over the samples.

    `ci95` is None for a single graded value.
    """
    if binary:
        return share(values)
    interval = bootstrap_ratio(values, [1.0] * len(values))
    score = math.fsum(values) / len(values)
    return {"n": len(values), "score": score, "ci95": None if interval is None else list(interval)}


def share_clustered(values: Sequence[float], clusters: Sequence[Hashable]) -> dict[str, Any]:
    """`share` of yes/no results where those of one cluster share a text: `wilson_clustered`, with `clusters` counted.

    Args:
        values: 0 or 1 each.
        clusters: Of the same length; equal marks belong together.
    """
    sums, counts = _by_cluster(values, clusters)
    low, high = wilson_clustered(sums, counts)
    return {
        "n": len(values),
        "score": math.fsum(values) / len(values),
        "ci95": [low, high],
        "clusters": len(counts),
    }


def mean_clustered(
    values: Sequence[float], clusters: Sequence[Hashable], *, binary: bool = False
) -> dict[str, Any]:
    """`mean` where values of one cluster (a text, a document) are not independent: whole clusters are drawn again.

    Yes/no results have `wilson_clustered`. With one value per cluster it is `mean`. `ci95` is None for a single
    cluster of graded values.
    """
    if binary:
        return share_clustered(values, clusters)
    sums, counts = _by_cluster(values, clusters)
    interval = bootstrap_ratio(sums, counts)
    return {
        "n": len(values),
        "score": math.fsum(values) / len(values),
        "ci95": None if interval is None else list(interval),
        "clusters": len(counts),
    }


def _by_cluster(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[list[float], list[int]]:
    """Sum and count of each cluster, in the order in which clusters appear."""
    sums: dict[Hashable, float] = {}
    counts: dict[Hashable, int] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value
        counts[cluster] = counts.get(cluster, 0) + 1
    return list(sums.values()), list(counts.values())


def smallest_gap(n: int, *, share: float = 0.85) -> float:
    """The true gap between two models that `n` questions each, asked independently, show with 80 % power.

    At 5 % two-sided, for shares about `share`, by the normal law: 100 questions at 85 % show 14 points, no less.

    Raises:
        ValueError: `n` is below 1 or `share` is not between 0 and 1.
    """
    if n < 1 or not 0 < share < 1:
        raise ValueError(f"n={n}, share={share}")
    return (_Z95 + _Z80) * math.sqrt(2 * share * (1 - share) / n)


def smallest_paired_gap(n: int, *, disagreement: float = 0.10) -> float:
    """As `smallest_gap` for two models on the same `n` questions, of which they judge `disagreement` differently.

    Pairs remove what makes questions easy or hard: 100 questions with 10 % disagreement show 8.9 points.

    Raises:
        ValueError: `n` is below 1 or `disagreement` is not in (0, 1].
    """
    if n < 1 or not 0 < disagreement <= 1:
        raise ValueError(f"n={n}, disagreement={disagreement}")
    return (_Z95 + _Z80) * math.sqrt(disagreement / n)
