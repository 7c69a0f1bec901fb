"""From sources and weights to the list of tensors to write; everything that can be refused is refused here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from longlora_cli.errors import IncompatibleError, SettingsError
from longlora_cli.merging.methods import Method
from longlora_cli.merging.quantized import ORIGINAL, Seen, quantized_rows
from longlora_cli.merging.tensors import OutputTensor
from longlora_cli.models.adapter_tensors import Adapter, open_adapter, stays_tied, trained_dtype
from longlora_cli.models.layout import Layout, open_base
from longlora_cli.models.rope import RopeRecord
from longlora_cli.models.source import AdapterRecord, base_folder, fingerprint, resolve
from longlora_cli.models.tensors import (
    DTYPES,
    Rows,
    SharedRows,
    StoredRows,
    StoredTensor,
    TensorFolder,
    same_values,
)

# Old Llama checkpoints store the rotary frequencies. They are computed from the config, and a stale copy would be the
# base's positions in a model that was trained with others.
_COMPUTED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Base:
    """A plain model on disk."""

    name: str
    folder: Path
    files: TensorFolder
    config: Any
    layout: Layout

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """What of it is a tensor of the result: all but computed buffers and the copy of a tied embedding."""
        skipped = self.layout.head if self.layout.tied else None
        return {
            name: tensor
            for name, tensor in self.files.tensors.items()
            if name != skipped and not name.endswith(_COMPUTED)
        }

    def stored(self, name: str) -> StoredTensor:
        """A tensor, or for a tied head the embedding."""
        return self.layout.stored(self.files, name)

    def rows(self, name: str, seen: Seen) -> Rows:
        """A tensor as the run saw it."""
        tensor = self.stored(name)
        if seen.quantization != "none" and name in self.layout.linear:
            return quantized_rows(tensor, seen)
        return StoredRows(tensor)


@dataclass(frozen=True)
class Ingredient:
    """One source of a merge: a model, or an adapter and its base.

    Args:
        name: As the user typed it.
        base: The model, or the adapter's base.
        adapter: None for a model.
        record: What lay beside the adapter.
        rope: Its positions; None when the architecture has none that can be recorded.
    """

    name: str
    base: Base
    adapter: Adapter | None
    record: AdapterRecord | None
    rope: RopeRecord | None

    @property
    def tied(self) -> bool:
        """Its head equals its embedding."""
        return stays_tied(self.base.layout, self.adapter)

    def rows(self, name: str, base: Rows) -> Rows:
        """One tensor of this source, given its base's rows."""
        if self.adapter is None:
            return base
        return self.adapter.rows(name, base, trained_dtype(self.record, self.base.stored(name)))


@dataclass(frozen=True)
class MergePlan:
    """What will be written.

    Args:
        ingredients: The sources.
        weights: One each.
        seen: How the base of the adapters enters: `none` is the original weights.
        tied: The result's head is its embedding.
        outputs: Its tensors.
        notes: What the user should know.
        peft_config: The content of adapter_config.json when the result is an adapter, else None.
        record: What is written beside such an adapter.
    """

    ingredients: Sequence[Ingredient]
    weights: Sequence[float]
    seen: Seen
    tied: bool
    outputs: Sequence[OutputTensor]
    notes: list[str] = field(default_factory=list)
    peft_config: dict[str, Any] | None = None
    record: AdapterRecord | None = None

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(output.nbytes for output in self.outputs)

    @property
    def base(self) -> Base:
        """The first source's model, whose config and tokenizer the result inherits."""
        return self.ingredients[0].base

    @property
    def rope(self) -> RopeRecord | None:
        """The positions all sources share."""
        return self.ingredients[0].rope

    @property
    def context_length(self) -> int | None:
        """Tokens the result is made to read."""
        lengths = [i.record.context_length for i in self.ingredients if i.record]
        return max([*lengths, self.rope.max_position_embeddings]) if self.rope else None


