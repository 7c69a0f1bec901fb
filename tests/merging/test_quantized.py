"""A run over NF4 or int8 weights is merged into the base it saw."""

from __future__ import annotations

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from longlora_cli.errors import SettingsError
from longlora_cli.memory.nf4 import dequantized, keep_layout
from longlora_cli.merging.quantized import Int8Rows, Nf4Rows, int8_round_trip, nf4_round_trip
from longlora_cli.models.tensors import BLOCK_ELEMENTS, open_folder

KINDS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(96, 64), (100, 30), (3, 5), (1, 7), (40_000, 96)])
def test_nf4_by_blocks_equals_nf4_of_the_whole_matrix(tmp_path, dtype, shape):
    assert shape[0] * shape[1] > BLOCK_ELEMENTS or shape[0] < 40_000  # the last shape needs several blocks
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"w": matrix}, tmp_path / "model.safetensors")
    rows = Nf4Rows(open_folder(tmp_path).tensors["w"], dtype)
    step = 10_944  # a multiple of 64
    parts = [rows.rows(a, min(a + step, shape[0])) for a in range(0, shape[0], step)]
    packed, state = bnb.quantize_4bit(matrix, compress_statistics=True, quant_type="nf4")

    assert torch.equal(torch.cat(parts), dequantized(packed, state).double().view(shape))
    assert torch.equal(torch.cat(parts), nf4_round_trip(matrix).double())


def test_int8_by_blocks_equals_int8_of_the_whole_matrix(tmp_path):
    matrix = torch.randn(130, 32, generator=torch.Generator().manual_seed(0))
    save_file({"w": matrix}, tmp_path / "model.safetensors")
    rows = Int8Rows(open_folder(tmp_path).tensors["w"], torch.float32)
    assert torch.equal(torch.cat([rows.rows(0, 64), rows.rows(64, 130)]), int8_round_trip(matrix))


def test_int8_rows_are_those_of_bitsandbytes():
    matrix = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    codes, scales, _ = bnb.int8_vectorwise_quant(matrix.half())
    expected = bnb.int8_vectorwise_dequant(codes, scales)
    torch.testing.assert_close(int8_round_trip(matrix).float(), expected, rtol=1e-6, atol=0)


def trained_over_nf4(adapter, base):
    """What training holds: transformers' 4-bit linear layers, PEFT's adapter."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    keep_layout(model)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def divergence(trained: torch.Tensor, merged: torch.Tensor) -> float:
    return float(
        torch.nn.functional.kl_div(
            merged.double().log_softmax(-1),
            trained.double().log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging_into_the_dequantized_base_gives_the_trained_model(
    make_base, make_adapter, merge, load_plain, logits, tied, kind
):
    # 128: bitsandbytes' own CPU layers are wrong where rows are not whole blocks of 64, see memory/nf4.py.
    base = make_base(tie_word_embeddings=tied, intermediate_size=128)
    adapter = make_adapter(base, quantization="nf4", **kind)
    trained = logits(trained_over_nf4(adapter, base))
    faithful, result = merge(adapter)
    original, other = merge(adapter, base_weights="original")

    assert result["base_weights"] == "dequantized nf4"
    assert other["base_weights"] == "original"
    to_faithful = divergence(trained, logits(load_plain(faithful)))
    to_original = divergence(trained, logits(load_plain(original)))
    assert to_faithful <= 1e-5
    assert to_original > 100 * max(to_faithful, 1e-8)


def test_only_linear_layers_but_the_head_are_quantized(make_base, make_adapter, merge):
    base = make_base(tie_word_embeddings=False)
    merged, _ = merge(make_adapter(base, quantization="nf4", target_modules=["q_proj"]))
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "proj" not in name}


def test_int8_runs_are_merged_into_the_dequantized_base(make_base, make_adapter, merge, load_plain, logits):
    base = make_base()
    adapter = make_adapter(base, quantization="int8", target_modules=["q_proj"])
    merged, result = merge(adapter)
    stored = load_file(base / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    found = load_file(merged / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]

    assert result["base_weights"] == "dequantized int8"
    torch.testing.assert_close(found, int8_round_trip(stored).float(), rtol=1e-6, atol=0)
    assert not torch.equal(found, stored)


def test_what_a_bf16_run_saw_is_what_is_merged(make_base, make_adapter, merge):
    base = make_base(dtype=torch.bfloat16)
    merged, _ = merge(make_adapter(base, quantization="nf4", dtype="bf16", target_modules=["q_proj"]))
    name = "model.layers.1.mlp.down_proj.weight"
    expected = nf4_round_trip(load_file(base / "model.safetensors")[name])
    assert torch.equal(load_file(merged / "model.safetensors")[name], expected)


def test_unquantized_runs_have_no_dequantized_base(make_base, make_adapter, merge):
    with pytest.raises(SettingsError, match="trained with none"):
        merge(make_adapter(make_base()), base_weights="dequantized")


def test_adapters_of_differently_quantized_runs_use_the_original_base_and_say_so(
    make_base, make_adapter, merge
):
    base = make_base()
    pair = [make_adapter(base, quantization="nf4"), make_adapter(base, seed=1)]
    _, result = merge(*pair)
    assert result["base_weights"] == "original"
    assert any("different bases" in note for note in result["notes"])
    assert math.isfinite(result["probe"]["kl"])
