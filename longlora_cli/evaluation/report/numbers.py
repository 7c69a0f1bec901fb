"""How numbers are written in a report: the same number is the same text everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence


def percent(share: float, digits: int = 1) -> str:
    """`0.875` -> `87.5 %`; whole per cents without a decimal."""
    return f"{_trimmed(100 * share, digits)} %"


def tokens(count: int) -> str:
    """A length: `4096` -> `4K`, `1048576` -> `1M`, others in full with commas."""
    if count >= 1 << 20 and count % (1 << 20) == 0:
        return f"{count >> 20}M"
    return f"{count >> 10}K" if count >= 1024 and count % 1024 == 0 else f"{count:,}"


def number(value: float | None) -> str:
    """Any number: whole ones with commas, others with four significant digits; a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"


def interval(ci95: Sequence[float] | None, *, is_share: bool) -> str:
    """`[78.1, 93.2] %` of a share, `[2.31, 2.52]` of others, a dash where there is none."""
    if ci95 is None:
        return "–"
    low, high = ci95
    if is_share:
        return f"[{_trimmed(100 * low, 1)}, {_trimmed(100 * high, 1)}] %"
    return f"[{number(low)}, {number(high)}]"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from below `low` to above `high`, in steps of 1, 2 or 5 times a power of ten.

    The first is at most `low` and the last at least `high`; ends that are equal to a millionth get room on both sides.
    """
    largest = max(abs(low), abs(high))
    if high - low < 1e-6 * max(1, largest):
        room = max(0.05 * largest, 1e-3)
        low, high = low - room, high + room
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [count * step for count in range(first, last + 1)]


def _trimmed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".removesuffix("." + "0" * digits) if digits else f"{value:.0f}"
