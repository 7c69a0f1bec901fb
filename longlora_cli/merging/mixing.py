"""Several adapters of one base as one adapter, exactly: factors side by side, ranks added.

`sum_i w_i s_i B_i A_i` is the product of `[w_1 s_1 B_1, w_2 s_2 B_2, ...]` and the stacked `A_i`; averaging the factors
themselves would add products of one adapter's `B` with another's `A`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longlora_cli.errors import IncompatibleError
from longlora_cli.merging.methods import METHODS
from longlora_cli.merging.plan import Ingredient, MergePlan
from longlora_cli.merging.quantized import ORIGINAL
from longlora_cli.merging.tensors import OutputTensor
from longlora_cli.models.adapter_tensors import ADAPTER_CONFIG, Adapter
from longlora_cli.models.source import AdapterRecord
from longlora_cli.models.tensors import Rows, SharedRows, StoredTensor

_PREFIX = "base_model.model."
_ENDINGS = {
    "right": ".lora_A.weight",
    "left": ".lora_B.weight",
    "left_t": ".lora_embedding_A",
    "right_t": ".lora_embedding_B",
}


@dataclass(frozen=True)
class _Whole:
    """A small matrix in memory as `Rows`."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (exclusive), `[last - first, columns]` in float64."""
        return self.matrix[first:last].double()


def plan_adapter(
    ingredients: Sequence[Ingredient], weights: Sequence[float], dtype: torch.dtype
) -> MergePlan:
    """The tensors, PEFT config and record of the mixed adapter.

    Args:
        ingredients: Adapters of one base.
        weights: One each.
        dtype: Of the stored factors; float32 keeps the mixture exact to 1e-6.

    Raises:
        IncompatibleError: A source that has no exact low-rank mixture (a model, DoRA, PiSSA), or records that differ.
    """
    adapters = [_exact(ingredient) for ingredient in ingredients]
    record = _common_record(ingredients)
    both = {m for a in adapters for m in a.factors} & {
        n.removesuffix(".weight") for a in adapters for n in a.whole
    }
    if both:
        raise IncompatibleError(
            f"--keep-adapter: {min(both)} has low-rank factors in one adapter and is trained whole in another",
            hint="Leave --keep-adapter out.",
        )
    outputs: list[OutputTensor] = []
    ranks: dict[str, int] = {}
    for module in sorted({m for adapter in adapters for m in adapter.factors}):
        present = [(a, w) for a, w in zip(adapters, weights, strict=True) if module in a.factors]
        ranks[module] = sum(adapter.rank(module) for adapter, _ in present)
        outputs += _module_outputs(module, present, ranks[module], dtype)
    base = ingredients[0].base
    for name in sorted({n for adapter in adapters for n in adapter.whole}):
        opener = partial(_mixed_whole, ingredients, weights, name)
        outputs.append(OutputTensor(_PREFIX + name, base.stored(name).shape, dtype, opener))
    tied = all(ingredient.tied for ingredient in ingredients)
    return MergePlan(
        ingredients,
        weights,
        ORIGINAL,
        tied,
        outputs,
        peft_config=_config(adapters, ranks, base.layout.adaptable, tied=tied),
        record=record,
    )


def _exact(ingredient: Ingredient) -> Adapter:
    adapter = ingredient.adapter
    if adapter is None or adapter.kind in ("dora", "pissa"):
        kind = adapter.kind if adapter else "whole model"
        raise IncompatibleError(
            f"--keep-adapter: {ingredient.name} is a {kind}, which has no exact low-rank mixture",
            rule="LoRA and rsLoRA adapters have one.",
            hint="Leave --keep-adapter out: a whole model mixes all kinds exactly.",
        )
    return adapter


def _common_record(ingredients: Sequence[Ingredient]) -> AdapterRecord | None:
    records = [i.record for i in ingredients if i.record]
    if not records:
        return None
    held = sorted({f"{r.quantization} {r.dtype}" for r in records})
    if len(held) > 1:
        raise IncompatibleError(
            f"--keep-adapter: the adapters were trained over different bases ({', '.join(held)})",
            hint="Leave --keep-adapter out.",
        )
    return replace(records[0], context_length=max(r.context_length for r in records))


def _module_outputs(
    module: str, present: Sequence[tuple[Adapter, float]], rank: int, dtype: torch.dtype
) -> list[OutputTensor]:
    outputs = []
    for part in sorted(present[0][0].factors[module]):
        first = present[0][0].factors[module][part]
        if part == "copy":  # each is the base's, which was checked
            name = f"{_PREFIX}{module}.base_layer.weight"
            outputs.append(OutputTensor(name, first.shape, first.dtype, partial(_as_is, first)))
            continue
        dim = 0 if part in ("right", "left_t") else 1
        shape = (rank, first.shape[1]) if dim == 0 else (first.shape[0], rank)
        opener = partial(_side_by_side, module, part, present, dim)
        outputs.append(OutputTensor(f"{_PREFIX}{module}{_ENDINGS[part]}", shape, dtype, opener))
    return outputs


def _as_is(tensor: StoredTensor) -> StoredTensor:
    return tensor


def _side_by_side(module: str, part: str, present: Sequence[tuple[Adapter, float]], dim: int) -> Rows:
    pieces = []
    for adapter, weight in present:
        piece = adapter.factors[module][part].read().double()
        # The factors with the rank in their columns carry weight and scale, the others stay as they are.
        pieces.append(piece * (weight * adapter.scale(module)) if dim == 1 else piece)
    return _Whole(torch.cat(pieces, dim=dim))


def _mixed_whole(ingredients: Sequence[Ingredient], weights: Sequence[float], name: str) -> Rows:
    base = SharedRows(ingredients[0].base.rows(name, ORIGINAL))
    views = [ingredient.rows(name, base) for ingredient in ingredients]
    return METHODS["linear"].prepare([base, *views], [1.0 - math.fsum(weights), *weights])


def _config(
    adapters: Sequence[Adapter], ranks: dict[str, int], adaptable: frozenset[str], *, tied: bool
) -> dict[str, Any]:
    """The first adapter's PEFT config with the new ranks; alpha equals the rank, so that PEFT's scale is 1."""
    content: dict[str, Any] = json.loads((adapters[0].folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else adapters[0].config.r
    other = {module: rank for module, rank in ranks.items() if rank != common}
    short = {module.rsplit(".", 1)[-1] for module in ranks}
    by_name = {m for m in adaptable if m.rsplit(".", 1)[-1] in short}
    saved = {name for adapter in adapters for name in adapter.config.modules_to_save or []}
    ties = tied and any(adapter.config.ensure_weight_tying for adapter in adapters)
    if not ties:  # a head that one adapter tied to its embedding is now a module of its own
        whole = {name.rsplit(".", 1)[0] for adapter in adapters for name in adapter.whole}
        saved |= {
            m.rsplit(".", 1)[-1] for m in whole if not any(m == n or m.endswith(f".{n}") for n in saved)
        }
    return content | {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "use_rslora": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "target_modules": sorted(short if by_name == set(ranks) else ranks),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": sorted(saved) or None,
        "ensure_weight_tying": ties,
    }
