"""Next-token loss without ever holding all logits.

At 32,768 tokens and a vocabulary of 128,256 the float32 logits of one sequence take 15.7 GiB; a tile of 4,096 tokens
takes 2.0 GiB and is gone before the next. The gradient is computed in the forward pass, while a tile's logits exist,
and tokens whose label is masked are left out before the matrix product. Idea: Luo et al. 2024, Mini-Sequence
Transformer (arXiv:2407.15892); the gradient in forward: Hsu et al. 2024, Liger Kernel (arXiv:2410.10989). The plain
twin is `plain_loss`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

IGNORE = -100
# Rows of a head's gradient whose 16-bit product exists at one time: 134 MB at a width of 4,096.
_HEAD_ROWS = 16_384
# Outputs a model scales or caps between head and softmax; such models keep their own loss.
_LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What `tiled_loss` computes, with all logits at once: summed loss in nats and count of labels."""
    logits = hidden @ weight.T
    total = nn.functional.cross_entropy(
        logits.float() if logits.dtype != torch.float64 else logits,
        labels,
        ignore_index=IGNORE,
        reduction="sum",
    )
    return total, labels.ne(IGNORE).sum()


def tiled_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, tile_tokens: int) -> tuple[Tensor, Tensor]:
    """Sum the next-token losses, `tile_tokens` rows of logits at a time.

    Args:
        hidden: Last hidden states `[tokens, width]`.
        weight: Output embedding `[vocabulary, width]`; a frozen one costs no gradient memory.
        labels: `[tokens]`, already shifted; positions equal to `IGNORE` do not count.
        tile_tokens: Rows of logits held at once.

    Returns:
        Summed loss in nats (float32, or float64 for float64 input) and the number of labels that counted. Divide
        after all batches and ranks are added, never before.

    Raises:
        ValueError: If `tile_tokens` is less than 1.
    """
    if tile_tokens < 1:
        raise ValueError(f"tile_tokens is {tile_tokens}, must be at least 1")
    total: Tensor = _TiledLoss.apply(hidden, weight, labels, tile_tokens)
    return total, labels.ne(IGNORE).sum()


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, tile_tokens: int) -> Tensor:
        dtype = _compute_dtype(hidden, weight)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=_sum_dtype(dtype)) if needs_weight else None
        total = torch.zeros((), dtype=_sum_dtype(dtype), device=hidden.device)
        head = weight.to(dtype)
        counted = labels.ne(IGNORE).nonzero().squeeze(1)
        for rows in counted.split(tile_tokens):
            x, target = hidden[rows].to(dtype), labels[rows]
            logits = (x @ head.T).to(_sum_dtype(dtype))
            lse = logits.logsumexp(1, keepdim=True)
            total += (lse.squeeze(1) - logits.gather(1, target[:, None]).squeeze(1)).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            slope = logits.sub_(lse).exp_()  # softmax, in the logits' own memory
            slope.scatter_add_(1, target[:, None], slope.new_full((len(rows), 1), -1.0))
            slope = slope.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (slope @ head).to(hidden.dtype)
            if grad_weight is not None:
                _add_outer(grad_weight, slope, x)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # In place: the gradients are ours alone, and a second copy of a head's is 2 GiB at 128,256 x 4,096 in float32.
        # A second backward through the same graph is refused by autograd, which sees that they changed.
        grad_hidden, grad_weight = ctx.saved_tensors
        for values in (grad_hidden, grad_weight):
            if values is not None:
                scale_in_place(values, grad)
        return grad_hidden, None if grad_weight is None else grad_weight.to(ctx.weight_dtype), None, None


def scale_in_place(values: Tensor, factor: Tensor) -> None:
    """Multiply `[rows, width]` or `[width]` in the factor's precision: 1 / tokens in bf16 is wrong by up to 0.4 %."""
    if values.dtype == factor.dtype:
        values.mul_(factor)
        return
    for rows in values.split(4096):
        rows.copy_(rows.to(factor.dtype) * factor)


def _add_outer(total: Tensor, slope: Tensor, x: Tensor) -> None:
    """`total += slope.T @ x` in place, `[vocabulary, width]`, without a product of that size beside it."""
    if total.dtype == slope.dtype:
        total.addmm_(slope.T, x)
        return
    # 16-bit products are added to a float32 sum, which no one kernel does: a few rows of the vocabulary at a time.
    for rows, part in zip(total.split(_HEAD_ROWS), slope.split(_HEAD_ROWS, dim=1), strict=True):
        rows += part.T @ x


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The lower of the two precisions, as autocast would choose for the product."""
    return min(hidden.dtype, weight.dtype, key=lambda d: torch.finfo(d).bits)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, *, tile_tokens: int) -> Tensor:
    """Loss of each token in nats, float32 `[tokens]`; 0 where the label is masked. Arguments as `tiled_loss`."""
    dtype = _compute_dtype(hidden, weight)
    losses = torch.zeros(labels.shape[0], dtype=_sum_dtype(dtype), device=hidden.device)
    head = weight.to(dtype)
    for rows in labels.ne(IGNORE).nonzero().squeeze(1).split(tile_tokens):
        logits = (hidden[rows].to(dtype) @ head.T).to(_sum_dtype(dtype))
        losses[rows] = nn.functional.cross_entropy(logits, labels[rows], reduction="none")
    return losses


def head_weight(model: nn.Module) -> Tensor | None:
    """The output embedding `[vocabulary, width]` in use.

    None when logits are not simply `hidden @ weight.T`: a bias, an adapter on the head, or scaled or capped logits.
    """
    config: Any = model.config
    if any(getattr(config, name, None) for name in _LOGIT_SETTINGS):
        return None
    head = model.get_output_embeddings()  # type: ignore[operator]
    saved = getattr(head, "modules_to_save", None)
    if saved is not None:  # PEFT keeps the trained copy beside the original
        head = saved[head.active_adapters[0]]
    if not isinstance(head, nn.Linear) or head.bias is not None or hasattr(head, "lora_A"):
        return None
    weight: Tensor = head.weight
    return weight


def use_tiled_loss(model: nn.Module, tile_tokens: int) -> Callable[[], None]:
    """Let one causal LM instance compute its training loss in tiles.

    Only calls with `labels` change; they return the loss and no logits. The class is not touched.

    Args:
        model: A transformers causal LM, not a PEFT wrapper (give it `peft_model.get_base_model()`).
        tile_tokens: Rows of logits held at once.

    Returns:
        A function that undoes it. Models that scale or cap their logits, or whose head is more than a matrix, are
        left as they are and compute their own loss.
    """
    if head_weight(model) is None:
        return lambda: None
    original = model.forward

    @functools.wraps(original)
    def forward(
        *args: Any, labels: Tensor | None = None, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if labels is None:
            return original(*args, **kwargs)
        decoder: Any = model.get_decoder()  # type: ignore[operator]
        hidden = decoder(*args, **kwargs | {"use_cache": False})[0]
        weight = head_weight(model)
        assert weight is not None  # checked when it was installed
        width = hidden.shape[-1]
        total, count = tiled_loss(
            hidden[:, :-1].reshape(-1, width), weight, labels[:, 1:].reshape(-1), tile_tokens=tile_tokens
        )
        divisor = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutputWithPast(loss=total / divisor)

    model.forward = forward

    def undo() -> None:
        del model.forward  # the class's own shows again

    return undo
