"""The rows of a memory with retrieved spans in it: every token once, in order, whole beacons only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.beacon.retrieval import Span, merged
from longlora_cli.beacon.swap_plan import ClosedWindow, Piece, swap_plan

WINDOW = 24


def _tokens(windows: list[ClosedWindow], pieces: list[Piece]) -> list[tuple[int, bool]]:
    """Each token of the past as (token, whether it is held finely), in the order of the rows."""
    coarse_rows: list[list[int]] = []
    fine_rows: dict[tuple[int, int], list[int]] = {}
    for number, window in enumerate(windows):
        for ratio, fine in ((window.coarse, False), (window.fine, True)):
            size = ratio or 1
            units = [
                list(range(window.start + first, window.start + first + size))
                for first in range(0, window.tokens, size)
                if ratio or first >= window.sink
            ]
            if fine:
                fine_rows |= {(number, row): unit for row, unit in enumerate(units)}
            else:
                coarse_rows += units
    found = []
    for piece in pieces:
        for row in range(piece.first, piece.end):
            unit = coarse_rows[row] if piece.window is None else fine_rows[piece.window, row]
            found += [(token, piece.window is not None) for token in unit]
    return found


ratios = st.sampled_from([0, 2, 3, 4, 8, 12, 24])
spans_of_the_past = st.lists(
    st.tuples(st.integers(0, 110), st.integers(1, 30)).map(lambda p: Span(p[0], sum(p))), max_size=5
).map(merged)


@given(levels=st.lists(st.tuples(ratios, ratios), max_size=4), spans=spans_of_the_past)
def test_every_token_is_held_once_in_order_and_every_retrieved_one_finely(
    levels: list[tuple[int, int]], spans: list[Span]
) -> None:
    windows = [
        ClosedWindow(number * WINDOW, WINDOW, coarse, fine) for number, (coarse, fine) in enumerate(levels)
    ]
    held = _tokens(windows, swap_plan(windows, spans))
    assert [token for token, _ in held] == list(range(WINDOW * len(levels)))
    wanted = {token for span in spans for token in range(span.start, span.end)}
    assert all(fine for token, fine in held if token in wanted)


def test_only_whole_beacons_of_both_levels_are_swapped() -> None:
    windows = [ClosedWindow(0, 24, coarse=8, fine=3)]
    assert swap_plan(windows, [Span(1, 2)]) == [Piece(0, 0, 8)]  # 24 is their least common multiple
    windows = [ClosedWindow(0, 24, coarse=8, fine=2)]
    assert swap_plan(windows, [Span(9, 10)]) == [Piece(None, 0, 1), Piece(0, 4, 8), Piece(None, 2, 3)]


def test_a_span_over_two_windows_takes_from_both() -> None:
    windows = [ClosedWindow(0, 16, 8, 0), ClosedWindow(16, 16, 8, 0)]
    assert swap_plan(windows, [Span(8, 24)]) == [
        Piece(None, 0, 1),
        Piece(0, 8, 16),
        Piece(1, 0, 8),
        Piece(None, 3, 4),
    ]


def test_untouched_windows_are_one_piece() -> None:
    windows = [ClosedWindow(16 * number, 16, 4, 0) for number in range(3)]
    assert swap_plan(windows, []) == [Piece(None, 0, 12)]


def test_tokens_of_the_sink_are_not_held_a_second_time() -> None:
    windows = [ClosedWindow(0, 8, coarse=4, fine=0, sink=3)]
    assert swap_plan(windows, [Span(0, 4)]) == [Piece(0, 0, 1), Piece(None, 1, 2)]
    assert swap_plan(windows, [Span(0, 8)]) == [Piece(0, 0, 5)]


def test_what_lies_beyond_the_closed_windows_is_left_as_it_is() -> None:
    assert swap_plan([ClosedWindow(0, 8, 4, 2)], [Span(8, 30)]) == [Piece(None, 0, 2)]
    assert swap_plan([], [Span(0, 30)]) == []
