"""A model with the shape of Llama-3.1-8B and random weights: written to a folder, or built on the GPU in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

_DEVIATION = 0.02


def llama8b_config(layers: int) -> Any:
    """Llama-3.1-8B's sizes with positions for two million tokens; 0 layers are all 32."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers or 32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=2**21,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e8},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def make_llama8b(folder: Path, device: torch.device, layers: int) -> None:
    """Write it in bf16, for stacks that load a folder."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(llama8b_config(layers), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def quantized_in_memory(config: Any, device: torch.device, attention: str, quantizer: Any) -> Any:
    """An NF4 model of this configuration with random weights, each linear layer quantized as soon as it is drawn.

    Loading a folder reads 16 GB; this takes seconds and never holds more than one layer in bf16.

    Args:
        config: Of a model from the Auto classes.
        device: Where it is built.
        attention: transformers' name of the attention function.
        quantizer: `BitsAndBytesConfig`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    torch.manual_seed(0)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    model = replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantizer)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, _drawn(parameter, module, leaf, device, quantizer))
    backbone = model.get_decoder()
    with device:  # buffers are computed, not loaded
        backbone.rotary_emb = type(backbone.rotary_emb)(config=config)
    model.config.quantization_config = quantizer
    model.is_loaded_in_4bit, model.is_quantized = True, True
    return model.eval()


def _drawn(meta: nn.Parameter, module: nn.Module, leaf: str, device: torch.device, quantizer: Any) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    if meta.ndim == 1:
        return nn.Parameter(torch.ones(meta.shape, dtype=torch.bfloat16, device=device), requires_grad=False)
    quantized = isinstance(module, Linear4bit) and leaf == "weight"
    # On the meta device a quantized weight already has its packed shape.
    shape = (module.out_features, module.in_features) if quantized else meta.shape
    values = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=_DEVIATION)
    if not quantized:
        return nn.Parameter(values, requires_grad=False)
    return Params4bit(
        values,
        requires_grad=False,
        compress_statistics=quantizer.bnb_4bit_use_double_quant,
        quant_type=quantizer.bnb_4bit_quant_type,
        module=module,
    ).to(device)
