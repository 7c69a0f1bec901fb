"""Tiny bases, adapters as training leaves them, and a way to read logits."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from longlora_cli.config import MergeConfig
from longlora_cli.console import Console, quiet_libraries
from longlora_cli.models import adapter as adapters
from longlora_cli.models.rope import RopeRecord
from longlora_cli.models.source import AdapterRecord, fingerprint
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.storage import atomic_folder

quiet_libraries()
IDS = torch.randint(512, (1, 48), generator=torch.Generator().manual_seed(7))
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Callable[..., Path]:
    """Save a random 2-layer decoder with its tokenizer; `family`, `seed`, `dtype` and config changes by keyword."""
    made: dict[str, Path] = {}

    def make(
        seed: int = 0, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any
    ) -> Path:
        key = f"{seed} {family} {dtype} {changes}"
        if key in made:
            return made[key]
        sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
        kind = {"llama": LlamaConfig, "qwen2": Qwen2Config}[family]
        torch.manual_seed(seed)
        config = kind(**{**sizes, "tie_word_embeddings": True, "initializer_range": 0.1, **changes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        folder = tmp_path_factory.mktemp(f"{family}-{seed}")
        model.to(dtype).save_pretrained(folder)
        for path in tiny_tokenizer_folder.iterdir():
            shutil.copy(path, folder)
        made[key] = folder
        return folder

    return make


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Put a random adapter on a base and save it as training does; PEFT's settings by keyword."""
    count = 0

    def make(
        base: Path,
        *,
        seed: int = 0,
        rope: dict[str, Any] | None = None,
        length: int = 128,
        quantization: str = "none",
        dtype: str = "fp32",
        size: float = 0.1,
        **settings: Any,
    ) -> Path:
        nonlocal count
        count += 1
        torch.manual_seed(100 + seed)
        config = AutoConfig.from_pretrained(base)
        record = RopeRecord(rope or dict(config.rope_parameters), length)
        record.apply(config)
        model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
        plain = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": LINEAR}
        wrapped = get_peft_model(model, LoraConfig(**{**plain, **settings}))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * size
        folder = tmp_path / f"adapter-{count}"
        kept = AdapterRecord(str(base), fingerprint(base), record.to_json(), quantization, dtype, length)
        with atomic_folder(folder, "adapter") as staging:
            adapters.save(wrapped, load_tokenizer(base), kept, staging)
        return folder

    return make


@pytest.fixture
def load_plain() -> Callable[[Path], Any]:
    """transformers alone, float32."""
    return lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def load_adapted() -> Callable[..., Any]:
    """The adapter on its base through PEFT, float32, with the positions of its record.

    `untie` parts the head from the embedding first: merging in memory, PEFT would change both through one tensor.
    """

    def load(adapter: Path, *, untie: bool = False) -> Any:
        record = AdapterRecord.read(adapter)
        assert record is not None
        config = AutoConfig.from_pretrained(record.base)
        RopeRecord.from_json(record.rope).apply(config)
        model = AutoModelForCausalLM.from_pretrained(record.base, config=config, dtype=torch.float32)
        if untie:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.config.tie_word_embeddings = False
        return PeftModel.from_pretrained(model, str(adapter)).eval()

    return load


@pytest.fixture
def logits() -> Callable[..., torch.Tensor]:
    """Logits `[tokens, vocabulary]` of a fixed text, at consecutive positions or `spread` apart."""

    def compute(model: Any, spread: int = 1) -> torch.Tensor:
        with torch.no_grad():
            positions = torch.arange(IDS.shape[1])[None] * spread
            mask = torch.ones_like(IDS)
            return model(IDS, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]

    return compute


@pytest.fixture
def merge(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Run the command; the folder and its result."""
    from longlora_cli.commands.merge import run

    count = 0

    def call(*sources: Path | str, dry_run: bool = False, **settings: Any) -> tuple[Path, dict[str, Any]]:
        nonlocal count
        count += 1
        out = settings.pop("out", tmp_path / f"merged-{count}")
        config = MergeConfig(sources=[str(s) for s in sources], out=out, **settings)
        return out, run(config, Console(json_mode=True), dry_run=dry_run)

    return call
