"""Windows as plain integers: which rows a forward pass has, where they stand, and what stays when a window is full.

A *row* is a raw token or a beacon. The memory has `memory` rows at positions 0 to `memory - 1`; the rows of the open
window follow. When a window is full its kept rows move to the positions right behind the memory, and the rest goes.
So positions never exceed memory + window + beacons of one window, however long the text is (Zhang et al. 2024,
arXiv:2401.03462, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from longlora_cli.beacon.settings import BeaconSettings


@dataclass(frozen=True, eq=False)
class WindowLayout:
    """The rows of a whole window in the order in which they are computed.

    Args:
        raw: Number of each row's raw token in the window, -1 for a beacon.
        beacon: Number of each row's beacon in the window, -1 for a raw token.
        positions: Position of each row, counted from the end of the memory.
        tokens: Raw tokens of the window.
        unit: Raw tokens a beacon stands for; 0: there are no beacons.
        appended: All beacons stand at the end.
        masked: See `BeaconSettings.masked`.
        attention: Of the settings.
        attend_prev: Of the settings.
    """

    raw: tuple[int, ...]
    beacon: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: int
    unit: int
    appended: bool
    masked: bool
    attention: str
    attend_prev: bool

    def rows(self, filled: int) -> int:
        """Rows computed when `filled` raw tokens of the window were fed."""
        if not self.unit or (self.appended and filled < self.tokens):
            return filled
        return len(self.raw) if self.appended else filled + filled // self.unit


@lru_cache(maxsize=64)
def layout(settings: BeaconSettings, ratio: int) -> WindowLayout:
    """The layout of a window with this ratio; 0: raw tokens alone."""
    appended = settings.position == "append"
    beacons = settings.hop // ratio if ratio else 0
    rows: list[int] = []  # a raw token's number, or ~number of a beacon
    for token in range(settings.window):
        rows.append(token)
        if ratio and not appended and (token + 1) % ratio == 0:
            rows.append(~(token // ratio))
    if appended:
        rows += [~beacon for beacon in range(beacons)]
    return WindowLayout(
        raw=tuple(max(row, -1) for row in rows),
        beacon=tuple(max(~row, -1) for row in rows),
        positions=tuple(_positions(rows, settings, ratio)),
        tokens=settings.window,
        unit=ratio,
        appended=appended,
        masked=settings.masked,
        attention=settings.attention,
        attend_prev=settings.attend_prev,
    )


def _positions(rows: list[int], settings: BeaconSettings, ratio: int) -> Iterator[int]:
    """Unmasked, rows stand one behind the other; masked, a beacon stands behind the rows that it sees."""
    if not settings.masked:
        yield from range(len(rows))
        return
    whole = settings.attention == "full-coverage"
    for row in rows:
        if row >= 0:
            yield row
        else:
            beacon = ~row
            seen = settings.window if whole else (beacon + 1) * ratio
            yield seen + (beacon if settings.attend_prev else 0)


@dataclass(frozen=True, eq=False)
class Closing:
    """What becomes of a full window; rows are counted within the window.

    Args:
        keep: Rows that become memory, in order.
        keep_moves: For each, its new position less the one it was computed at.
        stay: Rows that stay raw at the start of the next window (stride below the window).
        stay_moves: As `keep_moves`.
    """

    keep: tuple[int, ...]
    keep_moves: tuple[int, ...]
    stay: tuple[int, ...]
    stay_moves: tuple[int, ...]


@dataclass(frozen=True)
class Cursor:
    """Where a sequence stands.

    Args:
        tokens: Raw tokens fed.
        memory: Rows of the memory: sink, beacons, and the raw rows of windows with ratio 0.
        filled: Raw tokens of the open window, those that stayed from the one before included.
        windows: Windows closed.
    """

    tokens: int = 0
    memory: int = 0
    filled: int = 0
    windows: int = 0


@dataclass(frozen=True)
class WindowStep:
    """The part of one window that one forward pass computes.

    Args:
        layout: The window's.
        ratio: The window's.
        memory: Rows of the memory before it.
        first: First row of the window that is computed; those before it are held.
        last: One past the last row that is computed.
        tokens: Raw tokens among them.
        closing: What stays if the window is full afterwards, else None.
    """

    layout: WindowLayout
    ratio: int
    memory: int
    first: int
    last: int
    tokens: int
    closing: Closing | None

    @property
    def rows(self) -> int:
        """Rows computed."""
        return self.last - self.first

    @property
    def positions(self) -> list[int]:
        """Position of each computed row."""
        return [self.memory + p for p in self.layout.positions[self.first : self.last]]

    @property
    def beacon_rows(self) -> list[int]:
        """Which of the computed rows are beacons, counted from the first computed."""
        beacons = self.layout.beacon[self.first : self.last]
        return [row for row, number in enumerate(beacons) if number >= 0]

    @property
    def raw_rows(self) -> list[int]:
        """Which of the computed rows are raw tokens, counted from the first computed."""
        raw = self.layout.raw[self.first : self.last]
        return [row for row, number in enumerate(raw) if number >= 0]


@lru_cache(maxsize=64)
def closing(settings: BeaconSettings, ratio: int, *, sink: int) -> Closing:
    """What stays of a window with this ratio when it is full.

    Args:
        settings: The plan.
        ratio: Of the window.
        sink: Its first tokens that stay beside its beacons: the settings' sink in the first window, else 0.
    """
    window = layout(settings, ratio)
    if ratio == 0:
        keep = tuple(range(settings.hop))
    else:
        first = tuple(row for row, raw in enumerate(window.raw) if 0 <= raw < sink)
        keep = first + tuple(row for row, number in enumerate(window.beacon) if number >= 0)
    stay = tuple(row for row, raw in enumerate(window.raw) if raw >= settings.hop)
    return Closing(
        keep=keep,
        keep_moves=tuple(new - window.positions[row] for new, row in enumerate(keep)),
        stay=stay,
        stay_moves=tuple(len(keep) + new - window.positions[row] for new, row in enumerate(stay)),
    )


def sink_rows(settings: BeaconSettings, window: int) -> int:
    """Rows of the sink at the beginning of what a window keeps: the first window alone has any."""
    return 0 if window else settings.sink


def beginning(settings: BeaconSettings, ratios: Sequence[int], number: int) -> Cursor:
    """Where a sequence stood when a window began.

    Args:
        settings: The plan.
        ratios: Of the windows that are closed.
        number: The window's, at most as many as are closed.
    """
    kept = sum(
        len(closing(settings, ratio, sink=sink_rows(settings, window)).keep)
        for window, ratio in enumerate(ratios[:number])
    )
    filled = settings.window - settings.hop if number else 0
    return Cursor(number * settings.hop + filled, kept, filled, number)


def next_step(
    cursor: Cursor, available: int, settings: BeaconSettings, ratio: int, *, last: bool = False
) -> tuple[WindowStep, Cursor]:
    """The next forward pass of a sequence: what is left of the open window, or as much as there is.

    Args:
        cursor: Where the sequence stands.
        available: Raw tokens that wait, at least one.
        settings: The plan.
        ratio: Of the open window; it must stay the same until that is closed.
        last: Nothing will follow, so the window gets no beacons and is not closed, even when it is full (training).

    Returns:
        The step, and where the sequence stands after it.

    Raises:
        ValueError: No token waits.
    """
    if available < 1:
        raise ValueError("a step needs a token")
    ratio = 0 if last else ratio
    window = layout(settings, ratio)
    tokens = min(available, settings.window - cursor.filled)
    filled = cursor.filled + tokens
    closes = filled == settings.window and not last
    closed = closing(settings, ratio, sink=sink_rows(settings, cursor.windows)) if closes else None
    step = WindowStep(
        window, ratio, cursor.memory, window.rows(cursor.filled), window.rows(filled), tokens, closed
    )
    after = replace(cursor, tokens=cursor.tokens + tokens, filled=filled)
    if closed is not None:
        after = Cursor(
            after.tokens, cursor.memory + len(closed.keep), settings.window - settings.hop, cursor.windows + 1
        )
    return step, after


def closings(tokens: int, settings: BeaconSettings) -> int:
    """Windows of a training sequence that are compressed: all but the last, also when that is full."""
    return max(0, -(-(tokens - settings.window) // settings.hop))


def training_steps(
    tokens: int, settings: BeaconSettings, ratio: Callable[[int], int]
) -> Iterator[tuple[WindowStep, Cursor]]:
    """The windows of a training sequence, each with where it begins.

    Args:
        tokens: Of the sequence.
        settings: The plan.
        ratio: Of the window with this number.
    """
    cursor = Cursor()
    compressed = closings(tokens, settings)
    while cursor.tokens < tokens:
        last = cursor.windows == compressed
        of_window = 0 if last else ratio(cursor.windows)
        step, after = next_step(cursor, tokens - cursor.tokens, settings, of_window, last=last)
        yield step, cursor
        cursor = after


def capacity(ratio: int, settings: BeaconSettings, limit: int) -> int:
    """Most raw tokens that windows of this ratio can read within `limit` positions.

    Counted are the sink, the memory, the open window and its own beacons, so that no position ever reaches the limit.
    """
    if ratio == 0:
        return limit
    beacons = settings.hop // ratio
    windows = (limit - settings.window - beacons - settings.sink) // beacons
    return settings.window + windows * settings.hop if windows >= 0 else 0
