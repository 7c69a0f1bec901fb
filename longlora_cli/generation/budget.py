"""What a conversation will take, known before any weight is loaded and before any token is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longlora_cli.errors import ResourceError
from longlora_cli.models.loading import ModelFacts, choose_device
from longlora_cli.models.rope import RopeRecord, extend
from longlora_cli.models.source import ModelSource, base_folder, resolve
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.sections import ModelSection, RopeSection

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Bytes of a weight with its scales; embeddings and norms, which stay in 16 bits, are not told apart here.
_QUANTIZED_BYTES = {"nf4": 0.52, "int8": 1.0}


@dataclass(frozen=True)
class ModelOutline:
    """A model without its weights.

    Args:
        source: Base and adapter.
        tokenizer: The one that `load_model` will give.
        facts: Sizes of the decoder.
        context_length: Tokens it can be asked to read.
        positions: Positions it would be built with.
        device: Where it would compute.
        element_bytes: Bytes of a key's or value's number.
        weights_bytes: About what the weights will take.
    """

    source: ModelSource
    tokenizer: Any
    facts: ModelFacts
    context_length: int
    positions: int
    device: torch.device
    element_bytes: int
    weights_bytes: int


def outline_model(
    section: ModelSection, rope: RopeSection, *, adapter: Path | None, context_length: int | None
) -> ModelOutline:
    """Find a model and read its config and tokenizer, in the way `load_model` will.

    Raises:
        NotFoundError, DataError, SecurityError, IntegrityError: As `load_model`.
        SettingsError: Positions that cannot be stretched as asked.
    """
    from transformers import AutoConfig

    source = resolve(section.model, adapter)
    folder = base_folder(source.base)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    facts = ModelFacts.of(config)
    if source.record is not None:
        length = source.record.context_length
        positions = RopeRecord.from_json(source.record.rope).max_position_embeddings
    else:
        positions = extend(
            RopeRecord.of(config), rope, context_length, facts.head_dim
        ).max_position_embeddings
        length = positions
    has_tokenizer = source.adapter is not None and (source.adapter / "tokenizer.json").is_file()
    device = choose_device(section.device)
    dtype = section.dtype if section.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    quantization = section.quantization
    if quantization == "auto":
        quantization = source.record.quantization if source.record is not None else "none"  # type: ignore[assignment]
    parameters = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / _stored_bytes(config)
    return ModelOutline(
        source=source,
        tokenizer=load_tokenizer(
            source.adapter if has_tokenizer and source.adapter else source.base, section.chat_template
        ),
        facts=facts,
        context_length=context_length or length,
        positions=positions,
        device=device,
        element_bytes=_ELEMENT_BYTES[dtype],
        weights_bytes=int(parameters * _QUANTIZED_BYTES.get(quantization, _ELEMENT_BYTES[dtype])),
    )


def _stored_bytes(config: Any) -> int:
    dtype = getattr(config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


@dataclass(frozen=True)
class Budget:
    """Tokens and bytes of one question with its past.

    Args:
        prompt_tokens: The whole prompt.
        max_new_tokens: Longest answer.
        context_length: Most tokens of both.
        kv_bytes: Keys and values of both.
        more_bytes: What is still to be taken: keys and values not held yet, weights not loaded yet.
        free_bytes: What the device has left; None where the system does not tell.
    """

    prompt_tokens: int
    max_new_tokens: int
    context_length: int
    kv_bytes: int
    more_bytes: int
    free_bytes: int | None

    @property
    def needed_tokens(self) -> int:
        """Prompt and longest answer."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def fits_context(self) -> bool:
        """True when no token is over."""
        return self.needed_tokens <= self.context_length

    @property
    def fits_memory(self) -> bool:
        """True when enough memory is free, or when that is not known."""
        return self.free_bytes is None or self.more_bytes <= self.free_bytes

    def describe(self) -> str:
        """One line for people."""
        free = "" if self.free_bytes is None else f", {size(self.free_bytes)} free"
        verdict = "fits" if self.fits_context and self.fits_memory else "does not fit"
        return (
            f"{self.prompt_tokens:,} prompt tokens + up to {self.max_new_tokens:,} new "
            f"of {self.context_length:,} ({self.needed_tokens / self.context_length:.0%}), "
            f"KV {size(self.kv_bytes)}{free}: {verdict}"
        )

    def refuse_memory(self) -> None:
        """Raise `ResourceError` when the device has too little memory left."""
        if not self.fits_memory and self.free_bytes is not None:
            raise ResourceError(
                f"{size(self.more_bytes)} more are needed for {self.needed_tokens:,} tokens, "
                f"{size(self.free_bytes)} are free",
                rule="Every token keeps its keys and values while the conversation lasts.",
                hint="Give less text, a smaller --max-new-tokens, or a smaller model.",
            )


def size(count: int) -> str:
    """Bytes for people: `3.1 GiB`, `420.0 MiB`, `12.0 KiB`."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"


def free_bytes(device: torch.device) -> int | None:
    """Memory still to be had: of a GPU with what torch holds unused, of the host within its cgroup."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    known = [amount for amount in (_host_available(), _cgroup_available()) if amount is not None]
    return min(known, default=None)


def _host_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None  # not Linux
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _cgroup_available(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    if limit == "max":
        return None
    facts = dict(zip(statistics[::2], statistics[1::2], strict=False))
    # Cached file pages count as used but are given up first.
    return max(int(limit) - used + int(facts.get("inactive_file", 0)), 0)
