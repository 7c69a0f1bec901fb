"""The plans that the planner chooses among: what is kept first, what goes to the GPU first, what the user fixed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from longlora_cli.errors import SettingsError
from longlora_cli.memory.cost import ATTENTION, DISK, GATE_UP, GPU, HOST, INPUT, QKV, Array, Setting, StepCost
from longlora_cli.memory.machine import Machine
from longlora_cli.memory.plan import KINDS, ModelShape

_GROUPS = (1, 2, 3, 4, 5, 6, 8)
_OFFLOAD = {"gpu": GPU, "host": HOST, "disk": DISK}
_KEEP = {"keep_attention": ATTENTION, "keep_qkv": QKV, "keep_gate_up": GATE_UP}
_KEYS = ("group", "offload", *_KEEP, "tile_tokens", "loss_tile", "kv_heads_per_call", "embedding")
Item = tuple[int, int]  # kind, layer


@dataclass(frozen=True)
class Fixed:
    """Parts of a plan that the user fixed; None is free.

    Args:
        group: Layers of a group.
        offload: Place of layer inputs, a code of cost.py.
        keep: For attention, qkv and gate_up: how many layers, the last ones, keep it.
        tile_tokens: Tokens of a tile.
        loss_tile: Rows of logits held at once.
        kv_heads_per_call: Key-value heads in one attention call; 0 is all.
        embedding: `gpu` or `host`, where the input embedding is.
    """

    group: int | None = None
    offload: int | None = None
    keep: tuple[tuple[int, int], ...] = ()
    tile_tokens: int | None = None
    loss_tile: int | None = None
    kv_heads_per_call: int | None = None
    embedding: str | None = None

    @classmethod
    def of(cls, explicit: Mapping[str, Any], shape: ModelShape, machine: Machine) -> Fixed:
        """Check what the user wrote.

        Raises:
            SettingsError: An unknown key, or a value that this model or machine cannot have.
        """
        for key in explicit:
            if key not in _KEYS:
                raise SettingsError(
                    f"unknown part of a memory plan: {key}", rule=f"Known: {', '.join(_KEYS)}."
                )
        offload = explicit.get("offload")
        if offload is not None and offload not in _OFFLOAD:
            raise SettingsError(f"offload={offload}", rule=f"It is one of {', '.join(_OFFLOAD)}.")
        if offload == "disk" and not machine.disk_bytes:
            raise SettingsError(
                "offload=disk without a disk",
                hint="Name a folder on a fast disk with --disk-offload, or use offload=host.",
            )
        embedding = explicit.get("embedding")
        if embedding not in (None, "gpu", "host"):
            raise SettingsError(f"embedding={embedding}", rule="It is gpu or host.")
        if embedding == "host" and not shape.embedding_bytes:
            raise SettingsError(
                "embedding=host: this model's input embedding cannot wait on the host",
                rule="It must be frozen, a table of its own, and on a GPU.",
            )
        heads = _whole(explicit, "kv_heads_per_call", 0, shape.kv_heads)
        if heads and shape.kv_heads % heads:
            raise SettingsError(
                f"kv_heads_per_call={heads}", rule=f"It must divide the model's {shape.kv_heads}."
            )
        counts = {
            kind: shape.layers * explicit[key]
            if isinstance(explicit[key], bool)
            else _whole(explicit, key, 0, shape.layers)
            for key, kind in _KEEP.items()
            if key in explicit
        }
        return cls(
            _whole(explicit, "group", 1, shape.layers),
            None if offload is None else _OFFLOAD[offload],
            tuple((kind, count or 0) for kind, count in counts.items()),
            _whole(explicit, "tile_tokens", 1),
            _whole(explicit, "loss_tile", 1),
            heads,
            embedding,
        )

    def placed(self, places: Array) -> Array:
        """`places` `[candidates, kinds, layers]` with kept inputs where the user wants them; changed in place."""
        if self.offload is not None:
            places[:, INPUT][places[:, INPUT] > 0] = self.offload
        return places

    def inner_places(self) -> list[tuple[int, int]]:
        """Where a group's inner inputs and inner attention outputs may wait."""
        if self.offload is None:
            return [(GPU, GPU), (HOST, HOST)]
        inputs = GPU if self.offload == GPU else HOST
        return [(inputs, GPU), (inputs, HOST)]


def _whole(explicit: Mapping[str, Any], key: str, least: int, most: int | None = None) -> int | None:
    value = explicit.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least or value > (most or value):
        upto = "" if most is None else f" to {most}"
        raise SettingsError(f"{key}={value}", rule=f"It is a whole number from {least}{upto}.")
    return value


@dataclass(frozen=True)
class KeepOrder:
    """Groups of layers, and what else is kept, first things first.

    Args:
        layers: Layers of the model.
        group: Layers of a group.
        always: What every candidate keeps.
        then: What is kept while memory lasts.
    """

    layers: int
    group: int
    always: tuple[Item, ...]
    then: tuple[Item, ...]

    @functools.cached_property
    def prefixes(self) -> Array:
        """Whether each item is kept, `[prefixes, kinds * layers]`; prefix n keeps the first n of `then`."""
        rank = np.full((4, self.layers), len(self.then) + 1)
        for kind, layer in self.always:
            rank[kind, layer] = 0
        for position, (kind, layer) in enumerate(self.then):
            rank[kind, layer] = position + 1
        found: Array = rank.reshape(1, -1) <= np.arange(len(self.then) + 1)[:, None]
        return found


