"""Causal attention over packed documents as an explicit forward and backward: the seam of the memory engine.

The engine keeps the output and the log-sum-exp of a layer itself and runs the backward pass later without a second
forward pass, which autograd alone cannot. So a kernel here is two functions, and `attend` is the autograd function
over them: the one place that sequence parallelism has to wrap.

Shapes everywhere: q `[tokens, heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]`, each a view with any row
stride of a wider buffer (last dimension contiguous); out as q; lse `[heads, tokens]` in float32 (float64 for
float64); lengths are the documents' tokens in order and sum to `tokens`. A batch is its rows' documents in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longlora_cli.errors import IncompatibleError, SettingsError
from longlora_cli.memory.attention_choice import BACKENDS, choose_kernel, expected_kernel, refuse_backend
from longlora_cli.memory.attention_documents import AttentionKernel, Gradients, lse_dtype

__all__ = [
    "BACKENDS",
    "AttentionKernel",
    "attend",
    "attend_backward",
    "attend_forward",
    "choose_kernel",
    "expected_kernel",
    "refuse_backend",
    "shifted_lengths",
]

# Kernels index with 32-bit integers, so neither a call's queries nor an operand with its gaps may have more elements.
_MAX_ELEMENTS = 2**31 - 1


class _Part(NamedTuple):
    """Query heads that attend to the KV heads of their call over documents of these lengths."""

    heads: slice
    lengths: list[int]


def shifted_lengths(lengths: Sequence[int], group: int) -> tuple[list[int], list[int]]:
    """Documents cut into groups: from their first token on, and shifted by half a group.

    `[10]` with groups of 4 gives `[4, 4, 2]` and `[2, 4, 4]`.

    Raises:
        SettingsError: A group that is not a positive even number of tokens.
    """
    if group <= 0 or group % 2:
        raise SettingsError(
            f"shifted attention in groups of {group} tokens", rule="Groups have an even size."
        )
    straight: list[int] = []
    shifted: list[int] = []
    for length in lengths:
        for pieces, first in ((straight, group), (shifted, group // 2)):
            edges = [0, *range(min(first, length), length, group), length]
            pieces += [end - start for start, end in pairwise(edges)]
    return straight, shifted


def _calls(
    q: Tensor, k: Tensor, lengths: Sequence[int], kv_heads_per_call: int, shifted_group: int
) -> list[tuple[slice, list[_Part]]]:
    """KV heads of each call, with the query heads and documents that go with them (several share one KV head)."""
    (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
    if sum(lengths) != tokens or min(lengths) < 1:
        raise IncompatibleError(
            f"documents of {sum(lengths)} tokens in a row of {tokens}", rule="Each has one token or more."
        )
    if heads % kv_heads:
        raise IncompatibleError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    times = heads // kv_heads
    halves = [(0, heads, list(lengths))]
    if shifted_group:
        if heads == 1:
            raise IncompatibleError(
                "shifted attention needs two heads: one attends within groups, one across"
            )
        straight, shifted = shifted_lengths(lengths, shifted_group)
        middle = (kv_heads + 1) // 2 * times if kv_heads > 1 else (heads + 1) // 2
        halves = [(0, middle, straight), (middle, heads, shifted)]
    fitting = max(1, _MAX_ELEMENTS // (tokens * head_dim))  # query heads of one kernel call

    def parts(start: int, end: int, documents: list[int]) -> list[_Part]:
        return [_Part(_span(a, fitting, end), documents) for a in range(start, end, fitting)]

    if kv_heads == 1:
        return [(slice(0, 1), [part for half in halves for part in parts(*half)])]
    together = min(max(1, fitting // times), kv_heads_per_call or kv_heads)
    spans = [
        (_span(a, together, end // times), documents)
        for start, end, documents in halves
        for a in range(start // times, end // times, together)
    ]
    return [(kv, parts(kv.start * times, kv.stop * times, documents)) for kv, documents in spans]


def _span(start: int, most: int, end: int) -> slice:
    return slice(start, min(start + most, end))


def _operand(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy when its last element lies further away than kernels can count."""
    extent = max(size * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.contiguous() if extent > _MAX_ELEMENTS else tensor


def attend_forward(
    kernel: AttentionKernel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float,
    *,
    kv_heads_per_call: int = 0,
    shifted_group: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention within each document; no autograd.

    Args:
        kernel: From `choose_kernel`.
        q: `[tokens, heads, head_dim]`.
        k: `[tokens, kv_heads, head_dim]`.
        v: As `k`.
        lengths: Tokens of each document.
        scale: Factor on the scores.
        kv_heads_per_call: Compute so many KV heads and their query heads at a time, which divides the kernel's
            temporaries; 0: as many as kernels can index.
        shifted_group: Shifted sparse attention, S2-Attn (Chen et al. 2023, arXiv:2309.12307), in groups of so many
            tokens: the first half of the KV heads (the larger, if odd) attends within groups, the second within
            groups shifted by half a group. Unlike there, groups do not wrap around: a document's first and last
            shifted piece are shorter instead, so that causality holds and nothing leaks between documents. With one
            KV head its query heads are halved.
        out: Where to write the output, else it is allocated; as `q`.

    Returns:
        Output, and log-sum-exp `[heads, tokens]`.

    Raises:
        IncompatibleError: Lengths, heads or groups that do not fit together.
        SettingsError: An odd group.
    """
    calls = _calls(q, k, lengths, kv_heads_per_call, shifted_group)
    if len(calls) == 1 and len(calls[0][1]) == 1:
        result, lse = kernel.forward(_operand(q), _operand(k), _operand(v), calls[0][1][0].lengths, scale)
        return (result, lse) if out is None else (out.copy_(result), lse)
    if out is None:
        out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q.dtype))
    for kv, parts in calls:
        key, value = _operand(k[:, kv]), _operand(v[:, kv])
        for part in parts:
            result, sums = kernel.forward(_operand(q[:, part.heads]), key, value, part.lengths, scale)
            out[:, part.heads] = result
            lse[part.heads] = sums
    return out, lse


def attend_backward(
    kernel: AttentionKernel,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    scale: float,
    *,
    kv_heads_per_call: int = 0,
    shifted_group: int = 0,
) -> None:
    """Replace q, k and v by their gradients, in place; no autograd and no second forward pass.

    Args:
        kernel: Any kernel: it need not be the one of the forward pass.
        grad: Slope of `out`, `[tokens, heads, head_dim]`.
        q: As in the forward pass; its gradient afterwards.
        k: As in the forward pass; its gradient afterwards.
        v: As in the forward pass; its gradient afterwards.
        out: What `attend_forward` returned.
        lse: What `attend_forward` returned.
        lengths: As in the forward pass, like the rest.
        scale: Factor on the scores.
        kv_heads_per_call: May differ from the forward pass.
        shifted_group: Must be that of the forward pass.
    """
    calls = _calls(q, k, lengths, kv_heads_per_call, shifted_group)
    _backward(kernel, (grad, q, k, v, out, lse), calls, scale, (q, k, v))


def _backward(
    kernel: AttentionKernel,
    tensors: tuple[Tensor, ...],
    calls: list[tuple[slice, list[_Part]]],
    scale: float,
    targets: Gradients,
) -> None:
    """Write the gradients into `targets`, which are q, k and v themselves or lie elsewhere."""
    grad, q, k, v, out, lse = tensors
    in_place = targets[0] is q
    for kv, parts in calls:
        key, value = _operand(k[:, kv]), _operand(v[:, kv])
        sums: list[Tensor] = []
        for part in parts:
            dq, dk, dv = kernel.backward(
                _operand(grad[:, part.heads]),
                _operand(q[:, part.heads]),
                key,
                value,
                _operand(out[:, part.heads]),
                lse[part.heads],
                part.lengths,
                scale,
                # A KV head that a later part reads again must stay as it is.
                overwrite=in_place and len(parts) == 1,
            )
            _store(dq, targets[0][:, part.heads])
            sums = [total + t for total, t in zip(sums, (dk, dv), strict=True)] if sums else [dk, dv]
        for gradient, target in zip(sums, targets[1:], strict=True):
            _store(gradient, target[:, kv])


def _store(gradient: Tensor, target: Tensor) -> None:
    if gradient.data_ptr() != target.data_ptr():
        target.copy_(gradient)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float,
        kernel: AttentionKernel, kv_heads_per_call: int, shifted_group: int,
    ) -> Tensor:  # fmt: skip
        out, lse = attend_forward(
            kernel, q, k, v, lengths, scale, kv_heads_per_call=kv_heads_per_call, shifted_group=shifted_group
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = lengths, scale, kernel, kv_heads_per_call, shifted_group
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        lengths, scale, kernel, kv_heads_per_call, shifted_group = ctx.settings
        calls = _calls(q, k, lengths, kv_heads_per_call, shifted_group)
        grad = grad.contiguous()  # a sum's slope is one number with strides of zero
        if len(calls) == 1 and len(calls[0][1]) == 1:
            grad, q, k, v, out = (_operand(t) for t in (grad, q, k, v, out))
            gradients = kernel.backward(grad, q, k, v, out, lse, calls[0][1][0].lengths, scale)
        else:
            gradients = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
            _backward(kernel, (grad, q, k, v, out, lse), calls, scale, gradients)
        return (*gradients, None, None, None, None, None)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    scale: float,
    kernel: AttentionKernel,
    *,
    kv_heads_per_call: int = 0,
    shifted_group: int = 0,
) -> Tensor:
    """`attend_forward` with autograd: gradients of q, k and v come from `kernel.backward`.

    This is the attention seam: what spreads a sequence over processes wraps this function. Arguments and errors are
    those of `attend_forward`; q, k and v are kept unchanged for the backward pass.

    Returns:
        `[tokens, heads, head_dim]`.
    """
    out: Tensor = _Attend.apply(q, k, v, list(lengths), scale, kernel, kv_heads_per_call, shifted_group)
    return out
