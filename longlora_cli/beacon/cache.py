"""`BeaconMemory`: the compressed past behind transformers' cache interface.

Every layer holds the rows of all sequences behind each other in one tensor: of each sequence the sink, the beacons, the
rows of the open window. Keys are stored rotated and turned once to their compact positions, when their window closes.
Before each forward pass `begin` says what becomes of the rows (`Moves`), as row numbers that all layers share; in it
each layer calls `update`, which hands attention the rows it sees and puts away what stays: a few operations, however
many sequences and windows there are. Tensors are never changed in place, so a copy of the list is a copy of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from longlora_cli.beacon.rotation import PackedTurn


class Rows(NamedTuple):
    """What one layer holds of one sequence; both `[kv_heads, rows, head_dim]`."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Moves:
    """What a forward pass makes of a layer's rows.

    Rows are counted in one sequence: those held before the pass, those it computes, those that were turned.

    Args:
        turn: The rows that closing windows keep, then those that stay raw after them, and how they turn; None when
            no window closes.
        computed_alone: All of them are computed in this pass, and are counted from the first computed one.
        kept: How many of them are kept.
        seen_turned: Attention sees some of them.
        store: int64: the rows held after the pass, all sequences'; None: all of them in order.
        lengths: Rows of each sequence after the pass.
        seen_stored: Attention's rows are counted among those held after the pass.
    """

    turn: PackedTurn | None
    computed_alone: bool
    kept: int
    seen_turned: bool
    store: Tensor | None
    lengths: tuple[int, ...]
    seen_stored: bool


class BeaconMemory(Cache):
    """Keys and values of a batch of sequences, compressed as a plan says.

    Args:
        sequences: How many.
        layers: Of the decoder.
        collect: Put away nothing but what closing windows leave: in `closed` the rows that they keep, in `open` those
            that stay raw (training: a window's memory comes from the windows before it and its own beacons go to
            those after it).

    Attributes:
        held: Of each layer keys and values `[rows, 2, kv_heads, head_dim]`, or None.
        lengths: Rows of each sequence.
        closed: With `collect`, of each layer as `held`.
        open: As `closed`; empty when nothing stays raw.
    """

    def __init__(self, sequences: int, layers: int, *, collect: bool = False) -> None:
        super().__init__(layers=[])
        self.held: list[Tensor | None] = [None] * layers
        self.lengths: tuple[int, ...] = (0,) * sequences
        self.closed: list[Tensor] = []
        self.open: list[Tensor] = []
        self._collect = collect
        self._moves: Moves | None = None

    @classmethod
    def of(cls, rows: Sequence[Sequence[Rows | None]], *, collect: bool = False) -> BeaconMemory:
        """A memory that holds these rows, of each sequence those of every layer."""
        memory = cls(len(rows), len(rows[0]), collect=collect)
        memory.lengths = tuple(0 if own[0] is None else own[0].keys.shape[1] for own in rows)
        for layer in range(len(rows[0])):
            held = [packed(*own) for own in (sequence[layer] for sequence in rows) if own is not None]
            memory.held[layer] = torch.cat(held) if held else None
        return memory

    @property
    def spans(self) -> list[list[tuple[int, int]]]:
        """Where each sequence's rows are: one range each."""
        found, start = [], 0
        for length in self.lengths:
            found.append([(start, start + length)])
            start += length
        return found

    @property
    def rows(self) -> list[list[Rows | None]]:
        """Of each sequence the rows of every layer, as views."""
        return [
            [None if held is None or stop == start else unpacked(held[start:stop]) for held in self.held]
            for ((start, stop),) in self.spans
        ]

    def begin(self, moves: Moves) -> None:
        """Say what the next forward pass makes of the rows."""
        self._moves = moves
        self.closed, self.open = [], []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new rows; see transformers' `Cache.update`.

        Args:
            key_states: `[1, kv_heads, computed rows, head_dim]`, rotated.
            value_states: As `key_states`, not rotated.
            layer_idx: The layer.
            args: Nothing.
            kwargs: Nothing.

        Returns:
            Keys and values that the pass's attention segments refer to; see `Moves`.
        """
        moves = self._moves
        if moves is None:
            raise ValueError("a memory takes rows after `begin` has said what becomes of them")
        computed = packed(key_states[0], value_states[0])
        held, turned = self.held[layer_idx], None
        rows = [computed] if held is None else [held, computed]
        if moves.turn is not None:
            turned = moves.turn.rows_of(computed if moves.computed_alone else _joined(rows))
        if turned is not None and (moves.seen_turned or not self._collect):
            rows.append(turned)
        seen = _joined(rows)
        if self._collect:
            if turned is not None:
                kept = turned if moves.kept == len(turned) else turned[: moves.kept]
                self.closed.append(kept)
                self.open += [] if kept is turned else [turned[moves.kept :]]
        else:
            stored = seen if moves.store is None else seen.index_select(0, moves.store)
            self.held[layer_idx] = stored
            seen = stored if moves.seen_stored else seen
            self.lengths = moves.lengths
        keys, values = unpacked(seen)
        return keys[None], values[None]

    def alone(self, layer: int) -> BeaconMemory:
        """What one layer needs to run a pass by itself, once more, without a trace on this memory."""
        twin = BeaconMemory(len(self.lengths), len(self.held), collect=True)
        twin.held[layer] = self.held[layer]
        twin._moves = self._moves
        return twin

    def length(self, sequence: int = 0) -> int:
        """Rows held of a sequence."""
        return self.lengths[sequence]

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values held."""
        return sum(held.numel() * held.element_size() for held in self.held if held is not None)

    def copy(self) -> BeaconMemory:
        """The same memory, from where it can go another way; tensors are shared, none is copied."""
        twin = BeaconMemory(len(self.lengths), len(self.held), collect=self._collect)
        twin.held, twin.lengths = list(self.held), self.lengths
        return twin

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows held of the first sequence."""
        return self.length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a mask; transformers asks, our attention uses none."""
        return self.length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1


def packed(keys: Tensor, values: Tensor) -> Tensor:
    """`[kv_heads, rows, head_dim]` of each -> `[rows, 2, kv_heads, head_dim]`: a row lies in one piece."""
    return torch.stack((keys.transpose(0, 1), values.transpose(0, 1)), 1)


def unpacked(rows: Tensor) -> Rows:
    """The reverse of `packed`, as views."""
    keys, values = rows.unbind(1)
    return Rows(keys.transpose(0, 1), values.transpose(0, 1))


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def join(parts: Sequence[Rows]) -> Rows:
    """Rows behind each other."""
    if len(parts) == 1:
        return parts[0]
    return Rows(torch.cat([p.keys for p in parts], 1), torch.cat([p.values for p in parts], 1))
