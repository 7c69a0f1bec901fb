"""Attention of several query groups in one call, each over its own rows of keys: windows over a memory.

A *segment* is a run of query rows and the key rows they see: the windows of Activation Beacon (a memory, then the own
window), several windows computed together, several sequences of any lengths packed behind each other. Without a mask a
segment is causal and aligned at its end: the last query sees all of its keys, the one before it one less. It may have
further parts, each causal and aligned by itself, under the same softmax. On a GPU in half precision all such segments
go through one call of a fused kernel, forward and backward (`attention_over_keys`); elsewhere, and with a mask, each
through `scaled_dot_product_attention`. The plain twin is `plain_segments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longlora_cli.errors import IncompatibleError
from longlora_cli.memory.attention_choice import choose_kernel
from longlora_cli.memory.attention_masks import attend_masked
from longlora_cli.memory.attention_over_keys import (
    Document,
    Gathering,
    Index,
    OverKeys,
    attend_gathered,
    on_device,
    unless_in_order,
)

_FLASH_HEAD_DIM = 256
_HALF = (torch.float16, torch.bfloat16)
# Rows in order: `(start, stop)`, or their numbers.
Rows = tuple[int, int] | Index


@dataclass(frozen=True, eq=False)
class AttentionSegment:
    """Query rows that follow each other, and what they see.

    Args:
        queries: How many.
        keys: Rows of the keys, in order.
        mask: None: causal, aligned at the end. Else bool `[queries, keys]`, True where a query sees a key.
        also: Further keys under the same softmax, without a mask: each part is causal and aligned at its own end.
    """

    queries: int
    keys: tuple[Rows, ...]
    mask: Tensor | None = None
    also: tuple[Index, ...] = ()

    @property
    def part_lengths(self) -> tuple[int, ...]:
        """Key rows of each part."""
        return (sum(map(_length, self.keys)), *map(len, self.also))

    @property
    def key_rows(self) -> int:
        """Key rows in all parts."""
        return sum(self.part_lengths)

    @property
    def rows(self) -> tuple[Rows, ...]:
        """Rows of the keys of all parts."""
        return (*self.keys, *self.also)


class AttentionSegments:
    """The segments of one forward pass; what kernels need of them is made once and used by every layer.

    Args:
        segments: In the order of their queries, which follow each other.
        device: Where keys and values are.
        order: The row of each query; None: they stand in order.

    Raises:
        IncompatibleError: A causal part with fewer keys than queries, or a mask beside further parts.
    """

    def __init__(
        self, segments: Sequence[AttentionSegment], device: torch.device, order: Index | None = None
    ) -> None:
        self.segments, self._device = tuple(segments), device
        for segment in segments:
            if segment.mask is not None and segment.also:
                raise IncompatibleError("a mask says of all keys who sees them: there are no further parts")
            if segment.mask is None and min(segment.part_lengths) < segment.queries:
                fewest = min(segment.part_lengths)
                raise IncompatibleError(f"{segment.queries} causal queries over {fewest} keys")
        self._order = np.arange(self.queries) if order is None else order
        self._gathered: dict[int, Gathering] = {}

    @cached_property
    def queries(self) -> int:
        """Query rows of all segments."""
        return sum(segment.queries for segment in self.segments)

    @cached_property
    def most_keys(self) -> int:
        """Keys of the segment that sees most."""
        return max(segment.key_rows for segment in self.segments)

    @cached_property
    def last_key(self) -> int:
        """One past the last key row that a segment names."""
        return max(_last(rows) for segment in self.segments for rows in segment.rows)

    @cached_property
    def fused(self) -> tuple[int, ...]:
        """Numbers of the segments that one fused call computes: all without a mask, but not a query alone.

        For one query over many keys there are kernels that divide the keys among processors.
        """
        found = tuple(n for n, segment in enumerate(self.segments) if segment.mask is None)
        alone = len(found) == 1 and self.segments[found[0]].queries == 1
        return () if alone else found

    def gathering(self, key_rows: int) -> Gathering:
        """The fused segments as a kernel sees them, of so many keys that there are."""
        if key_rows not in self._gathered:
            documents = [
                Document(self._rows_of(n), (_index(self.segments[n].keys), *self.segments[n].also))
                for n in self.fused
            ]
            self._gathered[key_rows] = Gathering(documents, self.queries, key_rows, self._device)
        return self._gathered[key_rows]

    @cached_property
    def starts(self) -> list[int]:
        """The first query of each segment."""
        return [0, *accumulate(segment.queries for segment in self.segments)]

    def _rows_of(self, number: int) -> Index:
        return self._order[self.starts[number] : self.starts[number + 1]]

    @cached_property
    def order(self) -> Tensor | None:
        """The row of each query on the device; None when they stand in order."""
        return unless_in_order(self._order, self.queries, self._device)

    def back(self, fused: bool) -> Tensor | None:
        """For each row its place among outputs: fused ones, then those of the other segments. None: it is the same."""
        return self._back_from_fused if fused else self._back_from_segments

    @cached_property
    def _back_from_segments(self) -> Tensor | None:
        return unless_in_order(_inverse(self._order), self.queries, self._device)

    @cached_property
    def _back_from_fused(self) -> Tensor | None:
        apart = [self._rows_of(n) for n in range(len(self.segments)) if n not in self.fused]
        rows = next(iter(self._gathered.values())).rows
        return unless_in_order(_inverse(np.concatenate((rows, *apart))), self.queries, self._device)

    def keys_of(self, number: int, tensor: Tensor) -> Tensor:
        """Keys of one segment, of `[1, kv_heads, key_rows, head_dim]`."""
        rows = self._key_rows[number]
        if isinstance(rows, Tensor):
            return tensor.index_select(2, rows)
        parts = [tensor[:, :, start:stop] for start, stop in rows if stop > start]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    @cached_property
    def _key_rows(self) -> list[list[tuple[int, int]] | Tensor]:
        """Of each segment ranges, or an index where row numbers are among them."""
        found: list[list[tuple[int, int]] | Tensor] = []
        for segment in self.segments:
            ranges = [rows for rows in segment.rows if isinstance(rows, tuple)]
            whole = len(ranges) == len(segment.rows)
            found.append(ranges if whole else on_device(_index(segment.rows), self._device))
        return found

    def mask_of(self, number: int) -> Tensor | None:
        """The mask of a segment; that of several parts is as many triangles side by side."""
        segment = self.segments[number]
        if not segment.also:
            return segment.mask
        return _triangles(segment.queries, segment.part_lengths, self._device)


def _length(rows: Rows) -> int:
    return rows[1] - rows[0] if isinstance(rows, tuple) else len(rows)


def _last(rows: Rows) -> int:
    if isinstance(rows, tuple):
        return rows[1]
    return int(rows.max()) + 1 if len(rows) else 0


def _index(parts: Sequence[Rows]) -> Index:
    return np.concatenate([np.arange(*part) if isinstance(part, tuple) else part for part in parts])


def _inverse(index: Index) -> Index:
    inverse = np.empty_like(index)
    inverse[index] = np.arange(len(index))
    return inverse


@lru_cache(maxsize=16)
def _triangles(queries: int, part_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Causal masks of several parts side by side, each aligned at its end: bool `[queries, keys]`."""
    parts = [torch.ones(queries, keys, dtype=torch.bool, device=device) for keys in part_lengths]
    masks = [part.tril_(part.shape[1] - queries) for part in parts]
    return torch.cat(masks, dim=1)