def read_ingredients(names: Sequence[str], model: str | None) -> list[Ingredient]:
    """Open the sources; only headers are read.

    Args:
        names: Models, runs, checkpoints, adapters.
        model: Base to put the adapters on instead of the one they name.

    Raises:
        SettingsError: `model` is not the base an adapter was trained on, or there is no adapter.
        IncompatibleError: An adapter's own base has changed, or an adapter does not fit it.
        NotFoundError, DataError, IntegrityError: A source is not there or damaged.
    """
    bases: dict[Path, Base] = {}
    found = [_read(name, model, bases) for name in names]
    if model is not None and all(i.adapter is None for i in found):
        raise SettingsError(
            f"--model {model} has no effect here: no source is an adapter",
            hint="Leave it out, or give a run or an adapter.",
        )
    return found


def _read(name: str, model: str | None, bases: dict[Path, Base]) -> Ingredient:
    source = resolve(name)
    if source.beacons is not None:
        raise IncompatibleError(
            f"{name} has beacons, which no plain model can hold",
            rule="Their projections act on beacons alone, and a plain model has none: the merged folder would read "
            "as if they had never been trained.",
            hint="Use the run as it is with longlora eval and chat.",
        )
    base_name = model if model is not None and source.adapter is not None else source.base
    folder = base_folder(base_name).resolve()
    if folder not in bases:
        config, layout, files = open_base(folder)
        bases[folder] = Base(base_name, folder, files, config, layout)
    base = bases[folder]
    record = source.record
    if source.adapter is None:
        return Ingredient(name, base, None, None, _positions(base.config))
    if record is not None:
        _refuse_other_base(name, record, base, asked=model is not None)
    adapter = open_adapter(source.adapter, base.layout, base.files)
    rope = RopeRecord.from_json(record.rope) if record else _positions(base.config)
    return Ingredient(name, base, adapter, record, rope)


def _positions(config: Any) -> RopeRecord | None:
    try:
        return RopeRecord.of(config)
    except IncompatibleError:
        return None  # such models can be mixed; their config is carried over unchanged


def _refuse_other_base(name: str, record: AdapterRecord, base: Base, *, asked: bool) -> None:
    found = fingerprint(base.folder)
    if found == record.base_fingerprint:
        return
    kind = SettingsError if asked else IncompatibleError
    raise kind(
        f"{name} is an adapter of another base than {base.name}",
        rule=f"It was trained on {record.base} with fingerprint {record.base_fingerprint[:12]}; "
        f"{base.name} has {found[:12]}.",
        hint="Leave --model out, or give the base it was trained on." if asked else "Restore the base.",
    )


def check_together(ingredients: Sequence[Ingredient], *, any_dtype: bool) -> None:
    """Refuse sources that are not of one architecture, one base or one set of positions.

    Args:
        ingredients: The sources.
        any_dtype: The user named the result's dtype, so theirs may differ.

    Raises:
        IncompatibleError: The first difference is named.
    """
    first = ingredients[0]
    for other in ingredients[1:]:
        _same_tensors(first, other, any_dtype=any_dtype)
        if first.rope != other.rope:
            told = [i.rope.describe() if i.rope else "none" for i in (first, other)]
            lengths = [i.rope.max_position_embeddings if i.rope else 0 for i in (first, other)]
            raise IncompatibleError(
                f"{first.name} and {other.name} have different positions: "
                f"{told[0]} to {lengths[0]:,} tokens and {told[1]} to {lengths[1]:,}",
                rule="Mixed weights read positions in one way only.",
            )
    folders = {i.base.folder: i.name for i in ingredients}
    if len(folders) > 1 and all(i.adapter for i in ingredients):
        prints = {
            fingerprint(folder): name for folder, name in folders.items()
        }  # copies of one base are one base
        if len(prints) > 1:
            names = list(prints.values())
            raise IncompatibleError(
                f"{names[0]} and {names[1]} are adapters of different bases",
                rule="Adapters are mixed on the one base they were trained on.",
            )


