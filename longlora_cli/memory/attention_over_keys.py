"""Fused attention of queries over keys that lie elsewhere: gathered, computed in one call, merged.

A kernel takes documents of queries and keys that follow each other, causal and aligned at their ends. Here rows are
gathered into that form by index. A query may take part in several documents: the softmax over the keys of all of them
is the sum of theirs, weighted by their log-sum-exps (Dao et al. 2022, arXiv:2205.14135; Liu et al. 2023,
arXiv:2310.01889), and a kernel that is given the merged output and log-sum-exp returns each document's share of the
gradients. So a mask that is no triangle, but a few triangles side by side, costs what its triangles cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from longlora_cli.memory.attention_documents import Gradients, lse_dtype

Index = NDArray[np.int64]


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
        """Output as q, and log-sum-exp `[heads, queries]`."""
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
class Document:
    """Queries that see the same parts of the keys.

    Args:
        rows: Of the queries.
        parts: Rows of the keys of each part; every part is causal and aligned at its end.
    """

    rows: Index
    parts: tuple[Index, ...]


class Gathering:
    """What one fused call of several documents needs, made once and used by every layer.

    Documents with equally many parts follow each other, part by part, so that outputs to be merged lie one behind the
    other: a *block* `[parts, queries]`.

    Args:
        documents: Each query row at most once.
        query_rows: Of all queries that there are.
        key_rows: Of all keys that there are.
        device: Theirs.

    Attributes:
        rows: Query rows in the order of the merged output.
        lengths: Queries of each document that the kernel sees.
        key_lengths: Keys of each.
        blocks: Parts and queries of each block.
    """

    def __init__(
        self, documents: Sequence[Document], query_rows: int, key_rows: int, device: torch.device
    ) -> None:
        by_parts: dict[int, list[Document]] = {}
        for document in documents:
            by_parts.setdefault(len(document.parts), []).append(document)
        self.lengths: list[int] = []
        self.key_lengths: list[int] = []
        self.blocks: list[tuple[int, int]] = []
        rows: list[Index] = []
        keys: list[Index] = []
        merged: list[Index] = []  # of each query that the kernel sees: its place in the merged output
        start = 0
        for parts, alike in sorted(by_parts.items()):
            own = np.concatenate([document.rows for document in alike])
            rows.append(own)
            self.blocks.append((parts, len(own)))
            merged += [np.arange(start, start + len(own))] * parts
            start += len(own)
            for part in range(parts):
                self.lengths += [len(document.rows) for document in alike]
                self.key_lengths += [len(document.parts[part]) for document in alike]
                keys += [document.parts[part] for document in alike]
        self.rows = np.concatenate(rows)
        self.whole = len(self.rows) == query_rows  # every query takes part
        expand = np.concatenate(merged)
        self.expand = unless_in_order(expand, len(expand), device)
        self._row_index = unless_in_order(self.rows, query_rows, device)
        self._query_index = unless_in_order(self.rows[expand], query_rows, device)
        self._key_index = unless_in_order(np.concatenate(keys), key_rows, device)

    @property
    def copies_keys(self) -> bool:
        """False when the keys lie as the kernel wants them."""
        return self._key_index is not None

    def queries(self, q: Tensor) -> Tensor:
        """`[queries, ...]` -> as the kernel sees them."""
        return _taken(q, self._query_index)

    def keys(self, k: Tensor) -> Tensor:
        """`[keys, ...]` -> as the kernel sees them."""
        return _taken(k, self._key_index)

    def query_slope(self, dq: Tensor, q: Tensor) -> Tensor:
        """The reverse of `queries`: sums over the parts of each query."""
        pieces, start = [], 0
        for parts, queries in self.blocks:
            block = dq[start : start + parts * queries]
            start += parts * queries
            pieces.append(block if parts == 1 else block.unflatten(0, (parts, queries)).sum(0))
        summed = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if self._row_index is None:
            return summed
        into = torch.empty_like(q) if self.whole else torch.zeros_like(q)
        return into.index_copy_(0, self._row_index, summed)

    def key_slope(self, dk: Tensor, k: Tensor) -> Tensor:
        """The reverse of `keys`: sums over the documents that see a key, in float32 for 16-bit numbers."""
        if self._key_index is None:
            return dk
        wide = lse_dtype(k.dtype)
        total = torch.zeros(k.shape, dtype=wide, device=k.device)
        return total.index_add_(0, self._key_index, dk.to(wide)).to(k.dtype)

    def merge(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """One softmax over all parts: `[rows, heads, head_dim]` and `[heads, rows]` in the order of `rows`."""
        if self.expand is None:
            return out, lse
        outs, sums, start = [], [], 0
        for parts, queries in self.blocks:
            span = slice(start, start + parts * queries)
            start = span.stop
            own, own_lse = out[span], lse[:, span]
            if parts > 1:
                own_lse = own_lse.unflatten(1, (parts, queries))
                total = own_lse.logsumexp(1)
                weight = (own_lse - total[:, None]).exp_().permute(1, 2, 0)[..., None]
                own = (own.unflatten(0, (parts, queries)) * weight).sum(0).to(out.dtype)
                own_lse = total
            outs.append(own)
            sums.append(own_lse)
        return torch.cat(outs), torch.cat(sums, 1)


def unless_in_order(index: Index, rows: int, device: torch.device) -> Tensor | None:
    """An index on the device; None when it is all rows in their order, so that nothing need be copied."""
    if len(index) == rows and (not rows or bool((index == np.arange(rows)).all())):
        return None
    return on_device(index, device)


def _taken(tensor: Tensor, index: Tensor | None) -> Tensor:
    return tensor if index is None else tensor.index_select(0, index)


def on_device(index: Index, device: torch.device) -> Tensor:
    """An int64 tensor; to a GPU without waiting for what that computes now."""
    tensor = torch.from_numpy(np.ascontiguousarray(index))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def attend_gathered(
    q: Tensor, k: Tensor, v: Tensor, gathering: Gathering, scale: float, kernel: OverKeys
) -> Tensor:
    """Attention of all documents, with autograd.

    Args:
        q: `[queries, heads, head_dim]`.
        k: `[keys, kv_heads, head_dim]`.
        v: As `k`.
        gathering: The documents.
        scale: Factor on the scores.
        kernel: The fused kernel.

    Returns:
        `[rows, heads, head_dim]`, in the order of `gathering.rows`.
    """
    out: Tensor = _Gathered.apply(q, k, v, gathering, scale, kernel)
    return out


class _Gathered(torch.autograd.Function):
    """Keeps q, k and v as they lay: gathered ones are as many times larger as a key has readers."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gathering: Gathering, scale: float, kernel: OverKeys
    ) -> Tensor:
        gathered = gathering.queries(q), gathering.keys(k), gathering.keys(v)
        parts, lse = kernel.forward_over(*gathered, gathering.lengths, gathering.key_lengths, scale)
        out, lse = gathering.merge(parts, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = gathering, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        gathering, scale, kernel = ctx.settings
        expand = gathering.expand
        grad = grad.contiguous() if expand is None else grad.index_select(0, expand)
        out = _taken(out, expand)
        lse = lse if expand is None else lse.index_select(1, expand)
        dq, dk, dv = kernel.backward_over(
            grad, gathering.queries(q), gathering.keys(k), gathering.keys(v), out, lse,
            gathering.lengths, gathering.key_lengths, scale,
        )  # fmt: skip
        dq, dk, dv = gathering.query_slope(dq, q), gathering.key_slope(dk, k), gathering.key_slope(dv, v)
        return dq, dk, dv, None, None, None
