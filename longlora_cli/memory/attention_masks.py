"""Attention with a mask through `scaled_dot_product_attention`, by kernels that take every shape as it comes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# cuDNN builds a plan for every new number of keys, and while a text is read or answered each pass has another. With the
# choice left to PyTorch 11 answers of 8 tokens about 32K took 5.7 s in one batch on one H100, about 0.6 s a pass, where
# one row alone takes 0.04 s; that plans were the reason is likely, not shown.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend_masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, *, dropout: float = 0.0
) -> Tensor:
    """Attention of queries over the keys that a mask lets them see.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, kv_heads, keys, head_dim]`; heads that share keys are repeated by PyTorch's plain kernel.
        value: As `key`.
        mask: Bool, broadcast to `[batch, heads, queries, keys]`; True where a query sees a key.
        scale: Factor on the scores.
        dropout: Of the probabilities.

    Returns:
        As `query`, with the head_dim of `value`.
    """
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout}
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    with sdpa_kernel(_KERNELS):
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
