"""What a loaded model really is: its positions, its quantized weights, its adapter, read from the model itself.

Settings and records say what was asked for. Here the live tensors are looked at, once, before the first question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.data.encoding import safe_encoder
from longlora_cli.errors import IncompatibleError, LongLoRAError
from longlora_cli.evaluation.audits import Audit, audit
from longlora_cli.generation.past import PLAIN, Past
from longlora_cli.models import rope as positions
from longlora_cli.models.adapter_tensors import open_adapter
from longlora_cli.models.layout import open_base
from longlora_cli.models.loading import LoadedModel
from longlora_cli.models.source import base_folder
from longlora_cli.models.tensors import matrix_shape
from longlora_cli.models.tokenizer import template_sha256, was_trained_otherwise
from longlora_cli.sections import stretched_tokens

# Two logits of the same model differ by nothing; an adapter's difference is far above that.
_PROMPT = "The path went down to the river, and on the other side stood a mill."
# Rows of a folded tensor that are compared with the base's file: a few MB for 8B parameters instead of 16 GB.
_ROWS = 64


@dataclass(frozen=True)
class Live:
    """What was seen.

    Args:
        readable: Tokens that the model was made for.
        positions: Its RoPE in words.
        deviation: Largest relative difference between a live frequency and the record's.
        fault: What is wrong with the live positions, if anything.
        audits: Chat template, quantization, adapter and attention.
    """

    readable: int
    positions: str
    deviation: float | None
    fault: str | None
    audits: list[Audit]

    def position_audit(self, longest: int) -> Audit:
        """Positions against the longest thing that was read, in tokens."""
        value = {"positions": self.positions, "made for": self.readable, "longest read": longest}
        if self.fault is not None:
            return audit("Positions (RoPE)", value, False, self.fault)
        if longest > self.readable:
            note = f"{longest - self.readable:,} tokens beyond what the model is made for"
            return audit("Positions (RoPE)", value, False, note)
        note = f"the live frequencies are the record's to {self.deviation:.0e}"
        return audit("Positions (RoPE)", value, True, note)


def readable_tokens(loaded: LoadedModel, rope: str, factor: float | None = None) -> int:
    """Tokens that a model was made for: a run's trained length, or the base's own, or that of a base stretched by a
    method and, where one was given, a factor.
    """
    record = loaded.source.record
    if record is not None:
        return record.context_length
    if rope != "keep" and factor is not None:
        return stretched_tokens(loaded.own_length, factor)
    return loaded.rope.max_position_embeddings if rope != "keep" else loaded.own_length


def look_at(
    loaded: LoadedModel,
    past: Past = PLAIN,
    *,
    rope: str,
    chat_template: str,
    rope_factor: float | None = None,
) -> Live:
    """Look at a model before it is asked anything; later some positions change with the text.

    Args:
        loaded: The model.
        past: How it keeps what it has read.
        rope: How positions were asked to be stretched.
        chat_template: How the template was chosen.
        rope_factor: By how much, where that was said.
    """
    fault, deviation = None, None
    try:
        positions.verify(loaded.causal_lm, loaded.rope, loaded.facts.head_dim)
        deviation = _deviation(loaded)
    except IncompatibleError as error:
        fault = error.message
    return Live(
        past.readable(readable_tokens(loaded, rope, rope_factor), loaded.positions),
        loaded.rope.describe(),
        deviation,
        fault,
        [
            _template(loaded, chat_template),
            _quantization(loaded),
            _adapter(loaded),
            audit("Attention", loaded.causal_lm.config._attn_implementation, None),
            audit("What was read is kept as", past.describe(), None),
        ],
    )


def _deviation(loaded: LoadedModel) -> float:
    expected = positions.inverse_frequencies(loaded.rope, loaded.facts.head_dim)
    found = [
        m.inv_freq for m in loaded.causal_lm.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)
    ]
    return max(float((live.detach().cpu().double() / expected - 1).abs().max()) for live in found)


def _template(loaded: LoadedModel, chosen: str) -> Audit:
    name = "Chat template"
    tokenizer, folder = loaded.tokenizer, loaded.source.adapter
    if not tokenizer.chat_template:
        value = "none: prompts are plain texts"
    else:
        value = f"{chosen}, sha256 {template_sha256(tokenizer)[:12]}"
    if folder is None:
        return audit(name, value, None)
    if was_trained_otherwise(folder, tokenizer):
        return audit(name, value, False, "the run was trained with another one")
    if (folder / "chat_template.jinja").is_file():
        return audit(name, value, True, "the one that the run was trained with")
    if not (folder / "tokenizer.json").is_file():
        return audit(name, value, None, "which one the run was trained with is not recorded")
    ok = not tokenizer.chat_template
    return audit(name, value, ok, "" if ok else "the run was trained without one")


def _quantization(loaded: LoadedModel) -> Audit:
    """What the linear layers of the decoder hold, whatever the settings say."""
    held: dict[str, int] = {}
    for name, module in loaded.causal_lm.get_decoder().named_modules():
        if isinstance(module, nn.Linear) and "lora_" not in name:
            kind = _kind_of(module)
            held[kind] = held.get(kind, 0) + 1
    wanted = loaded.quantization if loaded.quantization != "none" else loaded.dtype
    # Some architectures keep a few layers, such as routers, in float32.
    kept = {"fp32"} if loaded.quantization == "none" else set()
    ok = wanted in held and set(held) <= {wanted} | kept
    note = "" if ok else f"the settings say {wanted}"
    return audit("Numbers that linear layers hold", held, ok, note)


_NUMBERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8"}


def _kind_of(module: nn.Linear) -> str:
    weight = module.weight
    if type(module).__name__ == "Linear4bit":
        kind = getattr(getattr(weight, "quant_state", None), "quant_type", None)
        return str(kind) if kind is not None else "4 bits, not quantized yet"
    return _NUMBERS.get(weight.dtype, str(weight.dtype))


def _adapter(loaded: LoadedModel) -> Audit:
    name = "Adapter"
    if loaded.source.low_rank is None:
        return audit(name, "none", None)
    if loaded.source_has_adapter:
        difference = _logit_difference(loaded)
        value = {"largest change of a logit": difference}
        note = "beside the weights; without it the model answers the same" if not difference else ""
        return audit(
            name, value, difference > 0, note or "beside the weights, with and without it on one prompt"
        )
    try:
        changed, tensors, largest = _folded_difference(loaded)
    except LongLoRAError as error:  # files of the base that are gone since
        return audit(name, "folded into the weights", None, f"not looked at: {error.message}")
    value = {"tensors": tensors, "changed": changed, "largest change of a weight": largest}
    note = f"folded into the weights; their first {_ROWS} rows against the base's file"
    return audit(name, value, changed > 0, note if changed else f"{note}: it changes nothing")


@torch.no_grad()
def _logit_difference(loaded: LoadedModel) -> float:
    encoder = safe_encoder(loaded.tokenizer)
    ids = [*encoder.begin, *encoder.encode_batch([_PROMPT])[0].tolist()]
    tokens = torch.tensor([ids], device=loaded.device)

    def logits() -> Tensor:
        found: Tensor = loaded.model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        return found.float()

    with_it = logits()
    with loaded.model.disable_adapter():
        return float((logits() - with_it).abs().max())


@torch.no_grad()
def _folded_difference(loaded: LoadedModel) -> tuple[int, int, float]:
    """How many of an adapter's tensors differ from the base's file in their first rows, of how many; the largest
    difference.
    """
    assert loaded.source.low_rank is not None
    _, layout, files = open_base(base_folder(loaded.source.base))
    names = open_adapter(loaded.source.low_rank, layout, files).changed
    differences = []
    for name in names:
        parameter: Any = loaded.causal_lm.get_parameter(name)
        live = parameter.view(matrix_shape(parameter.shape))[:_ROWS]
        base = layout.stored(files, name).read(0, len(live)).to(live.dtype)
        differences.append(float((live.cpu().double() - base.double()).abs().max()))
    return sum(value > 0 for value in differences), len(names), max(differences, default=0.0)
