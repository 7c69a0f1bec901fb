"""Final norm, output matrix and loss in one pass over tiles, whose gradient replaces the hidden states in place.

A million tokens of an 8B model's last hidden states take 8 GiB; autograd's norm would keep two float32 copies more
and the loss a gradient beside them (40 GiB). Here a tile is normed, multiplied and differentiated, and its gradient is
written where its hidden states were. Positions without a label cost nothing. The plain twin is the model's norm
followed by `loss.plain_loss`; see `loss.tiled_loss` for the idea's sources.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longlora_cli.memory.elementwise import rms_norm, rms_norm_backward
from longlora_cli.memory.loss import IGNORE, scale_in_place


def normed_loss(
    x: Tensor, norm_weight: Tensor, eps: float, head: Tensor, labels: Tensor, *, tile_tokens: int
) -> tuple[Tensor, Tensor]:
    """Sum of next-token losses of hidden states that are not normed yet.

    Args:
        x: `[tokens, width]`, consumed: when gradients are wanted its memory becomes its gradient's, so nothing else
            may read it afterwards, and backward can run once.
        norm_weight: `[width]` of the final RMS norm.
        eps: Its epsilon.
        head: Output matrix `[vocabulary, width]`.
        labels: `[tokens]`, already shifted; `IGNORE` does not count.
        tile_tokens: Rows of logits held at once.

    Returns:
        Summed loss in nats (float32, float64 for float64) and the number of labels that counted.

    Raises:
        ValueError: If `tile_tokens` is less than 1.
    """
    if tile_tokens < 1:
        raise ValueError(f"tile_tokens is {tile_tokens}, must be at least 1")
    # Without trained weights below, x wants no gradient, but norm and head may.
    total: Tensor = _NormedLoss.apply(x, norm_weight, head, labels, eps, tile_tokens)
    return total, labels.ne(IGNORE).sum()


class _NormedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, head: Tensor, labels: Tensor, eps: float, tile_tokens: int
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            total, norm_grad, head_grad = _pass(
                x, norm_weight, head, labels, eps, tile_tokens, ctx.needs_input_grad[:3]
            )
        ctx.grads = (x if ctx.needs_input_grad[0] else None, norm_grad, head_grad)
        ctx.dtypes = (norm_weight.dtype, head.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.grads = ctx.grads, None
        if found is None:
            raise RuntimeError("normed_loss gave its gradient away in its first backward; it has one only")
        x_grad, norm_grad, head_grad = found
        for value in found:
            if value is not None:
                scale_in_place(value, grads[0])
        return (
            x_grad,
            None if norm_grad is None else norm_grad.to(ctx.dtypes[0]),
            None if head_grad is None else head_grad.to(ctx.dtypes[1]),
            None, None, None,
        )  # fmt: skip


def _pass(
    x: Tensor,
    norm_weight: Tensor,
    head: Tensor,
    labels: Tensor,
    eps: float,
    tile_tokens: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, and gradients of norm and head; `x` becomes its own gradient if any is needed."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm_grad = torch.zeros_like(norm_weight, dtype=wide) if needs[1] else None
    head_grad = torch.zeros_like(head, dtype=wide) if needs[2] else None
    total = torch.zeros((), dtype=wide, device=x.device)
    matrix = head.detach().to(x.dtype)
    counted = labels.ne(IGNORE)
    for rows in counted.nonzero().squeeze(1).split(tile_tokens):
        hidden, target = x[rows], labels[rows]
        normed, rstd = rms_norm(hidden, norm_weight, eps)
        logits = (normed @ matrix.T).to(wide)
        lse = logits.logsumexp(1, keepdim=True)
        total += (lse.squeeze(1) - logits.gather(1, target[:, None]).squeeze(1)).sum()
        if not any(needs):
            continue
        slope = logits.sub_(lse).exp_()  # softmax, in the logits' own memory
        slope.scatter_add_(1, target[:, None], slope.new_full((len(rows), 1), -1.0))
        slope = slope.to(x.dtype)
        del logits
        if head_grad is not None:
            head_grad += slope.T @ normed
        if needs[0] or norm_grad is not None:
            grad = torch.zeros_like(hidden)
            rms_norm_backward(slope @ matrix, hidden, norm_weight, rstd, grad, norm_grad)
            if needs[0]:
                x[rows] = grad
    if needs[0]:
        x.masked_fill_(~counted[:, None], 0.0)
    return total, norm_grad, head_grad