def _same_tensors(first: Ingredient, other: Ingredient, *, any_dtype: bool) -> None:
    ours, theirs = first.base.tensors, other.base.tensors
    if first.base is other.base:
        return
    head = first.base.layout.head
    if differing := sorted((set(ours) ^ set(theirs)) - {head}):
        raise IncompatibleError(f"only one of {first.name} and {other.name} has the tensor {differing[0]}")
    for name in sorted(ours.keys() - {head}):
        mine, its = ours[name], theirs[name]
        if mine.shape != its.shape or (mine.dtype != its.dtype and not any_dtype):
            raise IncompatibleError(
                f"{name} is {_describe(mine)} in {first.name} and {_describe(its)} in {other.name}",
                rule="Mixed models have equal names, shapes and dtypes.",
                hint="--dtype converts models of different dtypes." if mine.shape == its.shape else None,
            )
        if not mine.dtype.is_floating_point and not same_values(mine, its):
            raise IncompatibleError(f"the integers of {name} differ in {first.name} and {other.name}")


def _describe(tensor: StoredTensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def choose_base(ingredients: Sequence[Ingredient], choice: str, *, given: bool) -> tuple[Seen, list[str]]:
    """Whether adapters are added to the original base or to the one that quantization made of it.

    Args:
        ingredients: The sources.
        choice: `auto`, `original` or `dequantized`.
        given: The user typed it, so it must have an effect.

    Returns:
        How the base enters, and what to tell the user.

    Raises:
        SettingsError: There is no adapter, or no single quantization to repeat.
    """
    if given and all(i.adapter is None for i in ingredients):
        raise SettingsError(f"--base-weights {choice} has no effect here: no source is an adapter")
    kinds = {(i.record.quantization, i.record.dtype) for i in ingredients if i.record}
    quantized = {kind for kind in kinds if kind[0] != "none"}
    if choice == "original" or (choice == "auto" and not quantized):
        return ORIGINAL, []
    if len(kinds) == 1 and quantized:
        ((quantization, dtype),) = quantized
        return Seen("nf4" if quantization == "nf4" else "int8", DTYPES[dtype]), []
    told = ", ".join(sorted({kind[0] for kind in kinds})) or "no recorded quantization"
    if choice == "auto":
        return ORIGINAL, [
            f"the adapters were trained over different bases ({told}); the original one is used"
        ]
    raise SettingsError(
        f"--base-weights dequantized: the adapters were trained with {told}",
        rule="All must have been trained over one kind of quantized base.",
        hint="Use --base-weights original.",
    )


def plan_model(
    ingredients: Sequence[Ingredient], weights: Sequence[float], method: Method, seen: Seen, dtype: str
) -> MergePlan:
    """List the tensors of the merged model.

    Sources that are all adapters are mixed as `base + sum_i w_i * delta_i`. As `delta_i = source_i - base`, that is the
    weighted sum of the sources and of the base with weight `1 - sum_i w_i`, so every method sees whole tensors.

    Args:
        ingredients: Sources that `check_together` has passed.
        weights: One each.
        method: How tensors are combined.
        seen: How the base enters.
        dtype: `auto` keeps each tensor's.
    """
    tied = all(i.tied for i in ingredients)
    base = ingredients[0].base
    stored = dict(base.tensors)
    head = base.layout.head
    if not tied and head is not None:
        stored.setdefault(head, base.stored(head))
    outputs = []
    for name, tensor in stored.items():
        wanted = DTYPES[dtype] if dtype != "auto" and tensor.dtype.is_floating_point else tensor.dtype
        opener = partial(_open_tensor, ingredients, weights, method, seen, name)
        outputs.append(OutputTensor(name, tensor.shape, wanted, opener))
    return MergePlan(ingredients, weights, seen, tied, outputs)


def _open_tensor(
    ingredients: Sequence[Ingredient], weights: Sequence[float], method: Method, seen: Seen, name: str
) -> Rows | StoredTensor:
    stored = ingredients[0].base.stored(name)
    if not stored.dtype.is_floating_point:
        return stored
    shared = {i.base.folder: SharedRows(i.base.rows(name, seen)) for i in ingredients}
    views = [i.rows(name, shared[i.base.folder]) for i in ingredients]
    if any(i.adapter is None for i in ingredients):
        return method.prepare(views, weights)
    base = shared[ingredients[0].base.folder]
    if all(view is base for view in views):
        quantized = seen.quantization != "none" and name in ingredients[0].base.layout.linear
        return base if quantized else stored
    rest = 1.0 - math.fsum(weights)
    return method.prepare([base, *views], [rest, *weights])
