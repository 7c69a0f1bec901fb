"""Loading, in one visible order: source, config, positions, weights, attention, adapter.

Each step stands where it does for a reason. Positions are set before construction because the rotary frequencies are
computed there. Attention is chosen by name at construction. The adapter comes last because PEFT replaces the linear
layers that quantization made. To be used and not trained, on weights that are not quantized, it is folded into them
with the merge's own arithmetic, so that a run and its merged folder answer alike.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longlora_cli.errors import IncompatibleError, NotFoundError, SettingsError
from longlora_cli.memory.attention import attention_name
from longlora_cli.memory.loss import head_weight
from longlora_cli.memory.nf4 import keep_layout
from longlora_cli.models import adapter as adapters
from longlora_cli.models import rope as positions
from longlora_cli.models.folding import fold
from longlora_cli.models.rope import RopeRecord
from longlora_cli.models.source import AdapterRecord, ModelSource, base_folder, fingerprint, resolve
from longlora_cli.models.tensors import DTYPES
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.sections import ModelSection, RopeSection

# Above this size training quantizes by default: 16-bit weights of 1B parameters take 2 GB, NF4 0.6.
_QUANTIZE_ABOVE = 1_000_000_000


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a decoder, as its config gives them."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> ModelFacts:
        """Read them from a transformers config."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
        )

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token of context keeps."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


