"""What an adapter does to its base, exactly: its tensors, their scales, and the rows of the adapted matrices.

Scales and patterns follow PEFT, whose files these are: `alpha / r`, or `alpha / sqrt(r)` for rsLoRA (Kalajdzievski
2023, arXiv:2312.03732), with `rank_pattern` and `alpha_pattern` per module. Methods: LoRA (Hu et al. 2021,
arXiv:2106.09685), DoRA (Liu et al. 2024, arXiv:2402.09353), PiSSA (Meng et al. 2024, arXiv:2404.02948).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longlora_cli.errors import IncompatibleError
from longlora_cli.models.layout import Layout
from longlora_cli.models.source import AdapterRecord
from longlora_cli.models.tensors import (
    DTYPES,
    Rows,
    StoredRows,
    StoredTensor,
    TensorFolder,
    matrix_shape,
    open_folder,
    round_once,
)

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# The parts of one adapted module, by the end of their key: the factor that meets the input, the one that makes the
# output, DoRA's magnitudes, and the copy of an embedding that PEFT saves beside its factors.
_PARTS = {
    ".lora_A.weight": "right",
    ".lora_B.weight": "left",
    ".lora_embedding_A": "left_t",
    ".lora_embedding_B": "right_t",
    ".lora_magnitude_vector": "magnitude",
    ".base_layer.weight": "copy",
}
# Ways of starting the factors that leave the base as it is. PiSSA changes it in a way that can be repeated.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva", "pissa")
# What PEFT can train that is neither a factor, a magnitude nor a whole module.
_UNSUPPORTED = (
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "velora_config",
)


@dataclass(frozen=True)
class Adapter:
    """A LoRA-family adapter folder, sorted by what each tensor does.

    Args:
        folder: Where it lies.
        config: PEFT's `LoraConfig`.
        files: Its tensors.
        factors: Module name -> part (`left`, `right`, ...) -> tensor.
        whole: Model tensor name -> its trained replacement (`modules_to_save`).
    """

    folder: Path
    config: Any
    files: TensorFolder
    factors: dict[str, dict[str, StoredTensor]]
    whole: dict[str, StoredTensor]

    @property
    def kind(self) -> str:
        """`lora`, `rslora`, `dora` or `pissa`."""
        if self.config.use_dora:
            return "dora"
        if self.config.init_lora_weights == "pissa":
            return "pissa"
        return "rslora" if self.config.use_rslora else "lora"

    def rank(self, module: str) -> int:
        """Rank of one module's factors, as stored."""
        parts = self.factors[module]
        return (parts.get("right") or parts["left_t"]).shape[0]

    def scale(self, module: str) -> float:
        """What `B @ A` of one module is multiplied with."""
        from peft.utils.other import get_pattern_key

        pattern = self.config.alpha_pattern
        alpha = pattern.get(get_pattern_key(pattern.keys(), module), self.config.lora_alpha)
        rank = self.rank(module)
        return float(alpha / math.sqrt(rank) if self.config.use_rslora else alpha / rank)

    def keeps_tie(self, layout: Layout) -> bool:
        """True when a tied head still equals the embedding: neither was trained, or PEFT trained one for both."""
        if layout.embedding not in self.changed and layout.head not in self.changed:
            return True
        head, embedding = self.whole.get(layout.head or ""), self.whole.get(layout.embedding)
        if head is None or embedding is None:
            return False
        return bool(self.config.ensure_weight_tying) and torch.equal(head.read(), embedding.read())

    @property
    def changed(self) -> list[str]:
        """The model's names of the tensors that it changes, sorted."""
        return sorted({*self.whole, *(f"{module}.weight" for module in self.factors)})

    def rows(self, name: str, base: Rows, dtype: torch.dtype) -> Rows:
        """A model tensor with this adapter on: its trained replacement, the base plus the delta, or the base.

        Args:
            name: The model's name of it.
            base: The base's rows.
            dtype: What the adapter was trained in; PiSSA's residual base was rounded to it.
        """
        if name in self.whole:
            return StoredRows(self.whole[name])
        module = name.removesuffix(".weight")
        if module not in self.factors or not name.endswith(".weight"):
            return base
        parts = self.factors[module]
        if self.kind == "pissa" and "right" in parts:  # PEFT starts embeddings at zero, whatever the init
            base = _PissaResidual(base, self.rank(module), dtype)
        return _Adapted(base, *read_factors(parts), self.scale(module), parts.get("magnitude"))


