"""Chooses what a training step keeps on the GPU, on the host, on disk, and what it computes again.

The order in which memory is filled is that of FLOPs saved per byte: O with its log-sum-exp saves about as many as the
sequence has tokens, the input of a layer inside a group about 47,000 for Llama-3.1-8B, q/k/v and gate/up the width of
the model. Groups of layers after Chen et al. 2016 (arXiv:1604.06174); value by density as in MEMO (Zhao et al. 2024,
arXiv:2407.12117), which solves an integer program for what one order does here.

A frozen input embedding of its own may wait on the host (`host_embedding.py`): a second set of candidates, with more
room on the GPU and a lookup that costs time.

The candidates do not depend on how much memory there is, and the fastest that fits is taken. So more memory is never
slower and never shorter, which tests/memory/test_planner.py holds it to. (An embedding that went to the host only when
nothing else fits would break this: the slowest plan beside it on a card that just holds it takes longer.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longlora_cli.errors import ResourceError, SettingsError
from longlora_cli.memory.candidates import Candidates, Fixed, KeepOrder, keep_orders
from longlora_cli.memory.cost import DISK, GPU, HOST, INPUT, Array, Setting, StepCost, squared_lengths
from longlora_cli.memory.machine import CONTEXT_BYTES, Machine
from longlora_cli.memory.plan import (
    STAGING_BYTES,
    LayerPlan,
    MemoryPlan,
    ModelShape,
    Place,
    Prediction,
)
from longlora_cli.memory.plan_table import describe, size

__all__ = ["describe", "longest_context", "make_plan"]

PLACES: tuple[Place, ...] = ("recompute", "gpu", "host", "disk")
# A tile takes at most so many numbers of the hidden state: 16K tokens of an 8B model, at which products run at full
# speed. Narrow models need more tokens for that, and fewer launches bound their step.
_TILE_NUMBERS = 16384 * 4096
_TILES = (131072, 65536, 32768, 16384, 8192, 4096, 2048, 1024, 512, 256)
_LOSS_SHARE = 4  # a row of logits takes ten times the vocabulary, more than an MLP row: fewer rows at once
_MOST_ELEMENTS = 2**31  # kernels with 32-bit indices end here
_STEP_TOKENS = 256  # contexts are found in steps of this
_LONGEST_TOKENS = 2**36


def make_plan(
    shape: ModelShape,
    tokens: int,
    machine: Machine,
    *,
    documents: Sequence[int] | None = None,
    shifted_group: int = 0,
    explicit: Mapping[str, Any] = {},
) -> MemoryPlan:
    """The fastest plan that fits.

    Args:
        shape: The model.
        tokens: Tokens of one step, batch times length.
        machine: Memory and rates.
        documents: Lengths of the packed documents; attention stays inside each. Default: one of `tokens` tokens.
        shifted_group: Tokens of an S2-Attn group; 0 is full attention.
        explicit: Parts that the user fixed: `group`, `offload` (gpu, host or disk, for layer inputs), `keep_attention`,
            `keep_qkv`, `keep_gate_up` (how many layers, the last ones; true is all), `tile_tokens`, `loss_tile`,
            `kv_heads_per_call`, `embedding` (gpu or host). The rest is chosen.

    Raises:
        SettingsError: An unknown key, a value that no plan can have, or documents longer than `tokens`.
        ResourceError: No plan fits; the message has what the smallest one needs and what there is.
    """
    ways = _Search.ways(shape, tokens, machine, documents, shifted_group, explicit)
    best: tuple[_Found, _Search] | None = None
    for search in ways:
        for setting in search.settings():
            bound = float("inf") if best is None else best[0].seconds
            if search.fastest(setting) >= bound:
                continue
            found = search.best(setting, bound)
            if found is not None and (best is None or found.beats(best[0])):
                best = found, search
    if best is None:
        longest = _longest(shape, machine, shifted_group, explicit, below=tokens)
        raise _too_large(ways, longest)
    return _plan_of(*best, shifted_group)


def longest_context(
    shape: ModelShape,
    machine: Machine,
    *,
    shifted_group: int = 0,
    explicit: Mapping[str, Any] = {},
) -> int:
    """The most tokens, a multiple of 256, for which `make_plan` with the same arguments finds a plan.

    Raises:
        SettingsError: As `make_plan`.
        ResourceError: Not even 256 tokens fit.
    """

    found = _longest(shape, machine, shifted_group, explicit, below=_LONGEST_TOKENS)
    if not found:
        ways = _Search.ways(shape, _STEP_TOKENS, machine, None, shifted_group, explicit)
        raise _too_large(ways, found)
    return found


def _longest(
    shape: ModelShape, machine: Machine, shifted_group: int, explicit: Mapping[str, Any], *, below: int
) -> int:
    """The most tokens that fit, a multiple of 256; 0 when not even 256 do."""

    def fits(steps: int) -> bool:
        tokens = steps * _STEP_TOKENS
        ways = _Search.ways(shape, tokens, machine, None, shifted_group, explicit)
        return any(search.feasible() for search in ways)

    low, high = 0, 1
    while high * _STEP_TOKENS < below and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * _STEP_TOKENS


@dataclass(frozen=True)
class _Found:
    seconds: float
    flops: float
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int
    places: Array
    setting: Setting

    def beats(self, other: _Found) -> bool:
        """Faster, or as fast with fewer bytes."""
        mine, theirs = (f.gpu_bytes + f.host_bytes + f.disk_bytes for f in (self, other))
        return (self.seconds, mine) < (other.seconds, theirs)


@dataclass(frozen=True)
class _Search:
    """Plans of one step with the input embedding in one place.

    Args:
        cost: Of the model as the GPU holds it.
        machine: Memory and rates.
        fixed: What the user fixed.
        host_limit: Host memory for activations.
        moved_bytes: Of the embedding, when it is on the host.
        shifted: The heads attend in two halves (S2-Attn), so no call has all of them.
    """

    cost: StepCost
    machine: Machine
    fixed: Fixed
    host_limit: int
    moved_bytes: int = 0
    shifted: bool = False

    @classmethod
    def ways(
        cls,
        shape: ModelShape,
        tokens: int,
        machine: Machine,
        documents: Sequence[int] | None,
        shifted_group: int,
        explicit: Mapping[str, Any],
    ) -> list[_Search]:
        """With the embedding on the GPU, and with it on the host, as far as model and user allow."""
        if tokens < 1:
            raise SettingsError(f"a step of {tokens} tokens", rule="It must have at least 1.")
        lengths = [tokens] if documents is None else list(documents)
        if sum(lengths) > tokens or any(n < 1 for n in lengths):
            raise SettingsError(
                f"documents of {sum(lengths):,} tokens in a step of {tokens:,}",
                rule="Each has at least 1 token, together they have at most the step's.",
            )
        fixed = Fixed.of(explicit, shape, machine)
        squares, host = squared_lengths(lengths, shifted_group), machine.host_bytes_for_activations
        ways, halves = [], shifted_group > 0
        if fixed.embedding != "host":
            ways.append(cls(StepCost(shape, tokens, squares, machine), machine, fixed, host, 0, halves))
        if fixed.embedding != "gpu" and (moved := shape.embedding_bytes):
            cost = StepCost(shape.without_embedding(), tokens, squares, machine)
            ways.append(cls(cost, machine, fixed, host - moved - STAGING_BYTES, moved, halves))
        return ways

    @functools.cached_property
    def loading_bytes(self) -> float:
        """GPU memory before the first step: an embedding leaves it only after the whole model was loaded there."""
        shape = self.cost.shape
        return shape.weight_bytes + self.moved_bytes + 4 * shape.trainable + CONTEXT_BYTES

    @property
    def lookup_seconds(self) -> float:
        """What the embedding's place adds to a step."""
        return self.cost.lookup_seconds if self.moved_bytes else 0.0

    @functools.cached_property
    def _room_bytes(self) -> float:
        """What can be kept at the end of forward, all places together."""
        running = self.cost.static_bytes + float(self.cost.sizes[INPUT])
        away = self.host_limit + self.machine.disk_bytes
        return self.machine.gpu_bytes_for_step - running + away

    def settings(self) -> list[Setting]:
        """Tiles and heads per call, fastest first."""
        found = [
            Setting(tile, self._loss_tile(tile), heads) for tile in self._tiles() for heads in self._heads()
        ]
        return sorted(found, key=self.fastest)

    def _tiles(self) -> Sequence[int]:
        if self.fixed.tile_tokens:
            return (self.fixed.tile_tokens,)
        # A tile beyond the step is the step; the next smaller power of two is then a tile of its own.
        widest = _TILE_NUMBERS // self.cost.shape.width
        return [t for t in _TILES if t < 2 * self.cost.tokens and t <= widest] or [_TILES[-1]]

    def _loss_tile(self, tile: int) -> int:
        return self.fixed.loss_tile or max(tile // _LOSS_SHARE, 64)

    def _heads(self) -> Sequence[int]:
        shape = self.cost.shape
        if self.fixed.kv_heads_per_call is not None:
            return (self.fixed.kv_heads_per_call,)
        divisors = {h for h in (shape.kv_heads // 2, 1) if h and shape.kv_heads % h == 0}
        whole = [] if self.shifted and shape.kv_heads > 1 else [0]
        choices = [*whole, *sorted(divisors - {shape.kv_heads}, reverse=True)]
        per_head = self.cost.tokens * shape.heads // shape.kv_heads * shape.head_dim
        indexable = [h for h in choices if per_head * (h or shape.kv_heads) < _MOST_ELEMENTS]
        return indexable or choices[-1:]

    def fastest(self, setting: Setting) -> float:
        """Seconds with everything kept and no copies: no plan with this setting is faster."""
        layers = self.cost.shape.layers
        everything = np.full((1, 4, layers), GPU)
        return float(self.cost.seconds(everything, setting)[0][0]) + self.lookup_seconds

    def smallest(self) -> Setting:
        """The setting that takes the least memory."""
        tile, heads = min(self._tiles()), self._heads()[-1]
        return Setting(tile, self._loss_tile(tile), heads)

    def feasible(self) -> bool:
        """Whether any plan fits: if one does, then one with the smallest tiles.

        Fewer heads at once need not take less: copies of their operands can outweigh the temporaries they divide.
        """
        smallest = self.smallest()
        return any(
            found is not None
            for heads in reversed(self._heads())
            for found in self._each(replace(smallest, kv_heads_per_call=heads), float("inf"))
        )

    def best(self, setting: Setting, bound: float) -> _Found | None:
        """The fastest plan of this setting among those that take less than `bound` seconds."""
        best: _Found | None = None
        for found in self._each(setting, bound):
            if found is not None and (best is None or found.beats(best)):
                best = found
        return best

    def _each(self, setting: Setting, bound: float) -> Iterator[_Found | None]:
        for order, variant in self.variants(setting):
            yield self._fill(order, variant, bound)

    def variants(self, setting: Setting) -> Iterator[tuple[KeepOrder, Setting]]:
        """Orders of keeping, each with the places where a group's inner tensors may wait."""
        for order in keep_orders(self.cost.shape.layers, self.fixed):
            for inner in self.fixed.inner_places() if order.group > 1 else [(GPU, GPU)]:
                yield order, replace(setting, inner_input=inner[0], inner_attention=inner[1])

    def _fill(self, order: KeepOrder, setting: Setting, bound: float) -> _Found | None:
        """The fastest prefix of `order` that fits, as much of it on the GPU as fits there, the rest on the host."""
        if self.loading_bytes > self.machine.gpu_bytes_for_step:
            return None
        candidates = Candidates(self.cost, self.fixed, order, setting)
        rows = np.flatnonzero(candidates.kept_bytes() <= self._room_bytes)
        rows = rows[candidates.seconds_without_copies(rows) + self.lookup_seconds < bound]
        if len(rows):
            rows = rows[candidates.gpu(rows, np.zeros(len(rows), int)) <= self.machine.gpu_bytes_for_step]
        if not len(rows):
            return None
        on_gpu = _most(
            lambda n: candidates.gpu(rows, n) <= self.machine.gpu_bytes_for_step, candidates.kept_count(rows)
        )
        host_limit = self.host_limit
        # The fewest on disk with which the host suffices; none without a disk or a need.
        short = candidates.host(rows, on_gpu, np.zeros(len(rows), int)) > host_limit
        most = candidates.kept_count(rows) * (short if self.machine.disk_bytes else 0)
        spilled = most - _most(lambda n: candidates.host(rows, on_gpu, most - n) <= host_limit, most)
        places = candidates.places(rows, on_gpu, spilled)
        peaks = [self.cost.away_peak(places, setting, place) for place in (HOST, DISK)]
        fits = (peaks[0] <= host_limit) & (peaks[1] <= self.machine.disk_bytes)
        if not fits.any():
            return None
        seconds, flops = self.cost.seconds(places, setting)
        seconds = seconds + self.lookup_seconds
        gpu = self.cost.gpu_peak(places, setting)
        total = gpu + peaks[0] + peaks[1]
        i = int(np.lexsort((total, np.where(fits, seconds, np.inf)))[0])
        gpu_bytes, host_bytes, disk_bytes = (int(np.ceil(peak[i])) for peak in (gpu, *peaks))
        return _Found(
            float(seconds[i]), float(flops[i]), gpu_bytes, host_bytes, disk_bytes, places[i], setting
        )


def _most(holds: Callable[[Array], Array], most: Array) -> Array:
    """The largest number from 0 to `most` for which `holds`, each; 0 where it never does. It must hold up to one."""
    low, high = np.zeros_like(most), most.copy()
    while (low < high).any():
        middle = (low + high + 1) // 2
        good = holds(middle)
        low, high = np.where(good, middle, low), np.where(good, high, middle - 1)
    return low


def _plan_of(found: _Found, search: _Search, shifted_group: int) -> MemoryPlan:
    setting, cost = found.setting, search.cost
    layers = tuple(LayerPlan(*(PLACES[place] for place in layer)) for layer in found.places.T)
    predicted = Prediction(
        found.gpu_bytes, found.host_bytes, found.disk_bytes, found.seconds, found.flops,
        cost.flops.model(cost.shape.layers),
    )  # fmt: skip
    return MemoryPlan(
        cost.tokens, layers, PLACES[setting.inner_input], PLACES[setting.inner_attention],
        min(setting.tile_tokens, cost.tokens), min(setting.loss_tile, cost.tokens),
        setting.kv_heads_per_call, shifted_group, predicted, bool(search.moved_bytes),
    )  # fmt: skip


def _too_large(ways: Sequence[_Search], longest: int) -> ResourceError:
    """Why nothing fits: the plan that misses by least, and the first thing to change."""
    _, needs = min((_missing(search) for search in ways), key=lambda found: found[0])
    said = ", ".join(f"{what} {size(need)} of {size(have)}" for what, need, have in needs)
    machine, static_bytes = ways[0].machine, min(max(w.cost.static_bytes, w.loading_bytes) for w in ways)
    if longest:
        hint = f"At most {longest:,} tokens fit here with these settings."
    elif static_bytes > machine.gpu_bytes_for_step:
        hint = f"The model alone takes {size(static_bytes)}: quantize it, or take a smaller one."
    else:
        hint = "Fix fewer parts of the plan."
    (_, gpu_bytes, _), (_, host_bytes, host_limit), _ = needs
    if host_bytes > host_limit and gpu_bytes <= machine.gpu_bytes_for_step:
        hint += f" Or free {size(host_bytes - host_limit)} of host memory, or give a folder on a fast disk."
    return ResourceError(
        f"{ways[0].cost.tokens:,} tokens do not fit; the smallest plan needs {said}",
        rule="What a step needs is computed before it runs, and must be there.",
        hint=hint,
    )


def _missing(search: _Search) -> tuple[float, list[tuple[str, float, float]]]:
    """By how many bytes the plan of one way that misses by least does, and its (place, need, have)."""
    machine, setting = search.machine, search.smallest()
    moved = search.moved_bytes and search.moved_bytes + STAGING_BYTES
    host_limit = search.host_limit + moved
    best: tuple[float, float, float, float] | None = None
    for order, variant in search.variants(setting):
        candidates = Candidates(search.cost, search.fixed, order, variant)
        rows = np.arange(len(candidates.kept))
        none = np.zeros(len(rows), int)
        for on_gpu in (none, candidates.kept_count(rows)):
            places = candidates.places(rows, on_gpu, none)
            gpu = np.maximum(search.cost.gpu_peak(places, variant), search.loading_bytes)
            host, disk = (search.cost.away_peak(places, variant, place) for place in (HOST, DISK))
            host = host + moved
            over = np.maximum(gpu - machine.gpu_bytes_for_step, 0) + np.maximum(host - host_limit, 0)
            i = int(over.argmin())
            if best is None or over[i] < best[0]:
                best = float(over[i]), float(gpu[i]), float(host[i]), float(disk[i])
    assert best is not None  # there is always an order
    over_bytes, *needs = best
    haves = (machine.gpu_bytes_for_step, host_limit, machine.disk_bytes)
    return over_bytes, list(zip(("GPU", "host", "disk"), needs, haves, strict=True))
