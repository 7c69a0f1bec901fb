"""A fused attention kernel in loops, so that what surrounds one is tested without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longlora_cli.memory.attention_segments import AttentionSegment, plain_segments


class Loops:
    """`longlora_cli.memory.attention_over_keys.OverKeys` a query at a time, in any precision."""

    def forward_over(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        key_lengths: Sequence[int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        assert k.shape[0] == sum(key_lengths)
        starts = [sum(key_lengths[:n]) for n in range(len(key_lengths))]
        segments = [
            AttentionSegment(n, ((start, start + keys),))
            for n, start, keys in zip(lengths, starts, key_lengths, strict=True)
        ]
        rows = [t.transpose(0, 1)[None] for t in (q, k, v)]
        out = plain_segments(*rows, segments, scale)[0]
        return out, plain_sums(rows[0], rows[1], segments, scale)

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By the formula, because `out` and `lse` may be those of more keys than are here."""
        gradients = [torch.zeros_like(t) for t in (q, k, v)]
        times, row, first = q.shape[1] // k.shape[1], 0, 0
        for queries, keys in zip(lengths, key_lengths, strict=True):
            for number in range(queries):
                seen = slice(first, first + keys - queries + number + 1)
                own_keys, own_values = (t[seen].repeat_interleave(times, 1) for t in (k, v))
                weights = ((own_keys * q[row]).sum(-1) * scale - lse[:, row]).exp()
                slopes = weights * ((own_values * grad[row]).sum(-1) - (out[row] * grad[row]).sum(-1)) * scale
                gradients[0][row] = (slopes[..., None] * own_keys).sum(0)
                gradients[1][seen] += (slopes[..., None] * q[row]).unflatten(1, (-1, times)).sum(2)
                gradients[2][seen] += (weights[..., None] * grad[row]).unflatten(1, (-1, times)).sum(2)
                row += 1
            first += keys
        return gradients[0], gradients[1], gradients[2]


def plain_sums(query: Tensor, key: Tensor, segments: Sequence[AttentionSegment], scale: float) -> Tensor:
    """Log-sum-exp `[heads, queries]` of causal segments of one range each."""
    times, found, start = query.shape[1] // key.shape[1], [], 0
    for segment in segments:
        first, stop = segment.keys[0]
        for row in range(segment.queries):
            keys = key[0, :, first : stop - segment.queries + 1 + row].repeat_interleave(times, 0)
            found.append(((keys @ query[0, :, start + row, :, None]).squeeze(-1) * scale).logsumexp(-1))
        start += segment.queries
    return torch.stack(found, 1)