def stays_tied(layout: Layout, adapter: Adapter | None) -> bool:
    """True when head and embedding are one tensor in the base and with the adapter on."""
    return layout.tied and (adapter is None or adapter.keeps_tie(layout))


def trained_dtype(record: AdapterRecord | None, stored: StoredTensor) -> torch.dtype:
    """What an adapter was trained in; an adapter of another tool is taken to have kept the base's own."""
    return DTYPES[record.dtype] if record else stored.dtype


def open_adapter(folder: Path, layout: Layout, base: TensorFolder) -> Adapter:
    """Read an adapter's config and headers, and give each tensor its place in the model.

    Args:
        folder: The adapter.
        layout: Of its base.
        base: The base's tensors.

    Raises:
        IncompatibleError: A kind of adapter that has no exact merge; a tensor that fits nothing in the model; a
            tensor that the config says was trained and that is not there. The first three are named. Or it was
            trained over another embedding, or changes a tensor that the base does not store.
    """
    from peft import LoraConfig, PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise IncompatibleError(
            f"{folder} is a {config.peft_type.value} adapter; LoRA and its relatives can be merged"
        )
    _refuse_inexact(folder, config)
    files = open_folder(folder, ADAPTER_FILE)
    factors: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    strange: list[str] = []
    for key, tensor in sorted(files.tensors.items()):
        name = key.removeprefix(_PREFIX)
        ending = next((e for e in _PARTS if name.endswith(e)), None)
        if ending is not None:
            factors.setdefault(name.removesuffix(ending), {})[_PARTS[ending]] = tensor
        elif layout.parameters.get(name) == tensor.shape:
            whole[name] = tensor
        else:
            strange.append(f"{key} {list(tensor.shape)}")
    strange += [f"{_PREFIX}{m}.*" for m, parts in factors.items() if not _fits(m, parts, layout, config)]
    _refuse(folder, "has tensors that fit nothing in the base", strange)
    _refuse(folder, "lacks tensors that its config names", _missing(config, factors, whole, layout))
    adapter = Adapter(folder, config, files, factors, whole)
    _refuse_changed_copies(adapter, base)
    for name in adapter.changed:
        if name not in base.tensors and not (layout.tied and name == layout.head):
            raise IncompatibleError(f"{base.folder} stores no tensor {name}, which {folder} changes")
    return adapter


