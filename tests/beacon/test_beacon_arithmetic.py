"""Rows and positions by arithmetic are those of the plan, step by step."""

from __future__ import annotations

import pytest

from longlora_cli.beacon.arithmetic import held_rows, trained_positions
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.windows import Cursor, next_step, training_steps

PLANS = [
    BeaconSettings(16, ratios=(2, 4)),
    BeaconSettings(16, ratios=(4,), sink=3),
    BeaconSettings(16, position="append", ratios=(4, 8)),
    BeaconSettings(16, 8, position="append", ratios=(2,), sink=1),
    BeaconSettings(16, ratios=(0, 4)),
]


@pytest.mark.parametrize("settings", PLANS)
def test_held_rows_are_those_that_the_plan_leaves(settings: BeaconSettings) -> None:
    for ratio in settings.ratios:
        for tokens in range(1, 80):
            cursor, held = Cursor(), 0
            while cursor.tokens < tokens:
                step, cursor = next_step(cursor, tokens - cursor.tokens, settings, ratio)
                held = (
                    step.memory + step.last
                    if step.closing is None
                    else cursor.memory + len(step.closing.stay)
                )
            assert held_rows(settings, ratio, tokens) == held


@pytest.mark.parametrize("settings", PLANS)
def test_no_trained_position_is_beyond_the_arithmetic_and_one_reaches_it(settings: BeaconSettings) -> None:
    smallest = min(ratio for ratio in settings.ratios if ratio)
    for windows in (2, 3, 5):
        tokens = settings.window + (windows - 1) * settings.hop
        found = []
        for whole in range(
            -1, windows - 2 if 0 in settings.ratios else 0
        ):  # the window that keeps all, if any
            steps = training_steps(tokens, settings, lambda n, whole=whole: 0 if n == whole else smallest)
            found.append(max(max(step.positions) + 1 for step, _ in steps))
        assert max(found) <= trained_positions(settings, windows)
        if windows > 2 and settings.hop == settings.window and not settings.masked:
            assert max(found) == trained_positions(settings, windows)
