"""What a training step over a chunk takes: `a*n + b*n^2` per document of n tokens, with the planner's FLOPs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longlora_cli.memory.cost import Flops
from longlora_cli.memory.plan import ModelShape
from longlora_cli.models.source import BUILTIN, AdapterRecord

Float64 = npt.NDArray[np.float64]
# Llama-3.1-8B, for a tokenizer that comes without a decoder's config.json.
_DEFAULT_SIZES = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


@dataclass(frozen=True)
class ChunkCost:
    """FLOPs of a training step, without recomputation and adapters.

    Args:
        per_token: FLOPs of one token in the linears and the head.
        per_squared_token: FLOPs of the attention of a document of n tokens, divided by n^2.
        model: Whose sizes these are.
    """

    per_token: float
    per_squared_token: float
    model: str

    def of(self, lengths: npt.NDArray[Any]) -> Float64:
        """FLOPs of documents of these lengths, `[documents]`; a chunk's are the sum of its documents'."""
        tokens = np.asarray(lengths, dtype=np.float64)
        return tokens * (self.per_token + self.per_squared_token * tokens)

    def as_dict(self) -> dict[str, float | str]:
        """For the manifest; `ChunkCost(**content)` reads it again."""
        return asdict(self)


def chunk_costs(document_lengths: Sequence[npt.NDArray[Any]], cost: ChunkCost) -> Float64:
    """Cost of each chunk, `[chunks]`, from its documents' tokens, `[documents]` each."""
    if not document_lengths:
        return np.zeros(0)
    counts = [len(lengths) for lengths in document_lengths]
    starts = np.cumsum([0, *counts[:-1]])
    sums: Float64 = np.add.reduceat(cost.of(np.concatenate(document_lengths)), starts)
    return sums


def chunk_cost(model: str) -> ChunkCost:
    """The cost by the sizes of a model; by those of Llama-3.1-8B where `model` is a tokenizer alone.

    Args:
        model: As `--model` names it: `builtin`, a model or run folder, a hub name.
    """
    sizes = _sizes(model)
    return _cost(sizes, model) if sizes else default_cost()


def default_cost() -> ChunkCost:
    """The cost by Llama-3.1-8B's sizes."""
    return _cost(_DEFAULT_SIZES, "Llama-3.1-8B")


def _cost(sizes: dict[str, Any], model: str) -> ChunkCost:
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    shape = ModelShape(
        layers=sizes["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=sizes.get("num_key_value_heads") or heads,
        head_dim=sizes.get("head_dim") or width // heads,
        intermediate=sizes.get("intermediate_size") or 4 * width,
        vocabulary=sizes["vocab_size"],
        element_bytes=2,
        weight_bytes=0,
        trainable=0,
    )
    one_token, one_square = Flops.of(shape, 1, 0.0), Flops.of(shape, 0, 1.0)
    return ChunkCost(one_token.model(shape.layers), one_square.model(shape.layers), model)


def _sizes(model: str) -> dict[str, Any] | None:
    """A decoder's sizes from its config.json, read as plain JSON; None without them."""
    config = _config(model)
    config = config.get("text_config") or config
    needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    return config if all(isinstance(config.get(name), int) and config[name] > 0 for name in needed) else None


def _config(model: str) -> dict[str, Any]:
    import longlora_cli.models.source as source

    folder = Path(source.__file__).parent / BUILTIN if model == BUILTIN else Path(model)
    if not (folder / "config.json").is_file():  # a merged model has a record, too: of what it was made from
        record = AdapterRecord.read(folder / "adapter") or AdapterRecord.read(folder)
        if record is not None:
            return _config(record.base)
    try:
        if folder.is_dir():
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        else:
            from transformers import PretrainedConfig  # imports torch

            found, _ = PretrainedConfig.get_config_dict(model)
    except (OSError, ValueError):  # none there, or not JSON: whoever loads the model tells
        return {}
    return found if isinstance(found, dict) else {}