def _refuse(folder: Path, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise IncompatibleError(
            f"{folder} {what}: {', '.join(sorted(names)[:3])}{more}",
            rule="Every tensor of an adapter is used once, or nothing is merged.",
        )


def _refuse_inexact(folder: Path, config: Any) -> None:
    reasons = [f"{name} is set" for name in _UNSUPPORTED if getattr(config, name, None)]
    if config.bias != "none":
        reasons.append(f"it trained biases ({config.bias})")
    start = config.init_lora_weights
    if start not in _PLAIN_STARTS:
        reasons.append(f"its start {start!r} changed the base in a way that cannot be repeated")
    if reasons:
        raise IncompatibleError(
            f"{folder} cannot be merged exactly: {'; '.join(reasons)}",
            rule="LoRA, rsLoRA, DoRA and PiSSA with trained norms, embeddings and heads can.",
        )


def _fits(module: str, parts: dict[str, StoredTensor], layout: Layout, config: Any) -> bool:
    shape = layout.parameters.get(f"{module}.weight")
    if shape is None or len(shape) != 2:
        return False
    found = set(parts) - {"copy"}
    if found == {"left_t", "right_t"} and not config.use_dora:
        left, right = parts["left_t"].shape, parts["right_t"].shape
        return left[0] == right[1] and (left[1], right[0]) == shape
    if found != {"left", "right"} | ({"magnitude"} if config.use_dora else set()):
        return False
    left, right = parts["left"].shape, parts["right"].shape
    magnitude = parts["magnitude"].shape if config.use_dora else (shape[0],)
    copy = parts["copy"].shape if "copy" in parts else shape
    return left[1] == right[0] and (left[0], right[1]) == shape and magnitude == (shape[0],) and copy == shape


def _missing(
    config: Any, factors: dict[str, dict[str, StoredTensor]], whole: dict[str, StoredTensor], layout: Layout
) -> list[str]:
    """Modules that PEFT would look for in the file and not find."""
    from peft.tuners.tuners_utils import check_target_module_exists

    saved = config.modules_to_save or []
    replaced = {m for m in layout.modules if any(m == n or m.endswith(f".{n}") for n in saved)}
    expected = {n: n in whole for n in layout.parameters if n.rsplit(".", 1)[0] in replaced}
    targets = {m for m in layout.adaptable - replaced if check_target_module_exists(config, m)}
    expected |= {f"{module}.lora_A": module in factors for module in targets}
    return [f"{_PREFIX}{name}" for name, found in expected.items() if not found]


def read_factors(parts: dict[str, StoredTensor]) -> tuple[Callable[[int, int], Tensor], Tensor]:
    """One module's factors, `delta = scale * left @ right`.

    Returns:
        A function that gives rows `[last - first, rank]` of the left factor, and the right factor `[rank, columns]`,
        both float64.
    """
    if "left" in parts:
        left = parts["left"]
        return (lambda first, last: left.read(first, last).double()), parts["right"].read().double()
    turned = parts["left_t"].read().T  # an embedding's factors are stored transposed
    return (lambda first, last: turned[first:last].double()), parts["right_t"].read().double().T


@dataclass(frozen=True)
class _Adapted:
    """`base + scale * left @ right`; with DoRA, each row of it is brought to its magnitude."""

    base: Rows
    left: Callable[[int, int], Tensor]
    right: Tensor
    scale: float
    magnitude: StoredTensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def rows(self, first: int, last: int) -> Tensor:
        total = torch.addmm(self.base.rows(first, last), self.left(first, last), self.right, alpha=self.scale)
        if self.magnitude is not None:
            total *= self.magnitude.read(first, last).double() / total.norm(dim=1, keepdim=True)
        return total


class _PissaResidual:
    """The base without its `rank` largest singular directions, rounded to the training dtype as PEFT does it.

    The one transformation here that needs a whole matrix: singular vectors have no rows-only form. The product that is
    taken away does not depend on their signs, so it can be computed again from the base.
    """

    def __init__(self, base: Rows, rank: int, dtype: torch.dtype) -> None:
        self.shape = base.shape
        matrix = base.rows(0, base.shape[0])
        left, values, right = torch.linalg.svd(matrix.float(), full_matrices=False)
        principal = (left[:, :rank] * values[:rank]).double() @ right[:rank].double()
        self._rows = round_once(matrix - principal, dtype)

    def rows(self, first: int, last: int) -> Tensor:
        return self._rows[first:last].double()


def _refuse_changed_copies(adapter: Adapter, base: TensorFolder) -> None:
    """Check the copies of embeddings that PEFT saves beside their factors: they must be the base's.

    Raises:
        IncompatibleError: A copy differs, so the adapter was trained over another embedding.
    """
    for module, parts in adapter.factors.items():
        copy = parts.get("copy")
        stored = base.tensors.get(f"{module}.weight")
        if copy is None or stored is None:
            continue
        for first in range(0, matrix_shape(copy.shape)[0], 1024):
            last = min(first + 1024, copy.shape[0])
            if not torch.equal(copy.read(first, last).to(stored.dtype), stored.read(first, last)):
                raise IncompatibleError(
                    f"{adapter.folder} was trained over another {module} than its base has"
                )
