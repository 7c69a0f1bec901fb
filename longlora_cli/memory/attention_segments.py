"""Attention of several query groups in one call, each over its own ranges of keys: windows over a memory.

A *segment* is a run of query rows and the key rows they see: the windows of Activation Beacon (a memory, then the own
window), several windows computed together, several sequences of any lengths packed behind each other. Without a mask a
segment is causal and aligned at its end: the last query sees all of its keys, the one before it one less. On a GPU in
half precision all such segments go through one call of a fused kernel, forward and backward; elsewhere each through
`scaled_dot_product_attention`. The plain twin is `plain_segments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from longlora_cli.errors import IncompatibleError
from longlora_cli.memory.attention_choice import choose_kernel
from longlora_cli.memory.attention_documents import Gradients

_FLASH_HEAD_DIM = 256
_HALF = (torch.float16, torch.bfloat16)


class OverKeys(Protocol):
    """A fused kernel whose documents have other numbers of keys than of queries; causal, aligned at their ends.

    Shapes as in `attention_kernels`: q `[queries, heads, head_dim]`, k and v `[keys, kv_heads, head_dim]`.
    """

    def forward_over(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        key_lengths: Sequence[int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """Output as q, and log-sum-exp."""
        ...

    def backward_over(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Sequence[int],
        key_lengths: Sequence[int],
        scale: float,
    ) -> Gradients:
        """Gradients of q, k and v."""
        ...


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


class AttentionSegments:
    """The segments of one forward pass; what kernels need of them is made once and used by every layer.

    Args:
        segments: In the order of their queries, which follow each other.
        device: Where keys and values are.

    Raises:
        IncompatibleError: A causal segment with fewer keys than queries.
    """

    def __init__(self, segments: Sequence[AttentionSegment], device: torch.device) -> None:
        self.segments, self._device = tuple(segments), device
        for segment in segments:
            if segment.mask is None and segment.key_rows < segment.queries:
                raise IncompatibleError(f"{segment.queries} causal queries over {segment.key_rows} keys")

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
        return max(stop for segment in self.segments for _, stop in segment.keys)

    @cached_property
    def lengths(self) -> list[int]:
        """Queries of each segment."""
        return [segment.queries for segment in self.segments]

    @cached_property
    def key_lengths(self) -> list[int]:
        """Keys of each segment."""
        return [segment.key_rows for segment in self.segments]

    @cached_property
    def fusible(self) -> bool:
        """True when one causal call can compute all of them and it pays: single queries have better kernels."""
        return all(segment.mask is None for segment in self.segments) and max(self.lengths) > 1

    @cached_property
    def key_index(self) -> Tensor | None:
        """int64 `[keys]`: the keys of all segments behind each other; None when they lie so already."""
        ranges = [span for segment in self.segments for span in segment.keys]
        ends = [0, *(stop for _, stop in ranges)]
        if all(start == end for (start, _), end in zip(ranges, ends, strict=False)):
            return None
        return torch.cat([torch.arange(start, stop, device=self._device) for start, stop in ranges])


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
    if kernel is not None and segments.fusible and not dropout:
        return _fused(query, key, value, segments, scale, kernel)
    pieces, start = [], 0
    for segment in segments.segments:
        own = query[:, :, start : start + segment.queries]
        start += segment.queries
        pieces.append(_one(own, _gather(key, segment), _gather(value, segment), segment.mask, scale, dropout))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
    return out.transpose(1, 2)


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


def _fused(
    query: Tensor, key: Tensor, value: Tensor, segments: AttentionSegments, scale: float, kernel: OverKeys
) -> Tensor:
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if segments.key_index is None:
        k, v = k[: segments.last_key], v[: segments.last_key]
    else:
        k, v = k.index_select(0, segments.key_index), v.index_select(0, segments.key_index)
    out: Tensor = _OverKeys.apply(q, k, v, segments.lengths, segments.key_lengths, scale, kernel)
    return out[None]


class _OverKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], key_lengths: list[int], scale: float,
        kernel: OverKeys,
    ) -> Tensor:  # fmt: skip
        out, lse = kernel.forward_over(q, k, v, lengths, key_lengths, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = lengths, key_lengths, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        lengths, key_lengths, scale, kernel = ctx.settings
        gradients = kernel.backward_over(grad.contiguous(), q, k, v, out, lse, lengths, key_lengths, scale)
        return (*gradients, None, None, None, None)


def _gather(tensor: Tensor, segment: AttentionSegment) -> Tensor:
    parts = [tensor[:, :, start:stop] for start, stop in segment.keys if stop > start]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


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
        return sdpa(query, key, value, attn_mask=mask, **options)
    if not lower_right:
        return sdpa(query, key, value, is_causal=queries > 1, **options)
    from torch.nn.attention.bias import causal_lower_right

    del options["enable_gqa"]
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
                seen = [c for c, visible in zip(columns, segment.mask[row].tolist(), strict=True) if visible]
            keys = key[0, :, seen].repeat_interleave(times, 0)
            values = value[0, :, seen].repeat_interleave(times, 0)
            scores = (keys @ query[0, :, start + row, :, None]).squeeze(-1) * scale
            rows.append((scores.softmax(-1)[:, None] @ values).squeeze(1))
        start += segment.queries
    return torch.stack(rows)[None]
