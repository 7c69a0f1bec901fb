"""PyTorch's CUDA attention kernels, called below autograd: cuDNN, FlashAttention-2 and memory-efficient attention.

The operators are private to PyTorch, but they are what `scaled_dot_product_attention` and `varlen_attn` dispatch to and
what autograd's own formulas call (`derivatives.yaml`), with the same arguments in the same order. They are called below
autograd because only there they take and give log-sum-exp, so that a backward pass needs no second forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor, nn

from longlora_cli.memory.attention_documents import Gradients, PerDocument, repeat_heads, sum_heads

_ATEN = torch.ops.aten
# cuDNN builds a plan for every new shape (tens of milliseconds); documents are padded at their end to a multiple of
# this, which a causal mask makes harmless, so that a 32K context needs at most 64 plans.
CUDNN_BUCKET = 512
# Memory-efficient attention reads log-sum-exp in rows whose length is a multiple of this.
_EFFICIENT_LSE_ROW = 32
# Its number for a causal mask aligned to the first query and the first key.
_EFFICIENT_CAUSAL = 1


@lru_cache(maxsize=16)
def document_starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where documents start, and the end: int32 `[documents + 1]` on the device.

    Kept for the last packings, because every layer of a step asks for the same one and a copy to a GPU waits.
    """
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


class CudnnKernel(PerDocument):
    """cuDNN's fused attention: the fastest within PyTorch on Hopper; takes fewer KV heads than query heads."""

    name = "cudnn"

    def _run_forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        tokens = q.shape[2]
        query, key, value = (_padded(t, CUDNN_BUCKET) for t in (q, k, v))
        out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention.default(
            query, key, value, None, True, 0.0, True, False, scale=scale
        )
        # [count, heads, tokens, 1] or, in other versions, without the last dimension.
        return out[:, :, :tokens], lse.reshape(lse.shape[:3])[:, :, :tokens]

    def _run_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Gradients:
        tokens = q.shape[2]
        grad, query, key, value, out = (_padded(t, CUDNN_BUCKET) for t in (grad, q, k, v, out))
        # Padded queries have scores of 0 and a log-sum-exp of 0: probabilities of 1, finite, which their zero slope
        # multiplies away.
        lse = nn.functional.pad(lse, (0, query.shape[2] - tokens)).contiguous()
        if _cudnn_lse_dimensions(q.device) == 4:
            lse = lse[..., None]
        # Random state of the dropout that is not used; on Blackwell the operator converts it, so it must exist.
        random = torch.zeros((), dtype=torch.int64, device=q.device)
        padded_tokens = query.shape[2]
        dq, dk, dv = _ATEN._scaled_dot_product_cudnn_attention_backward.default(
            grad, query, key, value, out, lse, random, random, None, None, None,
            padded_tokens, padded_tokens, 0.0, True, scale=scale,
        )  # fmt: skip
        return dq[:, :, :tokens], dk[:, :, :tokens], dv[:, :, :tokens]


@lru_cache(maxsize=8)
def _cudnn_lse_dimensions(device: torch.device) -> int:
    """How many dimensions this PyTorch's cuDNN log-sum-exp has: asked of a forward pass of one small block."""
    block = torch.zeros(1, 1, 128, 64, dtype=torch.float16, device=device)
    result = _ATEN._scaled_dot_product_cudnn_attention.default(
        block, block, block, None, True, 0.0, True, False, scale=1.0
    )
    return int(result[1].dim())


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    """`[count, heads, tokens, head_dim]` with zero tokens at the end; tokens stay the outer dimension in memory."""
    extra = -tensor.shape[2] % multiple
    if not extra:
        return tensor
    return nn.functional.pad(tensor.transpose(1, 2), (0, 0, 0, 0, 0, extra)).transpose(1, 2)


class FlashKernel:
    """FlashAttention-2 (Dao 2023, arXiv:2307.08691) as PyTorch carries it: all documents in one call; Ampere on."""

    name = "flash"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `AttentionKernel.forward`."""
        return self.forward_over(q, k, v, lengths, lengths, scale)

    def forward_over(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        key_lengths: Sequence[int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        """See `attention_over_keys.OverKeys`."""
        starts, longest = document_starts(tuple(lengths), q.device), max(lengths)
        key_starts, longest_keys = document_starts(tuple(key_lengths), q.device), max(key_lengths)
        out, lse, *_ = _ATEN._flash_attention_forward.default(
            q, k, v, starts, key_starts, longest, longest_keys, 0.0, True, False, scale=scale
        )
        return out, lse

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
        return self.backward_over(grad, q, k, v, out, lse, lengths, lengths, scale)

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
        """See `attention_over_keys.OverKeys`."""
        starts, longest = document_starts(tuple(lengths), q.device), max(lengths)
        key_starts, longest_keys = document_starts(tuple(key_lengths), q.device), max(key_lengths)
        # Random state of the dropout that is not used.
        random, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        dq, dk, dv = _ATEN._flash_attention_backward.default(
            grad, q, k, v, out, lse, starts, key_starts, longest, longest_keys, 0.0, True, random, unused,
            scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class EfficientKernel(PerDocument):
    """Memory-efficient attention (Rabe & Staats 2021, arXiv:2112.05682; xFormers): float32 and GPUs before Ampere.

    Keys and values are repeated for the query heads that share them.
    """

    name = "efficient"

    def _run_forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        times = q.shape[1] // k.shape[1]
        query, key, value = (t.transpose(1, 2) for t in (q, repeat_heads(k, times), repeat_heads(v, times)))
        out, lse, *_ = _ATEN._efficient_attention_forward.default(
            query, key, value, None, None, None, None, None, 0.0, _EFFICIENT_CAUSAL, True, scale=scale
        )
        return out.transpose(1, 2), lse[:, :, : q.shape[2]]

    def _run_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Gradients:
        times, tokens = q.shape[1] // k.shape[1], q.shape[2]
        grad, query, key, value, out = (
            t.transpose(1, 2) for t in (grad, q, repeat_heads(k, times), repeat_heads(v, times), out)
        )
        # The forward pass fills the rest of a row with infinity, which makes its probabilities zero.
        lse = nn.functional.pad(lse, (0, -tokens % _EFFICIENT_LSE_ROW), value=float("inf")).contiguous()
        random = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = _ATEN._efficient_attention_backward.default(
            grad, query, key, value, None, out.contiguous(), None, None, tokens, tokens, lse,
            0.0, random, random, _EFFICIENT_CAUSAL, False, scale=scale,
        )  # fmt: skip
        dq, dk, dv = (t.transpose(1, 2) for t in (dq, dk, dv))
        return dq, sum_heads(dk, times), sum_heads(dv, times)
