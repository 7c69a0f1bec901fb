"""Attention of several query groups in one call, each over its own ranges of keys: windows over a memory.

A *segment* is a run of query rows and the key rows they see: the windows of Activation Beacon (a memory, then the own
window), several windows computed together, several sequences of any lengths packed behind each other. Without a mask a
segment is causal and aligned at its end: the last query sees all of its keys, the one before it one less. On a GPU in
half precision all such segments go through one call of a fused kernel; elsewhere each through
`scaled_dot_product_attention`. The plain twin is `plain_segments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.errors import IncompatibleError


@dataclass(frozen=True, eq=False)
class AttentionSegment:
    """Query rows that follow each other, and what they see.

    Args:
        queries: How many.
        keys: Ranges `(start, stop)` of key rows, in order.
        mask: None: causal, aligned at the end. Else bool `[queries, keys]`, True where a query sees a key.
    """

    queries: int
    keys: tuple[tuple[int, int], ...]
    mask: Tensor | None = None

    @property
    def key_rows(self) -> int:
        """Key rows in all ranges."""
        return sum(stop - start for start, stop in self.keys)


def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[AttentionSegment],
    scale: float,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of every segment.

    Args:
        query: `[1, heads, tokens, head_dim]`; the segments' queries follow each other in it.
        key: `[1, kv_heads, key_rows, head_dim]`.
        value: As `key`.
        segments: See `AttentionSegment`.
        scale: Factor on the scores.
        dropout: Of the probabilities.

    Returns:
        `[1, tokens, heads, head_dim]`.

    Raises:
        IncompatibleError: Segments that do not cover the queries, a batch, or fewer keys than queries.
    """
    _check(query, key, segments)
    pieces, start = [], 0
    for segment in segments:
        own = query[:, :, start : start + segment.queries]
        start += segment.queries
        pieces.append(_one(own, _gather(key, segment), _gather(value, segment), segment.mask, scale, dropout))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
    return out.transpose(1, 2)


def _check(query: Tensor, key: Tensor, segments: Sequence[AttentionSegment]) -> None:
    if query.shape[0] != 1:
        raise IncompatibleError(
            f"attention segments in a batch of {query.shape[0]}", rule="Rows are packed in one."
        )
    queries = sum(segment.queries for segment in segments)
    if queries != query.shape[2]:
        raise IncompatibleError(f"attention segments of {queries} queries in a row of {query.shape[2]}")
    for segment in segments:
        if segment.key_rows < segment.queries and segment.mask is None:
            raise IncompatibleError(f"{segment.queries} causal queries over {segment.key_rows} keys")
        if max(stop for _, stop in segment.keys) > key.shape[2]:
            raise IncompatibleError(f"an attention segment looks beyond the {key.shape[2]} keys")


def _gather(tensor: Tensor, segment: AttentionSegment) -> Tensor:
    parts = [tensor[:, :, start:stop] for start, stop in segment.keys if stop > start]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _one(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """`[1, heads, queries, head_dim]` of one segment."""
    grouped = query.shape[1] != key.shape[1]
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout, "enable_gqa": grouped}
    sdpa = nn.functional.scaled_dot_product_attention
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None:
        return sdpa(query, key, value, attn_mask=mask, **options)
    if queries == 1:
        return sdpa(query, key, value, **options)
    if queries == keys:
        return sdpa(query, key, value, is_causal=True, **options)
    from torch.nn.attention.bias import causal_lower_right

    if options.pop("enable_gqa"):  # the bias class does not repeat heads
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return sdpa(query, key, value, attn_mask=causal_lower_right(queries, keys), **options)


def plain_segments(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[AttentionSegment], scale: float
) -> Tensor:
    """The same by one softmax for each query row alone; arguments and result as `attend_segments`."""
    times = query.shape[1] // key.shape[1]
    rows, start = [], 0
    for segment in segments:
        columns = [column for first, stop in segment.keys for column in range(first, stop)]
        for row in range(segment.queries):
            hidden_end = segment.queries - 1 - row
            if segment.mask is None:
                seen = columns[: len(columns) - hidden_end]
            else:
                seen = [
                    column for column, see in zip(columns, segment.mask[row].tolist(), strict=True) if see
                ]
            keys = key[0, :, seen].repeat_interleave(times, 0)
            values = value[0, :, seen].repeat_interleave(times, 0)
            scores = (keys @ query[0, :, start + row, :, None]).squeeze(-1) * scale
            rows.append((scores.softmax(-1)[:, None] @ values).squeeze(1))
        start += segment.queries
    return torch.stack(rows)[None]
