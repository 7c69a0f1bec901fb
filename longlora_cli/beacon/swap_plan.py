"""Which rows make the memory once retrieved spans stand in it at the finer level: pure integers, no tensors.

A closed window of the past is held twice. The coarse level is the memory itself: one row for each beacon, or for each
raw token at ratio 0. The fine level waits on the CPU with more rows for the same tokens. A retrieved span takes its
fine rows instead of its coarse ones, in order, so that every token of the past is held once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import lcm

from longlora_cli.beacon.retrieval import Span


@dataclass(frozen=True)
class ClosedWindow:
    """One window of the past at both levels.

    Args:
        start: Its first token in the past.
        tokens: How many it turned into memory, a multiple of either ratio that is not 0.
        coarse: Ratio of the memory; 0 for raw tokens.
        fine: Ratio of the finer level.
        sink: Of its first tokens those that the sink holds. Raw rows leave them out, beacons cover them too.
    """

    start: int
    tokens: int
    coarse: int
    fine: int
    sink: int = 0

    def row(self, ratio: int, offset: int) -> int:
        """The row of a level where the token `offset` of this window begins, from its first row on."""
        return offset // ratio if ratio else max(offset - self.sink, 0)

    def rows(self, ratio: int) -> int:
        """Rows of a level."""
        return self.row(ratio, self.tokens)

    def replaced(self, spans: Sequence[Span]) -> list[Span]:
        """The offsets of tokens that come from the fine level: the spans, widened to whole beacons of both levels."""
        unit = lcm(max(self.coarse, 1), max(self.fine, 1))
        found: list[Span] = []
        for span in spans:
            first, end = max(span.start - self.start, 0), min(span.end - self.start, self.tokens)
            if first >= end:
                continue
            first, end = first // unit * unit, -(-end // unit) * unit
            if found and first < found[-1].end:  # two spans in the same unit
                found[-1] = Span(found[-1].start, max(end, found[-1].end))
            else:
                found.append(Span(first, end))
        return found


@dataclass(frozen=True)
class Piece:
    """Rows `first <= row < end`, of the fine level of one window, or of the coarse memory where `window` is None."""

    window: int | None
    first: int
    end: int


def swap_plan(windows: Sequence[ClosedWindow], spans: Sequence[Span]) -> list[Piece]:
    """The rows of the new memory in order, in as few pieces as possible.

    Args:
        windows: All closed windows in order. The coarse memory is their coarse rows one after another.
        spans: Tokens of the past to hold finely, in order. What they have beyond the closed windows is raw anyway.

    Returns:
        Pieces that hold every token of the closed windows once.
    """
    pieces: list[Piece] = []
    starts = list(accumulate((window.rows(window.coarse) for window in windows), initial=0))
    for number, (window, base) in enumerate(zip(windows, starts[:-1], strict=True)):
        reached = 0
        for span in window.replaced(spans):
            _append(
                pieces,
                None,
                base + window.row(window.coarse, reached),
                base + window.row(window.coarse, span.start),
            )
            _append(pieces, number, window.row(window.fine, span.start), window.row(window.fine, span.end))
            reached = span.end
        _append(pieces, None, base + window.row(window.coarse, reached), base + window.rows(window.coarse))
    return pieces


def _append(pieces: list[Piece], window: int | None, first: int, end: int) -> None:
    if first == end:
        return
    if pieces and pieces[-1].window == window and pieces[-1].end == first:
        pieces[-1] = Piece(window, pieces[-1].first, end)
    else:
        pieces.append(Piece(window, first, end))
