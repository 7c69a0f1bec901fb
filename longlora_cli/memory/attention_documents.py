"""What an attention kernel is, and those in plain PyTorch: the twin, the CPU's, a blockwise one, one document a call.

All tensors here are float16, bfloat16, float32 or float64 with contiguous last dimensions. Causal attention within
each document is softmax(scale * q k^T) v over the keys up to the query; `lse` is the logarithm of its denominator,
from which the backward pass recomputes the probabilities instead of keeping them (Dao et al. 2022, arXiv:2205.14135).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]

# Equal documents that follow each other go through a kernel as one batch, of no more than this many tokens with
# padding (shorter documents count as 512): enough to fill a GPU, too few to make a temporary that matters.
_RUN_TOKENS = 65_536
_SHORTEST = 512
# Scores of one blockwise tile: 2^26 float32 numbers are 256 MiB.
_TILE_SCORES = 2**26


class AttentionKernel(Protocol):
    """One way to compute attention, as two functions; see the module for shapes."""

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of each document's causal attention; factor `scale` on the scores."""
        ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Sequence[int],
        scale: float,
        *,
        overwrite: bool = False,
    ) -> Gradients:
        """Gradients of q, k and v from the slope `grad` of `out`.

        `overwrite` allows the kernel to use the memory of q, k and v for their gradients and return these tensors.
        """
        ...


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The number format of log-sum-exp: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def document_runs(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """Consecutive documents of equal length as `(first token, length, count)`; their tokens follow each other."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for length in lengths:
        if runs and runs[-1][1] == length and (runs[-1][2] + 1) * max(length, _SHORTEST) <= _RUN_TOKENS:
            runs[-1] = (runs[-1][0], length, runs[-1][2] + 1)
        else:
            runs.append((start, length, 1))
        start += length
    return runs


def repeat_heads(tensor: Tensor, times: int) -> Tensor:
    """Keys or values `[count, kv_heads, tokens, head_dim]` with each head `times` times in a row."""
    return tensor if times == 1 else tensor.repeat_interleave(times, 1)


def sum_heads(gradient: Tensor, times: int) -> Tensor:
    """The reverse of `repeat_heads`: a KV head's gradient is the sum over the query heads that share it."""
    return gradient if times == 1 else gradient.unflatten(1, (-1, times)).sum(2)


class PerDocument(ABC):
    """A kernel that is called once for each run of equal documents, on views `[count, heads, length, head_dim]`.

    A subclass has `_run_forward` and `_run_backward`; nothing is copied on the way in.
    """

    name = ""

    @abstractmethod
    def _run_forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Output as `q`, log-sum-exp `[count, heads, length]`."""

    @abstractmethod
    def _run_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Gradients:
        """Gradients of `q`, `k` and `v` in their shapes."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionKernel.forward`."""
        runs = document_runs(lengths)
        if len(runs) == 1:
            q, k, v = (_batched(t, runs[0]) for t in (q, k, v))
            out, lse = self._run_forward(q, k, v, scale)
            return _packed(out), _packed_lse(lse)
        all_out = q.new_empty(q.shape)
        all_lse = q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q.dtype))
        for run in runs:
            query, key, value = (_batched(t, run) for t in (q, k, v))
            out, lse = self._run_forward(query, key, value, scale)
            _batched(all_out, run).copy_(out)
            _batched_lse(all_lse, run).copy_(lse)
        return all_out, all_lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Sequence[int],
        scale: float,
        *,
        overwrite: bool = False,
    ) -> Gradients:
        """See `AttentionKernel.backward`."""
        runs = document_runs(lengths)
        if len(runs) == 1:
            dq, dk, dv = self._one_run(grad, q, k, v, out, lse, runs[0], scale)
            return _packed(dq), _packed(dk), _packed(dv)
        # Documents share no token, so a document's gradients can replace its own q, k and v at once.
        targets = (
            (q, k, v) if overwrite else (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
        )
        for run in runs:
            gradients = self._one_run(grad, q, k, v, out, lse, run, scale)
            for target, gradient in zip(targets, gradients, strict=True):
                _batched(target, run).copy_(gradient)
        return targets

    def _one_run(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        run: tuple[int, int, int],
        scale: float,
    ) -> Gradients:
        grad, q, k, v, out = (_batched(t, run) for t in (grad, q, k, v, out))
        return self._run_backward(grad, q, k, v, out, _batched_lse(lse, run), scale)


def _batched(tensor: Tensor, run: tuple[int, int, int]) -> Tensor:
    """`[tokens, heads, head_dim]` -> a view `[count, heads, length, head_dim]` of the run."""
    start, length, count = run
    return tensor[start : start + length * count].unflatten(0, (count, length)).transpose(1, 2)


def _batched_lse(lse: Tensor, run: tuple[int, int, int]) -> Tensor:
    """`[heads, tokens]` -> a view `[count, heads, length]` of the run."""
    start, length, count = run
    return lse[:, start : start + length * count].unflatten(1, (count, length)).transpose(0, 1)


def _packed(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).flatten(0, 1)


def _packed_lse(lse: Tensor) -> Tensor:
    return lse.transpose(0, 1).flatten(1, 2)


class PlainKernel:
    """The twin: one softmax over an explicit `[tokens, tokens]` mask, and its derivative written out.

    With S = scale q k^T and P = softmax(S): dv = P^T do, dP = do v^T, dS = P (dP - rowsum(do o)), dq = scale dS k,
    dk = scale dS^T q. Half precision is computed in float32.
    """

    name = "plain"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionKernel.forward`."""
        times, work = q.shape[1] // k.shape[1], lse_dtype(q.dtype)
        query, key, value = (t.to(work).transpose(0, 1) for t in (q, k, v))
        key, value = key.repeat_interleave(times, 0), value.repeat_interleave(times, 0)
        scores = _masked_scores(query, key, lengths, scale)
        lse = scores.logsumexp(-1)
        out = (scores - lse[..., None]).exp() @ value
        return out.transpose(0, 1).to(q.dtype), lse

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Sequence[int],
        scale: float,
        *,
        overwrite: bool = False,
    ) -> Gradients:
        """See `AttentionKernel.backward`; never uses the memory it may overwrite."""
        times, work = q.shape[1] // k.shape[1], lse_dtype(q.dtype)
        grad, query, key, value, out = (t.to(work).transpose(0, 1) for t in (grad, q, k, v, out))
        key, value = key.repeat_interleave(times, 0), value.repeat_interleave(times, 0)
        probabilities = (_masked_scores(query, key, lengths, scale) - lse[..., None]).exp()
        dv = probabilities.transpose(1, 2) @ grad
        from_rows = (grad * out).sum(-1, keepdim=True)
        dscores = probabilities * (grad @ value.transpose(1, 2) - from_rows) * scale
        dq, dk = dscores @ key, dscores.transpose(1, 2) @ query
        dk, dv = (t.unflatten(0, (-1, times)).sum(1) for t in (dk, dv))
        return tuple(t.transpose(0, 1).to(q.dtype) for t in (dq, dk, dv))  # type: ignore[return-value]


def _masked_scores(query: Tensor, key: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    tokens = torch.arange(query.shape[1], device=query.device)
    sizes = torch.tensor(lengths, device=query.device)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), sizes)
    allowed = (tokens[:, None] >= tokens[None, :]) & (document[:, None] == document[None, :])
    return (query @ key.transpose(1, 2) * scale).masked_fill(~allowed, float("-inf"))


class CpuKernel(PerDocument):
    """PyTorch's tiled CPU kernel, called below autograd because only there it hands out log-sum-exp.

    Keys and values are repeated for the query heads that share them: not every version of the kernel takes fewer.
    """

    name = "torch"

    def _run_forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        times = q.shape[1] // k.shape[1]
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, repeat_heads(k, times), repeat_heads(v, times), 0.0, True, scale=scale
        )
        return out, lse

    def _run_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Gradients:
        times = q.shape[1] // k.shape[1]
        # The kernel writes log-sum-exp as [count, length, heads] in memory; it gets it back in the same layout.
        lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            grad, q, repeat_heads(k, times), repeat_heads(v, times), out, lse, 0.0, True, scale=scale
        )
        return dq, sum_heads(dk, times), sum_heads(dv, times)


class BlockwiseKernel(PerDocument):
    """Tiles of query rows over all their keys, in PyTorch operations alone: for devices that have no kernel.

    Memory is bounded by a tile's scores (256 MiB in float32) instead of growing with the square of the document.
    """

    name = "torch"

    def __init__(self, tile_scores: int = _TILE_SCORES) -> None:
        self._tile_scores = tile_scores

    def _run_forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
        for rows in self._tiles(q):
            keys, values = (repeat_heads(t[:, :, : rows.stop], q.shape[1] // k.shape[1]) for t in (k, v))
            scores = _tile_scores(q, keys, rows, scale)
            lse[:, :, rows] = scores.logsumexp(-1)
            out[:, :, rows] = ((scores - lse[:, :, rows, None]).exp() @ values.to(lse.dtype)).to(q.dtype)
        return out, lse

    def _run_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Gradients:
        times, work = q.shape[1] // k.shape[1], lse.dtype
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(t.shape, dtype=work, device=q.device) for t in (k, v))
        for rows in self._tiles(q):
            keys, values = (repeat_heads(t[:, :, : rows.stop], times).to(work) for t in (k, v))
            slope, query = grad[:, :, rows].to(work), q[:, :, rows].to(work)
            probabilities = (_tile_scores(q, keys, rows, scale) - lse[:, :, rows, None]).exp()
            dv[:, :, : rows.stop] += sum_heads(probabilities.transpose(2, 3) @ slope, times)
            from_rows = (slope * out[:, :, rows].to(work)).sum(-1, keepdim=True)
            dscores = probabilities * (slope @ values.transpose(2, 3) - from_rows) * scale
            dq[:, :, rows] = (dscores @ keys).to(q.dtype)
            dk[:, :, : rows.stop] += sum_heads(dscores.transpose(2, 3) @ query, times)
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _tiles(self, q: Tensor) -> list[slice]:
        count, heads, length, _ = q.shape
        rows = max(1, min(length, self._tile_scores // (count * heads * length)))
        return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


def _tile_scores(q: Tensor, keys: Tensor, rows: slice, scale: float) -> Tensor:
    """Scores of the query rows with the keys up to their last, later keys masked: `[count, heads, rows, keys]`."""
    work = lse_dtype(q.dtype)
    scores = q[:, :, rows].to(work) @ keys.to(work).transpose(2, 3) * scale
    own = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
    later = torch.arange(rows.stop, device=q.device)[None, :] > own
    return scores.masked_fill_(later, float("-inf"))
