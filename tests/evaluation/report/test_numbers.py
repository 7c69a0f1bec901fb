"""How numbers are written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.evaluation.report.numbers import interval, number, percent, ticks, tokens


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (percent(0.875), "87.5 %"),
        (percent(1.0), "100 %"),
        (percent(0.9996), "100 %"),
        (percent(2 / 3, 0), "67 %"),
        (tokens(512), "512"),
        (tokens(4096), "4K"),
        (tokens(5000), "5,000"),
        (tokens(1 << 20), "1M"),
        (number(12345), "12,345"),
        (number(2.0), "2"),
        (number(0.123456), "0.1235"),
        (number(1234567.8), "1,234,568"),
        (interval([0.5, 1.0], is_share=True), "[50, 100] %"),
        (interval([2.3456, 12.5], is_share=False), "[2.346, 12.5]"),
        (interval(None, is_share=True), "–"),
    ],
)
def test_numbers_are_written_so(written, expected):
    assert written == expected


@given(st.floats(-1e3, 1e3), st.floats(0, 1e3))
def test_ticks_hold_their_range_in_a_few_round_steps(low, width):
    found = ticks(low, low + width)
    step = found[1] - found[0]
    assert found[0] <= low + 1e-6 * step
    assert found[-1] >= low + width - 1e-6 * step
    assert 2 <= len(found) <= 8
    leading = float(f"{step:.0e}".split("e")[0])
    assert leading in (1, 2, 5)
