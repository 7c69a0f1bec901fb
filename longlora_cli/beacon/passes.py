"""One forward pass over windows: from plain integers to what the decoder, its cache and its attention need.

A pass computes one window or several windows of one sequence or several sequences. All their rows are packed behind
each other in a batch of one: no row is padding, and sequences of any lengths stand at different points of their
windows. Windows of one sequence can share a pass because a layer needs only that layer's beacons of the window before
it, never their final hidden states: every layer computes all of its windows before the next layer begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longlora_cli.beacon.cache import BeaconMemory, Part
from longlora_cli.beacon.projections import BeaconProjections
from longlora_cli.beacon.rotation import Turn, turn
from longlora_cli.beacon.windows import Closing, WindowLayout, WindowStep
from longlora_cli.memory.attention_segments import AttentionSegment, AttentionSegments


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward pass computes, on the model's device.

    Args:
        parts: For the cache: the sequences.
        segments: For attention.
        positions: int64 `[rows]`.
        beacons: int64: the rows that are beacons.
        raw: int64: the rows that are raw tokens, in order.
        raw_counts: Raw tokens of each part.
    """

    parts: tuple[Part, ...]
    segments: AttentionSegments
    positions: Tensor
    beacons: Tensor
    raw: Tensor
    raw_counts: tuple[int, ...]


def plan_pass(
    steps: Sequence[tuple[int, Sequence[WindowStep]]], inv_freq: Tensor, dtype: torch.dtype
) -> Pass:
    """Plan one forward pass.

    Args:
        steps: For each sequence that takes part its number and its windows, all but the last of which close.
        inv_freq: The decoder's frequencies, on its device.
        dtype: Of keys and values.
    """
    parts: list[Part] = []
    segments: list[AttentionSegment] = []
    rows = _PassRows([], [], [])
    start = offset = 0  # of the part: among the computed rows, and in the keys that attention gets
    for sequence, windows in steps:
        stop = start
        for step in windows:
            rows.add(step, stop, inv_freq.device)
            stop += step.rows
        part = _part(sequence, windows, start, stop, inv_freq, dtype)
        segments += _segments(windows, part, offset, inv_freq.device)
        offset += part.windows[-1] + sum(len(t.rows) for t in part.turns[: len(windows) - 1])
        start = stop
        parts.append(part)
    counts = tuple(sum(step.tokens for step in windows) for _, windows in steps)
    grouped = AttentionSegments(segments, inv_freq.device)
    positions, beacons, raw = (torch.cat(pieces) for pieces in rows)
    return Pass(tuple(parts), grouped, positions, beacons, raw, counts)


class _PassRows(NamedTuple):
    """Pieces of a pass's positions, beacon rows and raw rows."""

    positions: list[Tensor]
    beacons: list[Tensor]
    raw: list[Tensor]

    def add(self, step: WindowStep, first: int, device: torch.device) -> None:
        """Add a window whose first computed row is `first`."""
        positions, beacons, raw = _step_rows(step.layout, step.first, step.last, device)
        self.positions.append(positions + step.memory)
        self.beacons.append(beacons + first)
        self.raw.append(raw + first)


