"""A tiny random model on disk, for tests that need another seed, family or setting."""

from __future__ import annotations

from pathlib import Path

import torch


def make_tiny_model(
    folder: Path, tokenizer_folder: Path, *, seed: int = 0, family: str = "llama", **changes: object
) -> Path:
    """A 2-layer random decoder of 64 hidden units with a 128-token context, saved beside its tokenizer."""
    import shutil

    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    torch.manual_seed(seed)
    kinds = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    settings = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = kinds[family](**{**settings, **changes})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for path in tokenizer_folder.iterdir():
        shutil.copy(path, folder)
    return folder