def segment_kernel(backend: str, query: Tensor) -> OverKeys | None:
    """The fused kernel for segments, or None where `scaled_dot_product_attention` chooses by itself.

    FlashAttention-2 as PyTorch carries it, or FlashAttention-4 when it is asked for by name: cuDNN's causal mask is
    aligned at the first query, which is another mask.
    """
    return _segment_kernel(backend, query.device, query.dtype, query.shape[-1])


@lru_cache(maxsize=32)
def _segment_kernel(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> OverKeys | None:
    if device.type != "cuda" or dtype not in _HALF or head_dim % 8 or head_dim > _FLASH_HEAD_DIM:
        return None
    if backend not in ("auto", "flash", "fa4") or torch.cuda.get_device_capability(device)[0] < 8:
        return None
    kernel: Any = choose_kernel("fa4" if backend == "fa4" else "flash", device, dtype, head_dim)
    return kernel  # type: ignore[no-any-return]


def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: AttentionSegments,
    scale: float,
    *,
    kernel: OverKeys | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of every segment.

    Args:
        query: `[1, heads, tokens, head_dim]`; the segments' queries follow each other in it.
        key: `[1, kv_heads, key_rows, head_dim]`.
        value: As `key`.
        segments: See `AttentionSegment`.
        scale: Factor on the scores.
        kernel: From `segment_kernel`.
        dropout: Of the probabilities; a fused kernel is not used with it.

    Returns:
        `[1, tokens, heads, head_dim]`.

    Raises:
        IncompatibleError: Segments that do not cover the queries, a batch, or keys that are not there.
    """
    _check(query, key, segments)
    fuses = kernel is not None and bool(segments.fused) and not dropout
    apart = [n for n in range(len(segments.segments)) if not fuses or n not in segments.fused]
    pieces = []
    if fuses:
        assert kernel is not None  # else nothing fuses
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        pieces.append(attend_gathered(q, k, v, segments.gathering(len(k)), scale, kernel)[None])
    if apart and segments.order is not None:
        query = query.index_select(2, segments.order)
    for number in apart:
        own = query[:, :, segments.starts[number] : segments.starts[number + 1]]
        keys, values = segments.keys_of(number, key), segments.keys_of(number, value)
        pieces.append(_one(own, keys, values, segments.mask_of(number), scale, dropout).transpose(1, 2))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)
    back = segments.back(fuses)
    return out if back is None else out.index_select(1, back)


def _check(query: Tensor, key: Tensor, segments: AttentionSegments) -> None:
    if query.shape[0] != 1:
        raise IncompatibleError(
            f"attention segments in a batch of {query.shape[0]}", rule="Rows are packed in one."
        )
    if segments.queries != query.shape[2]:
        raise IncompatibleError(
            f"attention segments of {segments.queries} queries in a row of {query.shape[2]}"
        )
    if segments.last_key > key.shape[2]:
        raise IncompatibleError(f"an attention segment looks beyond the {key.shape[2]} keys")


def _one(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """`[1, heads, queries, head_dim]` of one segment."""
    times, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    lower_right = mask is None and 1 < queries < keys
    # Only flash kernels take fewer KV heads than query heads, and those know neither masks nor float32; without
    # repeated heads PyTorch would compute all scores in float32. The bias class does not repeat them either.
    grouped = times > 1 and not lower_right and mask is None and query.dtype in _HALF
    if times > 1 and not grouped:
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout, "enable_gqa": grouped}
    sdpa = nn.functional.scaled_dot_product_attention
    if mask is not None:
        return attend_masked(query, key, value, mask, scale, dropout=dropout)
    if not lower_right:
        return sdpa(query, key, value, is_causal=queries > 1, **options)
    from torch.nn.attention.bias import causal_lower_right

    del options["enable_gqa"]
    return sdpa(query, key, value, attn_mask=causal_lower_right(queries, keys), **options)


def plain_segments(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[AttentionSegment], scale: float
) -> Tensor:
    """The same by one softmax for each query row alone; arguments and result as `attend_segments`, rows in order."""
    times = query.shape[1] // key.shape[1]
    rows, start = [], 0
    for segment in segments:
        parts = [_index(segment.keys).tolist(), *(part.tolist() for part in segment.also)]
        for row in range(segment.queries):
            hidden_end = segment.queries - 1 - row
            if segment.mask is None:
                seen = [column for part in parts for column in part[: len(part) - hidden_end]]
            else:
                visible = segment.mask[row].tolist()
                seen = [column for column, sees in zip(parts[0], visible, strict=True) if sees]
            keys = key[0, :, seen].repeat_interleave(times, 0)
            values = value[0, :, seen].repeat_interleave(times, 0)
            scores = (keys @ query[0, :, start + row, :, None]).squeeze(-1) * scale
            rows.append((scores.softmax(-1)[:, None] @ values).squeeze(1))
        start += segment.queries
    return torch.stack(rows)[None]
