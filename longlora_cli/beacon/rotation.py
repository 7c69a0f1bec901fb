"""Turning a stored key from the position it was computed at to another one.

Rotary embedding multiplies each pair of a key by a rotation of `position * frequency` (Su et al. 2021,
arXiv:2104.09864), and rotations add: turning a rotated key by `(new - old) * frequency` gives the key of the new
position, for any frequencies that do not depend on the length. So keys are stored rotated, as attention needs them,
and turned once, when their window closes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longlora_cli.errors import IncompatibleError


@dataclass(frozen=True, eq=False)
class Turn:
    """Rows of a store, and the rotation of each.

    Args:
        rows: int64 `[rows]`.
        cos: `[rows, head_dim]` in float32 (float64 for float64 keys); None when no row moves.
        sin: As `cos`, negative in the first half of a head.
    """

    rows: Tensor
    cos: Tensor | None
    sin: Tensor | None

    def keys(self, held: Tensor) -> Tensor:
        """Keys `[kv_heads, held rows, head_dim]` -> the turned rows `[kv_heads, rows, head_dim]`."""
        taken = held.index_select(1, self.rows)
        if self.cos is None or self.sin is None:
            return taken
        return _rotated(taken, self.cos, self.sin)

    def values(self, held: Tensor) -> Tensor:
        """Values `[kv_heads, held rows, head_dim]` -> the same rows, unchanged."""
        return held.index_select(1, self.rows)


@dataclass(frozen=True, eq=False)
class PackedTurn:
    """Rows of a packed store `[rows, 2, kv_heads, head_dim]`, keys and values, and the rotation of their keys.

    Args:
        rows: int64 `[rows]`.
        cos: `[rows, 2, 1, head_dim]` in float32 (float64 for float64 keys), 1 for values; None when no row moves.
        sin: As `cos`, 0 for values: a value comes out as it was, and keys and values are turned by the same few
            operations.
    """

    rows: Tensor
    cos: Tensor | None
    sin: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, turns: Sequence[tuple[int, Tensor | None]]) -> PackedTurn:
        """The turn of several groups of rows.

        Args:
            rows: Of the store.
            turns: Rows of each group, and its rotation from `packed_turn`.
        """
        tables = [table for _, table in turns if table is not None]
        if not tables:
            return cls(rows, None, None)
        still = torch.zeros_like(tables[0][:, :1])
        still[0] = 1
        cos, sin = torch.cat(
            [still.expand(-1, count, -1, -1, -1) if table is None else table for count, table in turns], 1
        ).unbind(0)
        return cls(rows, cos, sin)

    def rows_of(self, store: Tensor) -> Tensor:
        """The turned rows `[rows, 2, kv_heads, head_dim]` of a store."""
        taken = store.index_select(0, self.rows)
        if self.cos is None or self.sin is None:
            return taken
        return _rotated(taken, self.cos, self.sin)


def packed_turn(moves: Sequence[int], inv_freq: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Cosines and sines `[2, rows, 2, 1, head_dim]` of a group of rows for `PackedTurn`; None when no row moves.

    Args:
        moves: For each row, its new position less its old one.
        inv_freq: From `frequencies`.
        dtype: Of the keys.
    """
    plain = turn(range(len(moves)), moves, inv_freq, dtype)
    if plain.cos is None or plain.sin is None:
        return None
    keys = torch.stack((plain.cos, plain.sin))
    values = torch.zeros_like(keys)
    values[0] = 1
    return torch.stack((keys, values), 2)[:, :, :, None]


def frequencies(decoder: Any, head_dim: int) -> Tensor:
    """The live rotary frequencies of a decoder, `[head_dim / 2]` radians per position.

    Raises:
        IncompatibleError: There are none, or they turn only a part of each head.
    """
    found = getattr(getattr(decoder, "rotary_emb", None), "inv_freq", None)
    if not isinstance(found, Tensor) or found.numel() * 2 != head_dim:
        raise IncompatibleError(
            f"{type(decoder).__name__} has no rotary positions over whole heads",
            rule="Beacons' keys move by them.",
        )
    return found


def turn(rows: Sequence[int], moves: Sequence[int], inv_freq: Tensor, dtype: torch.dtype) -> Turn:
    """The rotation of rows by moves of so many positions.

    Args:
        rows: Rows of the store.
        moves: For each, its new position less its old one.
        inv_freq: From `frequencies`.
        dtype: Of the keys.
    """
    device = inv_freq.device
    index = torch.tensor(rows, dtype=torch.int64, device=device)
    if not any(moves):
        return Turn(index, None, None)
    # Angles in float64: with float32 an angle of 1,000 radians is off by 3e-5.
    angles = torch.tensor(moves, dtype=torch.float64, device=device)[:, None] * inv_freq.double()
    work = torch.float64 if dtype == torch.float64 else torch.float32
    cos, sin = angles.cos(), angles.sin()
    return Turn(index, torch.cat((cos, cos), -1).to(work), torch.cat((-sin, sin), -1).to(work))


def _rotated(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys turned in the tables' number format; rolled by half a head and with their sign they are turned by 90°."""
    wide = keys.to(cos.dtype)
    return torch.addcmul(wide * cos, wide.roll(wide.shape[-1] // 2, -1), sin).to(keys.dtype)