@functools.lru_cache(maxsize=64)
def keep_orders(layers: int, fixed: Fixed) -> tuple[KeepOrder, ...]:
    """All orders of keeping, for every size of groups.

    First what the last group needs, for its forward pass is its recomputation; then O before the inputs inside
    groups, or after; then gate/up and q/k/v. Last layers come first: backward uses and frees them first.
    """
    down = range(layers - 1, -1, -1)
    counts = dict(fixed.keep)
    orders: dict[KeepOrder, None] = {}  # a set that keeps its order
    for group in _GROUPS if fixed.group is None else (fixed.group,):
        if group > layers:
            continue
        first = range(0, layers, group)
        always = [(INPUT, i) for i in first]
        always += [(kind, i) for kind, count in counts.items() for i in range(layers - count, layers)]
        inside = {(INPUT, i) for i in range(layers) if i % group}
        last = [(kind, i) for i in range(layers - 1, first[-1] - 1, -1) for kind in (ATTENTION, INPUT)]
        attention, inputs, qkv, gate_up = (
            [(kind, i) for i in down] for kind in (ATTENTION, INPUT, QKV, GATE_UP)
        )
        excluded = {(kind, i) for kind in counts for i in range(layers)} | set(always)
        excluded |= inside - set(last) if fixed.group is not None else set()
        for order in (
            [*last, *attention, *inputs, *gate_up, *qkv],
            [*last, *inputs, *attention, *gate_up, *qkv],
            [*last, *attention, *inputs, *qkv],
            [*last, *inputs, *gate_up, *qkv, *attention],
        ):
            then = _once(item for item in order if item not in excluded)
            orders[KeepOrder(layers, group, tuple(always), then)] = None
    return tuple(orders)


def _once(items: Iterable[Item]) -> tuple[Item, ...]:
    return tuple(dict.fromkeys(items))


@functools.lru_cache(maxsize=64)
def gpu_order(layers: int, layers_first: bool) -> Array:
    """Items in the order in which they get GPU memory, as indices into `KeepOrder.prefixes`' items.

    Args:
        layers: Layers of the model.
        layers_first: All of a later layer before anything of an earlier one: right when every copy is hidden.
            Otherwise the largest tensors, whose copies are not, come before the small ones; the last layer, whose
            tensors go straight into its backward pass, is first in any case.
    """
    kinds = (GATE_UP, QKV, ATTENTION, INPUT)
    down = range(layers - 2, -1, -1)
    rest = [(k, i) for i in down for k in kinds] if layers_first else [(k, i) for k in kinds for i in down]
    return np.array([kind * layers + i for kind, i in [*((k, layers - 1) for k in kinds), *rest]])


@dataclass(frozen=True)
class Candidates:
    """All prefixes of one order of keeping.

    Args:
        cost: Of the model and the step.
        fixed: What the user fixed.
        order: What is kept first.
        setting: Tiles, heads per call and inner places.
    """

    cost: StepCost
    fixed: Fixed
    order: KeepOrder
    setting: Setting

    @functools.cached_property
    def kept(self) -> Array:
        """Whether each item is kept, `[prefixes, items]`, items numbered kind by kind."""
        return self.order.prefixes

    @functools.cached_property
    def _by_gpu(self) -> Array:
        return gpu_order(self.cost.shape.layers, layers_first=self.cost.copies_hide(self.setting))

    def kept_count(self, rows: Array) -> Array:
        """Items kept by each prefix."""
        return self.kept[rows].sum(1)

    def places(self, rows: Array, on_gpu: Array, on_disk: Array) -> Array:
        """Places `[rows, kinds, layers]` with the first `on_gpu` kept items on the GPU, the last `on_disk` on disk."""
        kept = self.kept[rows][:, self._by_gpu]
        position = np.cumsum(kept, 1)
        place = np.where(position <= on_gpu[:, None], GPU, HOST)
        last = position > np.maximum(kept.sum(1) - on_disk, on_gpu)[:, None]
        found = np.zeros_like(place)
        found[:, self._by_gpu] = np.where(kept, np.where(last & (place == HOST), DISK, place), 0)
        return self.fixed.placed(found.reshape(len(rows), len(KINDS), self.cost.shape.layers))

    def kept_bytes(self) -> Array:
        """Bytes that each prefix keeps, wherever."""
        found: Array = self.kept @ np.repeat(self.cost.sizes, self.cost.shape.layers)
        return found

    def seconds_without_copies(self, rows: Array) -> Array:
        """Seconds of each prefix at least."""
        places = (self.kept[rows] * GPU).reshape(len(rows), len(KINDS), self.cost.shape.layers)
        return self.cost.compute_seconds(places, self.setting)

    def gpu(self, rows: Array, on_gpu: Array) -> Array:
        """Peak GPU bytes."""
        places = self.places(rows, on_gpu, np.zeros(len(rows), int))
        return self.cost.gpu_peak(places, self.setting)

    def host(self, rows: Array, on_gpu: Array, on_disk: Array) -> Array:
        """Peak host bytes."""
        places = self.places(rows, on_gpu, on_disk)
        return self.cost.away_peak(places, self.setting, HOST)
