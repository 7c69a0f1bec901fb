"""Windows as integers: properties over all plans, and the worked example of the method."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.windows import (
    Cursor,
    WindowStep,
    capacity,
    closing,
    closings,
    layout,
    next_step,
    training_steps,
)


@st.composite
def plans(draw: st.DrawFn) -> tuple[BeaconSettings, int]:
    """Any valid settings with one ratio, and that ratio."""
    unit = draw(st.integers(1, 5))
    hop = unit * draw(st.integers(1, 5))
    ratio = draw(st.sampled_from([0, unit]))
    append = draw(st.booleans())
    attention = draw(st.sampled_from(["full-coverage", "step-expansion", "segmentation"]))
    settings = BeaconSettings(
        window=hop + (draw(st.integers(0, 4)) if append else 0),
        stride=hop,
        ratios=(ratio,),
        position="append" if append else "interleave",
        attention=attention,
        attend_prev=draw(st.booleans()) if append or attention != "full-coverage" else True,
        sink=draw(st.integers(0, hop)),
    )
    settings.validate()
    return settings, ratio


def walk(settings: BeaconSettings, ratio: int, calls: list[int]) -> tuple[list[WindowStep], Cursor]:
    """All steps of feeding so many tokens in each call."""
    cursor, steps = Cursor(), []
    for tokens in calls:
        while tokens:
            step, cursor = next_step(cursor, tokens, settings, ratio)
            steps.append(step)
            tokens -= step.tokens
    return steps, cursor


@given(plans(), st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_any_pieces_compute_the_same_rows_once(plan: tuple[BeaconSettings, int], calls: list[int]) -> None:
    whole, end = walk(*plan, [sum(calls)])
    pieces, other_end = walk(*plan, calls)
    assert other_end == end
    for steps in (whole, pieces):
        for before, after in pairwise(steps):
            stay = len(before.closing.stay) if before.closing else None
            assert after.first == (before.last if stay is None else stay)

    def rows(steps: list[WindowStep]) -> list[tuple[int, int, int]]:
        return [(s.memory, s.ratio, row) for s in steps for row in range(s.first, s.last)]

    assert rows(pieces) == rows(whole)


@given(plans(), st.integers(1, 120))
def test_the_memory_is_sink_and_beacons_of_whole_windows(
    plan: tuple[BeaconSettings, int], tokens: int
) -> None:
    settings, ratio = plan
    _, cursor = walk(settings, ratio, [tokens])
    windows = 0 if tokens < settings.window else 1 + (tokens - settings.window) // settings.hop
    sink = settings.sink if windows and ratio else 0
    assert cursor.windows == windows
    assert cursor.memory == sink + windows * (settings.hop // ratio if ratio else settings.hop)
    assert cursor.tokens == tokens


@given(plans())
def test_kept_rows_move_to_compact_positions_and_never_forward(plan: tuple[BeaconSettings, int]) -> None:
    settings, ratio = plan
    window = layout(settings, ratio)
    for sink in {0, settings.sink}:
        closed = closing(settings, ratio, sink=sink)
        moved = [window.positions[r] + m for r, m in zip(closed.keep, closed.keep_moves, strict=True)]
        moved += [window.positions[r] + m for r, m in zip(closed.stay, closed.stay_moves, strict=True)]
        assert moved == list(range(len(moved)))
        # Sink and beacons together can be more rows than the window has positions; without a sink they never are.
        assert sink or all(move <= 0 for move in closed.keep_moves + closed.stay_moves)
        assert len(closed.stay) == settings.window - settings.hop


@given(plans(), st.integers(1, 300), st.integers(20, 80))
def test_no_position_reaches_the_limit_within_the_capacity(
    plan: tuple[BeaconSettings, int], tokens: int, limit: int
) -> None:
    settings, ratio = plan
    room = capacity(ratio, settings, limit)
    if room:
        steps, _ = walk(settings, ratio, [min(tokens, room)])
        assert max(p for step in steps for p in step.positions) < limit


def test_the_capacity_counts_sink_and_own_beacons() -> None:
    # Without them 8,192 positions would hold 15,360 / 29,696 / 58,368 tokens at ratios 2, 4, 8.
    settings = BeaconSettings(sink=1)
    assert [capacity(ratio, settings, 8192) for ratio in (0, 2, 4, 8)] == [8192, 13312, 27648, 56320]
    assert capacity(2, settings, 1024) == 0


def test_the_worked_example() -> None:
    steps, cursor = walk(BeaconSettings(window=8, ratios=(4,)), 4, [20, 1, 1, 1, 1])
    assert [(s.tokens, s.beacon_rows, s.positions) for s in steps] == [
        (8, [4, 9], list(range(10))),
        (8, [4, 9], list(range(2, 12))),
        (4, [4], list(range(4, 9))),
        (1, [], [9]),
        (1, [], [10]),
        (1, [], [11]),
        (1, [1], [12, 13]),
    ]
    assert cursor == Cursor(tokens=24, memory=6, filled=0, windows=3)


def test_beacons_that_step_stand_behind_what_they_see() -> None:
    settings = BeaconSettings(window=8, position="append", attention="step-expansion")
    assert layout(settings, 4).positions == (*range(8), 4, 9)
    apart = BeaconSettings(window=8, position="append", attention="step-expansion", attend_prev=False)
    assert layout(apart, 4).positions == (*range(8), 4, 8)


@given(plans(), st.integers(1, 120))
def test_training_gives_the_last_window_no_beacons_even_when_it_is_full(
    plan: tuple[BeaconSettings, int], tokens: int
) -> None:
    settings, ratio = plan
    steps = list(training_steps(tokens, settings, lambda number: ratio))
    assert len(steps) == closings(tokens, settings) + 1
    assert [step.closing is None for step, _ in steps] == [False] * (len(steps) - 1) + [True]
    assert not steps[-1][0].beacon_rows
    counts = [step.tokens for step, _ in steps]
    assert [0, *accumulate(counts)] == [cursor.tokens for _, cursor in steps] + [tokens]


def test_a_step_without_tokens_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="needs a token"):
        next_step(Cursor(), 0, BeaconSettings(), 2)
