"""`BeaconMemory`: the compressed past behind transformers' cache interface.

Every layer holds, for each sequence, its rows in order: the sink, the beacons, the rows of the open window. Keys are
stored rotated and turned once to their compact positions, when their window closes. Before each forward pass `begin`
says what the pass computes (`Plan`); in it each layer calls `update`, which hands attention the rows it sees and puts
away what stays. Tensors are never changed in place, so a copy of the lists of tensors is a copy of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from longlora_cli.beacon.rotation import Turn


class Rows(NamedTuple):
    """What one layer holds of one sequence; both `[kv_heads, rows, head_dim]`."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """What a forward pass computes of one sequence: one window, or several that follow each other.

    Args:
        sequence: Which.
        start: Its first row among the computed ones.
        stop: One past its last.
        memory: Rows of its memory before the pass.
        windows: For each window of the pass, one past its last row among the held and computed rows.
        turns: For each window that closes, the rows that become memory.
        stay: Rows that stay raw after the last window has closed; None when it does not close.
    """

    sequence: int
    start: int
    stop: int
    memory: int
    windows: tuple[int, ...]
    turns: tuple[Turn, ...]
    stay: Turn | None


Plan = Sequence[Part]


class BeaconMemory(Cache):
    """Keys and values of a batch of sequences, compressed as a plan says.

    Args:
        sequences: How many.
        layers: Of the decoder.
        collect: Put away nothing but what closing windows leave: in `closed` the rows that they keep, in `open` those
            that stay raw (training: a window's memory comes from the windows before it and its own beacons go to
            those after it).
    """

    def __init__(self, sequences: int, layers: int, *, collect: bool = False) -> None:
        super().__init__(layers=[])
        self.rows: list[list[Rows | None]] = [[None] * layers for _ in range(sequences)]
        self.closed: list[list[Rows | None]] = [[None] * layers for _ in range(sequences)]
        self.open: list[list[Rows | None]] = [[None] * layers for _ in range(sequences)]
        self._collect = collect
        self._plan: Plan = ()

    def begin(self, plan: Plan) -> None:
        """Say what the next forward pass computes."""
        self._plan = plan

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
            Keys and values that the pass's attention segments refer to: of each sequence the rows it held, the
            computed ones, and turned copies of what its closed windows keep, as far as a later window sees them.
        """
        seen = [self._update(part, key_states[0], value_states[0], layer_idx) for part in self._plan]
        if len(seen) == 1:
            return seen[0].keys[None], seen[0].values[None]
        return torch.cat([s.keys for s in seen], 1)[None], torch.cat([s.values for s in seen], 1)[None]

    def _update(self, part: Part, keys: Tensor, values: Tensor, layer: int) -> Rows:
        whole = Rows(keys[:, part.start : part.stop], values[:, part.start : part.stop])
        held = self.rows[part.sequence][layer]
        if held is not None:
            whole = join([held, whole])
        kept = [Rows(turn.keys(whole.keys), turn.values(whole.values)) for turn in part.turns]
        if self._collect:
            self.closed[part.sequence][layer] = join(kept) if kept else None
            self.open[part.sequence][layer] = _staying(part, whole)
        else:
            self.rows[part.sequence][layer] = self._stored(part, whole, kept)
        visible = kept[: len(part.windows) - 1]
        return join([whole, *visible]) if visible else whole

    @staticmethod
    def _stored(part: Part, whole: Rows, kept: list[Rows]) -> Rows:
        if not kept:
            return whole
        memory = [Rows(*(t[:, : part.memory] for t in whole))] if part.memory else []
        left = _staying(part, whole)
        if part.stay is None:
            left = Rows(*(t[:, part.windows[-2] :] for t in whole))
        return join([*memory, *kept, *([] if left is None else [left])])

    def length(self, sequence: int = 0) -> int:
        """Rows held of a sequence; of the fewest layers after an interruption."""
        return min(0 if rows is None else rows.keys.shape[1] for rows in self.rows[sequence])

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values held."""
        held = [rows for sequence in self.rows for rows in sequence if rows is not None]
        return sum(t.numel() * t.element_size() for rows in held for t in rows)

    def copy(self) -> BeaconMemory:
        """The same memory, from where it can go another way; tensors are shared, none is copied."""
        twin = BeaconMemory(len(self.rows), len(self.rows[0]), collect=self._collect)
        twin.rows = [list(sequence) for sequence in self.rows]
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


def _staying(part: Part, whole: Rows) -> Rows | None:
    """The rows that stay raw after the last window has closed, if there are any."""
    if part.stay is None or not len(part.stay.rows):
        return None
    return Rows(part.stay.keys(whole.keys), part.stay.values(whole.values))


def join(parts: Sequence[Rows]) -> Rows:
    """Rows behind each other."""
    if len(parts) == 1:
        return parts[0]
    return Rows(torch.cat([p.keys for p in parts], 1), torch.cat([p.values for p in parts], 1))
