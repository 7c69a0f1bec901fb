"""Attention of several rows behind one prefix that they share: its keys are held once and read once for all of them.

The softmax over prefix and own tokens is that of two parts, weighted by their log-sum-exps (Dao et al. 2022,
arXiv:2205.14135). Over the prefix the queries of all rows, and of all heads that share keys, are queries of one row:
11 questions about 32K tokens read its keys and values once instead of 11 times, and nobody holds 11 copies
(Juravsky et al. 2024, arXiv:2402.05099). No gradients: for reading and answering. The plain twin is
`attention.plain_attention` over prefix and own tokens behind each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longlora_cli.memory.attention_documents import lse_dtype

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_FLASH_HEAD_DIM = 256
# Scores that exist at one time: 256 MiB in float32.
_TILE_SCORES = 2**26


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """Keys and values of what all rows of a batch begin with.

    Args:
        layers: Of each layer keys and values, `[1, kv_heads, tokens, head_dim]`.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]


def attend_behind_prefix(
    query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], seen: Tensor, scale: float
) -> Tensor:
    """Attention over a prefix, which every query sees whole, and over the own tokens of its row.

    Args:
        query: `[rows, heads, queries, head_dim]`.
        key: `[rows, kv_heads, tokens, head_dim]`, behind the prefix.
        value: As `key`.
        prefix: Keys and values of one layer, `[1, kv_heads, prefix tokens, head_dim]`.
        seen: bool `[rows, queries, tokens]`: which of the own tokens a query sees, at least one.
        scale: Factor on the scores.

    Returns:
        `[rows, queries, heads, head_dim]`.
    """
    rows, heads, queries, width = query.shape
    kv_heads = key.shape[1]
    own = query.reshape(rows, kv_heads, heads // kv_heads * queries, width)
    # [1, kv_heads, rows x shared heads x queries, head_dim]
    together = own.transpose(0, 1).flatten(1, 2)[None]
    out, lse = _whole(together, *prefix, scale)
    out = out[0].unflatten(1, (rows, -1)).transpose(0, 1)
    lse = lse[0].unflatten(1, (rows, -1)).transpose(0, 1)
    own_out, own_lse = _masked(own, key, value, seen, scale)
    total = torch.logaddexp(lse, own_lse)
    merged = out * (lse - total).exp()[..., None] + own_out * (own_lse - total).exp()[..., None]
    return merged.to(query.dtype).reshape(rows, heads, queries, width).transpose(1, 2)


def _whole(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query over every key: `[1, kv_heads, queries, head_dim]` and `[1, kv_heads, queries]`, in wide numbers."""
    wide = lse_dtype(q.dtype)
    if q.device.type == "cuda" and q.dtype in _HALF and q.shape[3] <= _FLASH_HEAD_DIM and not q.shape[3] % 8:
        rows = [tensor.transpose(1, 2) for tensor in (q, k, v)]
        out, lse, *_ = _ATEN._flash_attention_forward.default(
            *rows, None, None, q.shape[2], k.shape[2], 0.0, False, False, scale=scale
        )
        return out.transpose(1, 2).to(wide), lse
    if q.device.type == "cpu":
        out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, False, scale=scale)
        return out.to(wide), lse
    return by_tiles(q, k, v, scale)


def by_tiles(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same in PyTorch operations alone, for devices and number formats that have no kernel."""
    wide = lse_dtype(q.dtype)
    tile = max(1, _TILE_SCORES // (q.shape[1] * k.shape[2]))
    pieces = [_softmax(piece.to(wide) @ k.to(wide).transpose(2, 3) * scale, v) for piece in q.split(tile, 2)]
    return torch.cat([out for out, _ in pieces], 2), torch.cat([lse for _, lse in pieces], 2)


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The few own tokens of each row, with all of their scores at once."""
    wide = lse_dtype(q.dtype)
    mask = seen.repeat(1, q.shape[2] // seen.shape[1], 1)[:, None]
    scores = q.to(wide) @ k.to(wide).transpose(2, 3) * scale
    return _softmax(scores.masked_fill_(~mask, float("-inf")), v)


def _softmax(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v.to(scores.dtype), lse
