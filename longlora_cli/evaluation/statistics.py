"""Intervals: no number is reported without saying how far chance alone could have moved it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_Z95 = 1.959963984540054  # 97.5 % point of the normal distribution
_DRAWS = 2000
# Draws are made in blocks of about this many indices, so that 100,000 clusters do not take gigabytes.
_BLOCK = 1 << 22

Interval = tuple[float, float]


def wilson(successes: float, n: int) -> Interval:
    """95 % interval of a share of `n` yes/no results.

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


def bootstrap_ratio(sums: Sequence[float], counts: Sequence[float], *, seed: int = 0) -> Interval | None:
    """95 % percentile interval of `sum(sums) / sum(counts)` when whole clusters are drawn again.

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
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(low), float(high)


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