@lru_cache(maxsize=256)
def _step_rows(
    window: WindowLayout, first: int, last: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions behind the memory, and which rows are beacons and which raw, of a part of a window.

    Kept, because windows repeat: 1,152 rows as a Python list take longer than a layer.
    """
    is_beacon = [number >= 0 for number in window.beacon[first:last]]
    beacons = [row for row, beacon in enumerate(is_beacon) if beacon]
    raw = [row for row, beacon in enumerate(is_beacon) if not beacon]
    positions, beacon_rows, raw_rows = (
        torch.tensor(values, dtype=torch.int64, device=device)
        for values in (window.positions[first:last], beacons, raw)
    )
    return positions, beacon_rows, raw_rows


def _part(
    sequence: int, windows: Sequence[WindowStep], start: int, stop: int, inv_freq: Tensor, dtype: torch.dtype
) -> Part:
    turns: list[Turn] = []
    ends: list[int] = []
    stay = None
    memory = first_row = windows[0].memory
    for step in windows:
        ends.append(first_row + step.last)
        stay = None
        if step.closing is not None:
            keep, left = _turns(step.closing, inv_freq, dtype)
            turns.append(keep.shifted(first_row))
            stay = left.shifted(first_row)
        first_row = ends[-1]
    return Part(sequence, start, stop, memory, tuple(ends), tuple(turns), stay)


@lru_cache(maxsize=64)
def _turns(closing: Closing, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Turn, Turn]:
    """Turns of the rows that a closing window keeps, and of those that stay raw, counted within the window."""
    return (
        turn(closing.keep, closing.keep_moves, inv_freq, dtype),
        turn(closing.stay, closing.stay_moves, inv_freq, dtype),
    )


def _segments(
    windows: Sequence[WindowStep], part: Part, offset: int, device: torch.device
) -> list[AttentionSegment]:
    found: list[AttentionSegment] = []
    kept_start = offset + part.windows[-1]
    kept = 0
    for number, step in enumerate(windows):
        first_row = offset + (part.memory if number == 0 else part.windows[number - 1])
        memory = [(offset, offset + part.memory)] if part.memory else []
        memory += [(kept_start, kept_start + kept)] if kept else []
        found += _of_window(step, memory, (first_row, offset + part.windows[number]), device)
        if number < len(part.turns):
            kept += len(part.turns[number].rows)
    return found


def _of_window(
    step: WindowStep, memory: list[tuple[int, int]], own: tuple[int, int], device: torch.device
) -> list[AttentionSegment]:
    """A window's queries over the memory and its own rows; raw rows before appended beacons need no mask."""
    if step.layout.unit == 0 or not step.layout.masked:
        return [AttentionSegment(step.rows, _merged([*memory, own]))]
    found = []
    first = step.first
    if step.layout.appended:
        raw = step.tokens
        found.append(AttentionSegment(raw, _merged([*memory, (own[0], own[0] + first + raw)])))
        first += raw
        if first == step.last:
            return found
    columns = sum(stop - start for start, stop in memory)
    mask = torch.cat(
        (
            torch.ones(step.last - first, columns, dtype=torch.bool, device=device),
            _window_mask(step.layout, first, step.last, device),
        ),
        dim=1,
    )
    return [*found, AttentionSegment(step.last - first, _merged([*memory, own]), mask)]


def _merged(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges that touch as one, so that nothing need be copied to put them together."""
    found = [ranges[0]]
    for start, stop in ranges[1:]:
        if start == found[-1][1]:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


@lru_cache(maxsize=32)
def _window_mask(window: WindowLayout, first: int, last: int, device: torch.device) -> Tensor:
    """Who sees whom within a window whose beacons hide: bool `[last - first, last]`."""
    raw = torch.tensor(window.raw[:last], device=device)
    beacon = torch.tensor(window.beacon[:last], device=device)
    q_raw, q_beacon = raw[first:, None], beacon[first:, None]
    k_raw, k_beacon = raw[None, :], beacon[None, :]
    is_raw, is_beacon = k_raw >= 0, k_beacon >= 0
    unit_end = (q_beacon + 1) * window.unit
    if window.attention == "full-coverage":
        own = is_raw
    elif window.attention == "step-expansion":
        own = is_raw & (k_raw < unit_end)
    else:
        own = is_raw & (k_raw < unit_end) & (k_raw >= unit_end - window.unit)
    others = (k_beacon <= q_beacon) if window.attend_prev else (k_beacon == q_beacon)
    return torch.where(q_raw >= 0, is_raw & (k_raw <= q_raw), own | (is_beacon & others))


def run_pass(
    decoder: Any, projections: BeaconProjections | None, memory: BeaconMemory, ids: Tensor, plan: Pass
) -> Tensor:
    """Run one forward pass.

    Args:
        decoder: The model without its head.
        projections: Its beacons; None when the pass has none.
        memory: Holds what was before; gets what stays.
        ids: Raw tokens of all parts, int64 `[raw rows]`.
        plan: From `plan_pass`.

    Returns:
        Last hidden states of the raw rows, `[raw rows, width]`.
    """
    embedded = decoder.get_input_embeddings()(ids)
    memory.begin(plan.parts)
    call: dict[str, Any] = {
        "position_ids": plan.positions[None],
        "past_key_values": memory,
        "use_cache": True,
        "segments": plan.segments,
    }
    if projections is None or not plan.beacons.numel():
        return decoder(inputs_embeds=embedded[None], **call)[0][0]  # type: ignore[no-any-return]
    beacon = projections.beacon_embedding.to(embedded.dtype)
    inputs = beacon.expand(len(plan.positions), -1).index_copy(0, plan.raw, embedded)
    projections.bind()
    with projections.route(plan.beacons):
        hidden: Tensor = decoder(inputs_embeds=inputs[None], **call)[0][0]
    return hidden.index_select(0, plan.raw)
