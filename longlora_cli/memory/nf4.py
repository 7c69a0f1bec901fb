"""NF4 weights back to numbers, in the layout that a GPU and every CPU agree on.

bitsandbytes 0.50 has two ways of its own on CPUs with AVX-512: `dequantize_4bit` takes blocks of 64 for parts of a row,
which is wrong for rows that are not whole blocks (off by 3.1 at width 96), and a layer in evaluation is packed anew on
CPUs with bf16 instructions, so that its weight no longer holds what its state says. Here a matrix is always read as
rows of one block. NF4: Dettmers et al. 2023 (arXiv:2305.14314).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def dequantized(packed: Tensor, state: Any) -> Tensor:
    """The matrix that bitsandbytes' `quantize_4bit` made into `packed` and `state`, in the state's shape and dtype."""
    from bitsandbytes.functional import dequantize_4bit

    shape = torch.Size(state.shape)
    if packed.is_cuda or shape.numel() % state.blocksize:
        return dequantize_4bit(packed, state).view(shape)
    flat = copy.copy(state)
    flat.shape = torch.Size((shape.numel() // state.blocksize, state.blocksize))
    result: Tensor = dequantize_4bit(packed, flat)
    return result.view(shape)


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers from packing their weights anew for the CPU, by each layer's own switch."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - not declared by nn.Module
