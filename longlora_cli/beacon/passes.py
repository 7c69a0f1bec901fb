"""One forward pass over windows: from plain integers to what the decoder, its cache and its attention need.

A pass computes one window or several windows of one sequence or several sequences. All their rows are packed behind
each other in a batch of one, raw tokens first, beacons behind them: no row is padding, and sequences of any lengths
stand at different points of their windows. Windows of one sequence can share a pass because a layer needs only that
layer's beacons of the window before it, never their final hidden states: every layer computes all of its windows before
the next layer begins. Row numbers are made here once, on the CPU, and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longlora_cli.beacon.cache import BeaconMemory, Moves
from longlora_cli.beacon.layerwise import recomputed_layers
from longlora_cli.beacon.projections import BeaconProjections
from longlora_cli.beacon.rotation import PackedTurn, packed_turn
from longlora_cli.beacon.window_attention import Segment, computed_rows, segments_of
from longlora_cli.beacon.windows import Closing, WindowStep
from longlora_cli.memory.attention_over_keys import Index, on_device
from longlora_cli.memory.attention_segments import AttentionSegments

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward pass computes, on the model's device.

    Args:
        moves: For the cache.
        segments: For attention.
        positions: int64 `[rows]`, raw tokens first.
        raw_counts: Raw tokens of each sequence that takes part.
        kept_counts: Rows that closing windows keep, of each sequence that takes part.
        stay_counts: Rows that stay raw after the last window has closed, likewise.
    """

    moves: Moves
    segments: AttentionSegments
    positions: Tensor
    raw_counts: tuple[int, ...]
    kept_counts: tuple[int, ...]
    stay_counts: tuple[int, ...]

    @property
    def raw(self) -> int:
        """Raw tokens; the rows behind them are beacons."""
        return sum(self.raw_counts)


class _Window(NamedTuple):
    """One window of a pass, and its computed rows in order, counted among those of the pass."""

    step: WindowStep
    rows: Index


class _Part(NamedTuple):
    """One sequence of a pass: its windows, and where the rows of its memory and of its open window are held."""

    sequence: int
    windows: list[_Window]
    memory: list[Span]
    open: list[Span]

    def own(self, number: int, first_computed: int) -> Index:
        """All rows of one window up to the last that is computed, in order."""
        window = self.windows[number]
        computed = window.rows + first_computed
        return np.concatenate((_expanded(self.open), computed)) if number == 0 else computed


class _Turned(NamedTuple):
    """The rows that are turned: those that windows keep, part by part, then those that stay raw, part by part."""

    turn: PackedTurn | None
    computed_alone: bool
    kept_counts: tuple[int, ...]
    stay_counts: tuple[int, ...]

    def kept(self, part: int) -> Span:
        """Where those are that the windows of a part keep."""
        first = sum(self.kept_counts[:part])
        return first, first + self.kept_counts[part]

    def stay(self, part: int) -> Span:
        """Where those of a part are that stay raw."""
        first = sum(self.kept_counts) + sum(self.stay_counts[:part])
        return first, first + self.stay_counts[part]


def plan_pass(
    steps: Sequence[tuple[int, Sequence[WindowStep]]],
    held: Sequence[Sequence[Span]],
    inv_freq: Tensor,
    dtype: torch.dtype,
    *,
    collect: bool = False,
) -> Pass:
    """Plan one forward pass.

    Args:
        steps: For each sequence that takes part its number and its windows, all but the last of which close.
        held: Of every sequence the rows that are held: its memory, then its open window.
        inv_freq: The decoder's frequencies, on its device.
        dtype: Of keys and values.
        collect: The memory puts away what windows leave alone, as `BeaconMemory` says.
    """
    device = inv_freq.device
    first_computed = max((stop for spans in held for _, stop in spans), default=0)
    parts, positions = _parts(steps, held)
    turned = _turned(parts, first_computed, inv_freq, dtype)
    first_turned = first_computed + len(positions)
    store, lengths = np.empty(0, np.int64), [0] * len(held)
    if not collect:
        store, lengths = _stored(parts, turned, held, first_computed, first_turned)
    # Where no window closes, each sequence's rows lie behind each other afterwards, as kernels want them.
    gathered = not collect and turned.turn is None
    keys = [_keys(part, lengths, gathered, first_computed) for part in parts]
    segments, order = _segments(parts, keys, turned, first_turned, device)
    untouched = gathered and bool((store == np.arange(first_turned)).all())
    moves = Moves(
        turn=turned.turn,
        computed_alone=turned.computed_alone,
        kept=sum(turned.kept_counts),
        seen_turned=any(len(part.windows) > 1 for part in parts),
        store=None if collect or untouched else on_device(store, device),
        lengths=tuple(lengths),
        seen_stored=gathered,
    )
    counts = tuple(sum(window.step.tokens for window in part.windows) for part in parts)
    grouped = AttentionSegments([segment.attention for segment in segments], device, order)
    placed = on_device(positions, device)
    return Pass(moves, grouped, placed, counts, turned.kept_counts, turned.stay_counts)


