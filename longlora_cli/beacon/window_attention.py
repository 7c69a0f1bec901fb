"""Who sees whom in a window, as attention segments: triangles wherever a few of them say it, else a mask.

All see the memory. Raw tokens are causal among themselves, also when beacons that hide stand between them. A beacon
that sees the tokens up to the end of its own unit, and the beacons before it, sees `unit + 1` triangles: the memory
with the beacons, and of all units the first tokens, the second tokens, and so on. Together they are what it sees and
no more; a causal pass over tokens and beacons in turn would compute each token a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlora_cli.beacon.windows import WindowLayout, WindowStep
from longlora_cli.memory.attention_over_keys import Index
from longlora_cli.memory.attention_segments import AttentionSegment, Rows

# Triangles of fewer queries than this fill no tile of a kernel: 1,024 tokens at ratio 64 have 16 beacons.
_MOST_TRIANGLES = 33


class Segment(NamedTuple):
    """A segment of one window.

    Args:
        beacons: Its queries are beacons alone.
        rows: Its queries, counted from the window's first computed row.
        attention: What they see.
    """

    beacons: bool
    rows: Index
    attention: AttentionSegment


class ComputedRows(NamedTuple):
    """Rows of a part of a window, counted from its first; cached, because windows repeat."""

    raw: Index
    beacons: Index
    positions: Index


@lru_cache(maxsize=256)
def computed_rows(window: WindowLayout, first: int, last: int) -> ComputedRows:
    """Which of the rows `first` to `last` are raw tokens and which beacons, and their positions behind the memory."""
    is_beacon = _is_beacon(window)[first:last]
    (raw,), (beacons,) = (~is_beacon).nonzero(), is_beacon.nonzero()
    return ComputedRows(raw, beacons, np.array(window.positions[first:last], np.int64))


@lru_cache(maxsize=64)
def _is_beacon(window: WindowLayout) -> NDArray[np.bool_]:
    return np.array(window.beacon) >= 0


def segments_of(
    step: WindowStep, memory: Sequence[tuple[int, int]], own: Index, device: torch.device
) -> list[Segment]:
    """The segments of the rows that a step computes.

    Args:
        step: The window, and which of its rows are computed.
        memory: Rows of the memory among the keys.
        own: The window's rows up to the last that is computed, among the keys, in their order in the window.
        device: Of a mask.
    """
    layout = step.layout
    rows = computed_rows(layout, step.first, step.last)
    if layout.unit == 0 or not layout.masked:
        whole = AttentionSegment(step.rows, merged(memory, own))
        return [Segment(False, np.arange(step.rows), whole)]
    beacon = _is_beacon(layout)[: step.last]
    raw_keys, beacon_keys = own[~beacon], own[beacon]
    found = [Segment(False, rows.raw, AttentionSegment(step.tokens, merged(memory, raw_keys)))]
    count, unit, units = len(rows.beacons), layout.unit, len(beacon_keys)
    if not count:
        return found
    if layout.attention == "step-expansion" and layout.attend_prev and unit < _MOST_TRIANGLES:
        tokens = raw_keys[: units * unit].reshape(units, unit)
        own_parts = tuple(tokens[:, number] for number in range(unit))
        seen = AttentionSegment(count, merged(memory, beacon_keys), also=own_parts)
    else:
        columns = sum(stop - start for start, stop in memory)
        own_mask = _beacon_mask(layout, step.first, step.last, device)
        mask = torch.cat((own_mask.new_ones(count, columns), own_mask), dim=1)
        seen = AttentionSegment(count, merged(memory, own), mask)
    return [*found, Segment(True, rows.beacons, seen)]


def merged(ranges: Sequence[tuple[int, int]], rows: Index) -> tuple[Rows, ...]:
    """Ranges and rows behind them; what touches is one range, so that nothing need be copied to put it together."""
    last: list[Rows] = [rows]
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
        last = [(int(rows[0]), int(rows[-1]) + 1)]
    found: list[Rows] = []
    for part in (*ranges, *last):
        before = found[-1] if found else None
        if isinstance(part, tuple) and isinstance(before, tuple) and part[0] == before[1]:
            found[-1] = (before[0], part[1])
        else:
            found.append(part)
    return tuple(found)


@lru_cache(maxsize=32)
def _beacon_mask(window: WindowLayout, first: int, last: int, device: torch.device) -> Tensor:
    """What the beacons among the rows `first` to `last` see of the window's rows: bool `[beacons, last]`."""
    raw = torch.tensor(window.raw[:last], device=device)
    beacon = torch.tensor(window.beacon[:last], device=device)
    queries = beacon[first:]
    queries = queries[queries >= 0][:, None]
    k_raw, k_beacon = raw[None, :], beacon[None, :]
    is_raw, is_beacon = k_raw >= 0, k_beacon >= 0
    unit_end = (queries + 1) * window.unit
    if window.attention == "full-coverage":
        tokens = is_raw
    elif window.attention == "step-expansion":
        tokens = is_raw & (k_raw < unit_end)
    else:
        tokens = is_raw & (k_raw < unit_end) & (k_raw >= unit_end - window.unit)
    others = (k_beacon <= queries) if window.attend_prev else (k_beacon == queries)
    return tokens | (is_beacon & others)
