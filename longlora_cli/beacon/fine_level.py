"""The finer level of closed windows: run once more at a finer ratio, kept on the CPU, put in place of coarse rows.

A window is run a second time behind the same memory as the first time, at a finer ratio or, at 0, without beacons. Its
kept rows stay at the positions at which they were computed until they are used, so that a key is turned once, from
there to its place in the memory that a question gets. Nothing of the coarse memory depends on the fine level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longlora_cli.beacon.cache import BeaconMemory, Rows, join, unpacked
from longlora_cli.beacon.passes import plan_pass, run_pass
from longlora_cli.beacon.projections import BeaconProjections
from longlora_cli.beacon.rotation import turn
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.swap_plan import Piece
from longlora_cli.beacon.windows import Cursor, next_step, sink_rows

LayerRows = list[Rows | None]


@dataclass(frozen=True, eq=False)
class FineWindow:
    """The fine rows of one window, on the CPU.

    Args:
        layers: For each layer keys and values `[kv_heads, rows, head_dim]`; the sink's rows are left out.
        positions: The position at which each row was computed.
    """

    layers: tuple[Rows, ...]
    positions: tuple[int, ...]

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.numel() * t.element_size() for rows in self.layers for t in rows)


@dataclass(frozen=True, eq=False)
class FineRunner:
    """Runs windows at the fine level.

    Args:
        decoder: The model without its head.
        projections: Its beacons; None is enough for ratio 0.
        inv_freq: The decoder's frequencies, on its device.
        dtype: Of keys and values.
        settings: The plan of the coarse level.
        ratio: Of the fine level.
    """

    decoder: Any
    projections: BeaconProjections | None
    inv_freq: Tensor
    dtype: torch.dtype
    settings: BeaconSettings
    ratio: int

    @torch.no_grad()
    def run(self, before: LayerRows, cursor: Cursor, ids: Sequence[int]) -> FineWindow:
        """Run a whole window at the fine ratio.

        Args:
            before: What each layer held when the window began: the memory, and the raw rows that stayed from the
                window before (stride below the window).
            cursor: Where the sequence stood then.
            ids: The window's raw tokens from there to its end.
        """
        step, _ = next_step(cursor, len(ids), self.settings, self.ratio)
        if step.closing is None:
            raise ValueError(f"{len(ids)} tokens do not fill the window")
        unmoved = replace(step.closing, keep_moves=(0,) * len(step.closing.keep))
        memory = BeaconMemory.of([before], collect=True)
        steps = [(0, [replace(step, closing=unmoved)])]
        plan = plan_pass(steps, memory.spans, self.inv_freq, self.dtype, collect=True)
        tokens = torch.tensor(list(ids), dtype=torch.int64, device=self.inv_freq.device)
        run_pass(self.decoder, self.projections, memory, tokens, plan)
        sink = sink_rows(self.settings, cursor.windows)
        layers = tuple(
            Rows(*(t[:, sink:].to("cpu").contiguous() for t in unpacked(rows))) for rows in memory.closed
        )
        positions = tuple(cursor.memory + step.layout.positions[row] for row in step.closing.keep[sink:])
        return FineWindow(layers, positions)


def first_rows(held: LayerRows, rows: int) -> LayerRows:
    """The first rows of every layer, as views."""
    return [None if r is None or not rows else Rows(r.keys[:, :rows], r.values[:, :rows]) for r in held]


@dataclass(frozen=True, eq=False)
class Swap:
    """How the rows of a memory with fine rows in it come from the rows held and from fine windows.

    Args:
        pieces: From `swap_plan`; coarse rows are counted from behind the sink.
        memory: Rows of the coarse memory, sink included; the rows of the open window follow.
        held: All rows held.
        sink: Rows of the sink.
    """

    pieces: Sequence[Piece]
    memory: int
    held: int
    sink: int

    @property
    def new_memory(self) -> int:
        """Rows of the memory afterwards."""
        return self.sink + sum(piece.end - piece.first for piece in self.pieces)

    def rows(self, windows: dict[int, FineWindow]) -> tuple[list[int], list[int]]:
        """Rows of the store that `apply` makes of one layer, and the positions they stand at, in their new order."""
        index, positions = list(range(self.sink)), list(range(self.sink))
        behind = self.held
        for piece in self.pieces:
            rows = range(piece.first, piece.end)
            if piece.window is None:
                index += [self.sink + row for row in rows]
                positions += [self.sink + row for row in rows]
            else:
                index += range(behind, behind + len(rows))
                positions += [windows[piece.window].positions[row] for row in rows]
                behind += len(rows)
        return index, positions

    @torch.no_grad()
    def apply(
        self, held: LayerRows, windows: dict[int, FineWindow], inv_freq: Tensor, dtype: torch.dtype
    ) -> LayerRows:
        """The rows of each layer with the fine ones in place; every key that moves is turned once.

        Args:
            held: Of each layer the memory and the open window.
            windows: The fine windows by number; those that pieces name.
            inv_freq: The decoder's frequencies, on its device.
            dtype: Of keys and values.
        """
        index, positions = self.rows(windows)
        moves = [new - old for new, old in enumerate(positions)]
        index += range(self.memory, self.held)
        moves += [self.new_memory - self.memory] * (self.held - self.memory)
        turned = turn(index, moves, inv_freq, dtype)
        found: LayerRows = []
        for layer, own in enumerate(held):
            if own is None:
                raise ValueError("there is no memory to put fine rows in")
            fine = [
                Rows(*(t[:, piece.first : piece.end] for t in windows[piece.window].layers[layer]))
                for piece in self.pieces
                if piece.window is not None
            ]
            store = join([own, *(Rows(*(t.to(own.keys.device) for t in rows)) for rows in fine)])
            found.append(Rows(turned.keys(store.keys), turned.values(store.values)))
        return found