def _parts(
    steps: Sequence[tuple[int, Sequence[WindowStep]]], held: Sequence[Sequence[Span]]
) -> tuple[list[_Part], Index]:
    """The sequences of a pass, and the position of each computed row."""
    raw_rows = sum(step.tokens for _, windows in steps for step in windows)
    raw, beacons = 0, raw_rows  # the next of each
    total = sum(step.rows for _, windows in steps for step in windows)
    positions = np.empty(total, np.int64)
    parts = []
    for sequence, windows in steps:
        placed = []
        for step in windows:
            own = computed_rows(step.layout, step.first, step.last)
            rows = np.empty(step.rows, np.int64)
            rows[own.raw] = np.arange(raw, raw + len(own.raw))
            rows[own.beacons] = np.arange(beacons, beacons + len(own.beacons))
            raw, beacons = raw + len(own.raw), beacons + len(own.beacons)
            positions[rows] = own.positions + step.memory
            placed.append(_Window(step, rows))
        memory, behind = _divided(held[sequence], windows[0].memory)
        parts.append(_Part(sequence, placed, memory, behind))
    return parts, positions


def _divided(spans: Sequence[Span], rows: int) -> tuple[list[Span], list[Span]]:
    """The first so many rows of ranges, and the rest."""
    first: list[Span] = []
    rest: list[Span] = []
    for start, stop in spans:
        middle = min(stop, start + rows)
        rows -= middle - start
        first += [(start, middle)] if middle > start else []
        rest += [(middle, stop)] if stop > middle else []
    return first, rest


def _expanded(spans: Sequence[Span]) -> Index:
    return np.concatenate([np.empty(0, np.int64), *(np.arange(*span) for span in spans)])


def _turned(parts: Sequence[_Part], first_computed: int, inv_freq: Tensor, dtype: torch.dtype) -> _Turned:
    kept: list[tuple[Index, Tensor | None]] = []
    stays: list[tuple[Index, Tensor | None]] = []
    kept_counts, stay_counts, alone = [], [], True
    for part in parts:
        before = len(kept)
        stay_counts.append(0)
        for number, window in enumerate(part.windows):
            closing = window.step.closing
            if closing is None:
                continue
            alone = alone and window.step.first == 0
            own = part.own(number, first_computed)
            keep, stay, keep_turn, stay_turn = _closing_rows(closing, inv_freq, dtype)
            kept.append((own[keep], keep_turn))
            if window is part.windows[-1] and len(stay):
                stays.append((own[stay], stay_turn))
                stay_counts[-1] = len(stay)
        kept_counts.append(sum(len(rows) for rows, _ in kept[before:]))
    groups = kept + stays
    turn = None
    if groups:
        rows = np.concatenate([rows for rows, _ in groups]) - (first_computed if alone else 0)
        tables = [(len(rows), table) for rows, table in groups]
        turn = PackedTurn.of(on_device(rows, inv_freq.device), tables)
    return _Turned(turn, alone, tuple(kept_counts), tuple(stay_counts))


@lru_cache(maxsize=64)
def _closing_rows(
    closing: Closing, inv_freq: Tensor, dtype: torch.dtype
) -> tuple[Index, Index, Tensor | None, Tensor | None]:
    """Rows that a closing window keeps, those that stay raw, counted within the window, and the turns of both."""
    keep, stay = (np.array(rows, np.int64) for rows in (closing.keep, closing.stay))
    turns = (packed_turn(moves, inv_freq, dtype) for moves in (closing.keep_moves, closing.stay_moves))
    return (keep, stay, *turns)  # type: ignore[return-value]