@dataclass
class LoadedModel:
    """A model ready to use, and what others need to know of it.

    Args:
        model: transformers causal LM with the adapter in its weights, or PEFT's wrapper around it: in training, on
            quantized weights, and for adapters that cannot be merged exactly.
        tokenizer: Its fast tokenizer.
        source: Where base and adapter came from.
        rope: The positions it was built with, verified.
        facts: Its sizes.
        device: Where it computes.
        dtype: `fp32`, `bf16` or `fp16`.
        quantization: `none`, `nf4` or `int8`.
        own_length: Tokens the base was made for, before any stretching.
        beacons: `BeaconSettings` of the beacons on the model (`beacon.loading`); None for a plain model.
    """

    model: Any
    tokenizer: Any
    source: ModelSource
    rope: RopeRecord
    facts: ModelFacts
    device: torch.device
    dtype: str
    quantization: str
    own_length: int
    beacons: Any = None

    @property
    def causal_lm(self) -> Any:
        """The transformers model, inside PEFT's wrapper if there is one; adapter layers are in it."""
        return self.model.get_base_model() if self.source_has_adapter else self.model

    @property
    def source_has_adapter(self) -> bool:
        """True when PEFT's wrapper is on."""
        return hasattr(self.model, "peft_config")

    @property
    def context_length(self) -> int:
        """Tokens it can be asked to read: the trained length of an adapter, else the config's."""
        if self.source.record:
            return self.source.record.context_length
        own, parameters = self.rope.max_position_embeddings, self.rope.parameters
        return int(own * parameters["factor"]) if parameters["rope_type"] == "dynamic" else own

    @property
    def positions(self) -> int:
        """Positions it was built with: with beacons more tokens than that can be read."""
        return self.rope.max_position_embeddings

    def hidden(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """The decoder without its head: `[batch, tokens]` -> `last_hidden_state` `[batch, tokens, width]` and more."""
        return self.causal_lm.get_decoder()(input_ids=input_ids, **kwargs)

    def head_weight(self) -> Tensor:
        """Output embedding `[vocabulary, width]`.

        Raises:
            IncompatibleError: Logits are more than one matrix product: a bias, a scale or a cap.
        """
        weight = head_weight(self.causal_lm)
        if weight is None:
            raise IncompatibleError(f"{self.source.base}: its output head is more than one matrix product")
        return weight

    def record(self, context_length: int) -> AdapterRecord:
        """What must be written beside an adapter of this model."""
        return AdapterRecord(
            base=self.source.base,
            base_fingerprint=fingerprint(base_folder(self.source.base)),
            rope=self.rope.to_json(),
            quantization=self.quantization,
            dtype=self.dtype,
            context_length=context_length,
        )


def load_model(
    section: ModelSection,
    rope: RopeSection | None = None,
    *,
    adapter: Path | None = None,
    context_length: int | None = None,
    training: bool = False,
    with_beacons: bool = False,
) -> LoadedModel:
    """Load a base, or a base with its adapter.

    Args:
        section: Which model and how its numbers are held.
        rope: How positions are stretched; None or `keep` leaves the adapter's or the model's own.
        adapter: Adapter to put on the base that `section` names.
        context_length: Tokens to read; gives the stretching its factor, and in training an adapter its new length.
        training: Adapter tensors stay trainable, beside the weights, and large bases are quantized by default. Else an
            adapter is folded into unquantized weights.
        with_beacons: The caller puts the source's beacons on the model, as `beacon.loading.load_model` does. Else a
            source that has some is refused: without them it would be another model.

    Raises:
        NotFoundError, DataError, SecurityError: From `resolve` and `base_folder`.
        SettingsError: An adapter of another base, or settings the model cannot have.
        IncompatibleError: Positions cannot be verified, an adapter does not fit, or beacons are of another base.
        NumericError: From `fold`.
    """
    from transformers import AutoConfig

    source = resolve(section.model, adapter)
    folder = base_folder(source.base)
    _refuse_other_base(source, folder)
    if source.beacons is not None and not with_beacons:
        raise IncompatibleError(
            f"{source.adapter} has beacons, which this cannot read",
            hint="Load it with longlora_cli.beacon.loading.load_model.",
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    facts, own = ModelFacts.of(config), RopeRecord.of(config)
    record = _positions(source, own, rope, context_length, facts, training=training)
    record.apply(config)
    device, dtype = choose_device(section.device), choose_dtype(section)
    quantization = choose_quantization(section, source, folder, training=training)
    model = _read_weights(folder, config, section.attention, device, DTYPES[dtype], quantization)
    keep_layout(model)
    positions.verify(model, record, facts.head_dim)
    model.config.use_cache = False  # caches are made where they are used; a default one would leak
    if source.low_rank is not None:
        foldable = not training and quantization == "none"
        if not (foldable and fold(model, folder, source.low_rank, source.record)):
            model = adapters.load(model, source.low_rank, trainable=training)
    own_tokenizer = source.adapter is not None and (source.adapter / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(
        source.adapter if own_tokenizer and source.adapter else source.base, section.chat_template
    )
    if not training:
        model.eval()
    return LoadedModel(
        model, tokenizer, source, record, facts, device, dtype, quantization, own.max_position_embeddings
    )


def _read_weights(
    folder: Path,
    config: Any,
    attention: str,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str,
) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=attention_name(attention, device),
        quantization_config=_quantizer(quantization, dtype),
        device_map={"": device},
        trust_remote_code=False,
    )


def _refuse_other_base(source: ModelSource, folder: Path) -> None:
    if source.record is None:
        return
    found = fingerprint(folder)
    if found != source.record.base_fingerprint:
        kind, what = (
            (IncompatibleError, "has beacons") if source.beacons else (SettingsError, "is an adapter")
        )
        raise kind(
            f"{source.adapter} {what} of another base than {source.base}",
            rule=f"It was trained on {source.record.base} (fingerprint {source.record.base_fingerprint[:12]}, "
            f"found {found[:12]}).",
            hint="Give the base it was trained on.",
        )


def _positions(
    source: ModelSource,
    own: RopeRecord,
    rope: RopeSection | None,
    context_length: int | None,
    facts: ModelFacts,
    *,
    training: bool,
) -> RopeRecord:
    if source.record is not None:
        trained = RopeRecord.from_json(source.record.rope)
        if rope is not None and rope.rope != "keep":
            asked = positions.extend(
                own, rope, context_length or source.record.context_length, facts.head_dim
            )
            if asked.parameters != trained.parameters:
                raise SettingsError(
                    f"--rope {rope.rope} is {asked.describe()}, the adapter was trained with {trained.describe()}",
                    hint="Leave --rope out: a run's own positions are used.",
                )
        # What is trained on may read further, at the frequencies that it was trained with.
        return trained.for_length(context_length or 0) if training else trained
    return positions.extend(own, rope or RopeSection(), context_length, facts.head_dim)


def choose_device(choice: str) -> torch.device:
    """The device of this process: its own GPU when there is one.

    Raises:
        NotFoundError: A GPU was asked for and there is none.
    """
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise NotFoundError("--device cuda: torch finds no GPU", hint="Use --device auto or cpu.")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def choose_dtype(section: ModelSection) -> str:
    """`fp32`, `bf16` or `fp16` for these settings on this machine."""
    if section.dtype != "auto":
        return section.dtype
    device = choose_device(section.device)
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def choose_quantization(section: ModelSection, source: ModelSource, folder: Path, *, training: bool) -> str:
    """`none`, `nf4` or `int8` for these settings and the base in `folder`."""
    if section.quantization != "auto":
        return section.quantization
    if source.record is not None:
        return source.record.quantization
    weights_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    large = weights_bytes > 2 * _QUANTIZE_ABOVE  # 16-bit weights on disk
    return "nf4" if training and large else "none"


def _quantizer(quantization: str, compute_dtype: torch.dtype) -> Any:
    if quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
