"""NF4 matrices come back the same on every CPU, whatever their width."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from longlora_cli.memory.nf4 import dequantized, keep_layout


@pytest.mark.parametrize("shape", [(64, 96), (40, 64), (2, 32), (7, 13)])
@pytest.mark.parametrize("nested", [True, False])
def test_each_value_is_its_code_times_the_scale_of_its_block(shape: tuple[int, int], nested: bool) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.quantize_4bit(matrix, compress_statistics=nested, quant_type="nf4")
    scales = state.absmax
    if nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: matrix.numel()]
    expected = state.code[codes.long()] * scales.repeat_interleave(64)[: matrix.numel()]
    found = dequantized(packed, state)
    assert found.shape == matrix.shape
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-6, atol=0)


def test_a_layer_that_was_evaluated_still_holds_its_own_numbers() -> None:
    layer = bnb_layer()
    before = dequantized(layer.weight.data, layer.weight.quant_state)
    keep_layout(layer)
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(3, 64))
    assert torch.equal(dequantized(layer.weight.data, layer.weight.quant_state), before)


def bnb_layer() -> torch.nn.Module:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 128, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    return layer.to("cpu")