def _stored(
    parts: Sequence[_Part],
    turned: _Turned,
    held: Sequence[Sequence[Span]],
    first_computed: int,
    first_turned: int,
) -> tuple[Index, list[int]]:
    """The rows that are held after the pass, and how many of each sequence."""
    numbers = {part.sequence: number for number, part in enumerate(parts)}
    pieces = []
    for sequence, spans in enumerate(held):
        number = numbers.get(sequence)
        if number is None:
            pieces.append(_expanded(spans))
            continue
        part = parts[number]
        last = len(part.windows) - 1
        kept, stay = turned.kept(number), turned.stay(number)
        rows = [_expanded(part.memory), np.arange(*kept) + first_turned]
        closes = part.windows[last].step.closing is not None
        rows.append(np.arange(*stay) + first_turned if closes else part.own(last, first_computed))
        pieces.append(np.concatenate(rows))
    return np.concatenate(pieces), [len(rows) for rows in pieces]


class _Keys(NamedTuple):
    """Where attention finds a part's memory and each window's own rows."""

    memory: list[Span]
    own: list[Index]


def _keys(part: _Part, lengths: Sequence[int], gathered: bool, first_computed: int) -> _Keys:
    if not gathered:
        return _Keys(part.memory, [part.own(n, first_computed) for n in range(len(part.windows))])
    start = sum(lengths[: part.sequence])
    memory = part.windows[0].step.memory
    own = np.arange(start + memory, start + lengths[part.sequence])
    return _Keys([(start, start + memory)] if memory else [], [own])


def _segments(
    parts: Sequence[_Part], keys: Sequence[_Keys], turned: _Turned, first_turned: int, device: torch.device
) -> tuple[list[Segment], Index]:
    """The segments of all windows, those of raw tokens before those of beacons, and the rows of their queries."""
    found: list[tuple[Segment, Index]] = []
    for number, (part, where) in enumerate(zip(parts, keys, strict=True)):
        first_kept = last_kept = first_turned + turned.kept(number)[0]
        for window, own in zip(part.windows, where.own, strict=True):
            earlier = [(first_kept, last_kept)] if last_kept > first_kept else []
            for segment in segments_of(window.step, [*where.memory, *earlier], own, device):
                found.append((segment, window.rows[segment.rows]))
            if window.step.closing is not None:
                last_kept += len(window.step.closing.keep)
    found.sort(key=lambda pair: pair[0].beacons)
    return [segment for segment, _ in found], np.concatenate([rows for _, rows in found])


def run_pass(
    decoder: Any,
    projections: BeaconProjections | None,
    memory: BeaconMemory,
    ids: Tensor,
    plan: Pass,
    *,
    recompute_layers: bool = False,
) -> Tensor:
    """Run one forward pass.

    Args:
        decoder: The model without its head.
        projections: Its beacons; None when the pass has none.
        memory: Holds what was before; gets what stays.
        ids: Raw tokens of all parts, int64 `[raw rows]`.
        plan: From `plan_pass`.
        recompute_layers: Checkpoint every layer; the memory then gets nothing, because no pass follows.

    Returns:
        Last hidden states of the raw rows, `[raw rows, width]`.
    """
    embedded = decoder.get_input_embeddings()(ids)
    memory.begin(plan.moves)
    call: dict[str, Any] = {
        "position_ids": plan.positions[None],
        "past_key_values": memory,
        "use_cache": True,
        "segments": plan.segments,
    }
    beacons = len(plan.positions) - plan.raw
    if projections is None:
        return decoder(inputs_embeds=embedded[None], **call)[0][0]  # type: ignore[no-any-return]
    inputs = embedded
    if beacons:
        beacon = projections.beacon_embedding.to(embedded.dtype)
        inputs = torch.cat((embedded, beacon.expand(beacons, -1)))
    if beacons or torch.is_autocast_enabled(ids.device.type):
        projections.bind()
    raw = plan.raw if beacons else None
    layers = recomputed_layers(decoder, projections, memory, raw) if recompute_layers else nullcontext()
    with projections.route(raw), layers:
        hidden: Tensor = decoder(inputs_embeds=inputs[None], **call)[0][0]
    return hidden[: plan.raw] if beacons else hidden
