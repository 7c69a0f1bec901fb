"""Base weights as a quantized run saw them: quantized and dequantized again by bitsandbytes, in blocks of rows.

An adapter that was trained over NF4 or int8 weights learnt to correct those, not the original ones. Which linear
layers are quantized follows transformers' bitsandbytes integration: all but the output head. The block size of 64 and
the double quantization are those of `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
bnb_4bit_use_double_quant=True)` (Dettmers et al. 2023, QLoRA, arXiv:2305.14314).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from longlora_cli.memory.nf4 import dequantized
from longlora_cli.models.tensors import StoredTensor, blocks, matrix_shape

Quantization = Literal["none", "nf4", "int8"]
_NF4_BLOCK = 64


@dataclass(frozen=True)
class Seen:
    """How a run held its base.

    Args:
        quantization: Of the linear layers.
        dtype: What the weights were loaded in before they were quantized.
    """

    quantization: Quantization
    dtype: torch.dtype


ORIGINAL = Seen("none", torch.float32)


class Nf4Rows:
    """The NF4 version of a stored matrix, equal bit for bit to quantizing it whole.

    The second quantization needs the scales of all blocks, so the matrix is read twice: once for its scales (1/64 of
    its size), then for its rows.
    """

    def __init__(self, tensor: StoredTensor, dtype: torch.dtype) -> None:
        import bitsandbytes.functional as bnb

        self._tensor, self._dtype, self.shape = tensor, dtype, matrix_shape(tensor.shape)
        scales = torch.cat([self._quantize(*block)[1].absmax for block in blocks(self.shape)])
        offset = scales.mean()
        packed, state = bnb.quantize_blockwise(scales - offset, blocksize=256)
        self._scales = bnb.dequantize_blockwise(packed, state) + offset

    def _quantize(self, first: int, last: int) -> tuple[Tensor, Any]:
        import bitsandbytes.functional as bnb

        rows = self._tensor.read(first, last).to(self._dtype)
        packed, state = bnb.quantize_4bit(
            rows, blocksize=_NF4_BLOCK, compress_statistics=False, quant_type="nf4"
        )
        return packed, state

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive), `[last - first, columns]` in float64."""
        packed, state = self._quantize(first, last)
        begin = first * self.shape[1] // _NF4_BLOCK  # whole: blocks start at multiples of 64 values
        state.absmax = self._scales[begin : begin + len(state.absmax)].contiguous()
        block = dequantized(packed, state)
        return block.view(last - first, self.shape[1]).double()


class Int8Rows:
    """The LLM.int8 version of a stored matrix: one scale a row (Dettmers et al. 2022, arXiv:2208.07339)."""

    def __init__(self, tensor: StoredTensor, dtype: torch.dtype) -> None:
        self._tensor, self._dtype, self.shape = tensor, dtype, matrix_shape(tensor.shape)

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive), `[last - first, columns]` in float64."""
        return int8_round_trip(self._tensor.read(first, last).to(self._dtype))


def int8_round_trip(rows: Tensor) -> Tensor:
    """Quantize each row to int8 and back; float64 `[rows, columns]`. bitsandbytes reads the rows as float16."""
    import bitsandbytes.functional as bnb

    codes, scales, _ = bnb.int8_vectorwise_quant(rows.half())
    matrix: Tensor = codes.double() * (scales.double()[:, None] / 127)
    return matrix


def nf4_round_trip(matrix: Tensor) -> Tensor:
    """Quantize a whole matrix to NF4 with double quantization and back, in its own dtype."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        matrix, blocksize=_NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return dequantized(packed, state).view_as(matrix)


def quantized_rows(tensor: StoredTensor, seen: Seen) -> Nf4Rows | Int8Rows:
    """The rows of a linear layer as a run with these settings computed with them."""
    return Nf4Rows(tensor, seen.dtype) if seen.quantization == "nf4" else Int8Rows(tensor, seen.dtype)
