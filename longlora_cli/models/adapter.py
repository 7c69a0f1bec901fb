"""Low-rank adapters in PEFT's format: attach, save, load.

An adapter folder holds PEFT's two files, the tokenizer, and `longlora.json` (`AdapterRecord`), without which a later
load would silently use the base's positions. Methods: LoRA, Hu et al. 2021 (arXiv:2106.09685); rsLoRA, Kalajdzievski
2023 (arXiv:2312.03732); DoRA, Liu et al. 2024 (arXiv:2402.09353); PiSSA, Meng et al. 2024 (arXiv:2404.02948); training
norms and embeddings beside LoRA, Chen et al. 2023, LongLoRA (arXiv:2309.12307).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from longlora_cli.errors import IncompatibleError, SettingsError
from longlora_cli.models.source import RECORD, AdapterRecord
from longlora_cli.sections import AdapterSection


def attach(model: Any, section: AdapterSection, *, quantization: str) -> Any:
    """Put a fresh adapter on a base and freeze everything else.

    Args:
        model: A transformers causal LM.
        section: Kind, rank, targets, and what else is trained.
        quantization: How the base is held; PiSSA needs it unquantized.

    Returns:
        The PEFT model. Trainable tensors are float32: an update of 2e-4 would be rounded away in bf16.

    Raises:
        SettingsError: A target that no linear layer is named after, or PiSSA on quantized weights.
    """
    from peft import LoraConfig, get_peft_model

    if section.adapter == "pissa" and quantization != "none":
        raise SettingsError(
            f"--adapter pissa cannot start from {quantization} weights",
            rule="It splits the original matrices by their singular values.",
            hint="Give --quantization none, or --adapter lora.",
        )
    linear = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = section.lora_targets
    if targets != ["all"] and (unknown := sorted(set(targets) - linear)):
        raise SettingsError(
            f"--lora-targets {','.join(unknown)}: no linear layer has this name",
            hint=f"This model has {', '.join(sorted(linear))}.",
        )
    alpha = section.lora_alpha if section.lora_alpha is not None else 2 * section.lora_rank
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.lora_rank,
        lora_alpha=alpha,
        lora_dropout=section.lora_dropout,
        target_modules="all-linear" if targets == ["all"] else sorted(targets),
        use_rslora=section.adapter == "rslora",
        use_dora=section.adapter == "dora",
        init_lora_weights="pissa" if section.adapter == "pissa" else True,
        modules_to_save=_also_trained(model, section.also_train) or None,
        # A tied head must follow the trained embedding, not keep the frozen one.
        ensure_weight_tying=section.also_train == "all" and bool(model.config.tie_word_embeddings),
    )
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def _also_trained(model: Any, choice: str) -> list[str]:
    """Module names, without their layer, that are trained whole."""
    if choice == "none":
        return []
    norms = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m).__name__.endswith("Norm")}
    if choice == "norms":
        return sorted(norms)
    embeddings = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        embeddings.append(model.get_output_embeddings())
    names = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if any(m is e for e in embeddings)}
    return sorted(norms | names)


def save(model: Any, tokenizer: Any, record: AdapterRecord, folder: Path) -> None:
    """Write an adapter into a staging folder: PEFT's files, the tokenizer and the record."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = record.base
        config.inference_mode = True
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    for config in model.peft_config.values():
        config.inference_mode = False
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    save_companions(tokenizer, record, folder)


def save_companions(tokenizer: Any, record: AdapterRecord, folder: Path) -> None:
    """Write the tokenizer and the record into a staging folder: what nothing trained must be separated from."""
    tokenizer.save_pretrained(str(folder))
    (folder / RECORD).write_text(record.to_json(), encoding="utf-8")


def load(model: Any, folder: Path, *, trainable: bool) -> Any:
    """Put a saved adapter on its base.

    Args:
        model: The base, built with the adapter's positions.
        folder: Adapter or checkpoint folder.
        trainable: Continue training it (float32), or only use it (the base's dtype).

    Raises:
        IncompatibleError: A tensor of the file has no place in the model, or the model has one the file lacks.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors import safe_open

    dtype = model.get_input_embeddings().weight.dtype
    wrapped = PeftModel.from_pretrained(
        model, str(folder), is_trainable=trainable, autocast_adapter_dtype=trainable
    )
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        saved = set(file.keys())
    placed = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if saved != placed:
        first = sorted(saved ^ placed)[0]
        side = "the model has no place for" if first in saved else "the adapter lacks"
        raise IncompatibleError(f"{folder} does not fit its base: {side} {first}")
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = parameter.data.to(torch.float32 if trainable else dtype)
    return wrapped
