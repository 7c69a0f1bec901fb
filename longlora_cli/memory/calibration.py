"""What real batches say about the planner's predictions: rates of this machine, and GPU memory to leave free.

A prediction is computed for the batch as it ran (its tokens, its documents, the plan it had) and compared with the
clock and with the allocator. One factor on all rates of computation is fitted, because forward and backward cannot be
told apart from outside; the copy rate is measured by itself, since a step whose copies are hidden says nothing of it.
Profiling a few steps to plan the rest is in MEMO (Zhao et al. 2024, arXiv:2407.12117) too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from longlora_cli.errors import ResourceError
from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.cost import Setting, StepCost, squared_lengths
from longlora_cli.memory.machine import Machine
from longlora_cli.memory.plan import KINDS, MemoryPlan, ModelShape
from longlora_cli.memory.planner import PLACES

# Ratios that are looked for. Unknown chips are assumed at 100 TFLOP/s and some do 500; on a tiny model a GPU waits
# for its kernels to be started and takes hundreds of times what its arithmetic needs.
_LEAST_RATIO, _MOST_RATIO = 2.0**-6, 2.0**14
_HALVINGS = 40
# A batch that takes no more than this much of what its copies alone take says nothing about computation.
_COPY_BOUND = 1.25
# 5 ms at 55 GB/s, so that starting the copies (20 us) does not count.
_COPY_BYTES = 2**28
_LEAST_COPY_BYTES = 2**20
_COPY_ROUNDS = 4


@dataclass(frozen=True)
class MeasuredBatch:
    """One forward and backward pass as it ran.

    Args:
        plan: The plan it had, which may be that of a longer batch.
        documents: Lengths of its documents, padding's too; together its tokens.
        seconds: Until the GPU was done.
        peak_gpu_bytes: Most GPU memory meanwhile, CUDA's context included as in `Prediction`; 0 was not measured.
        retries: How often the allocator had to give cached blocks back to find room.
    """

    plan: MemoryPlan
    documents: tuple[int, ...]
    seconds: float
    peak_gpu_bytes: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Calibration:
    """Corrections of what the planner assumes; without any, nothing changes.

    Args:
        seconds_ratio: Measured over predicted seconds of computation.
        copy_bytes_per_second: Between GPU and host, each way at the same time; None leaves the assumed rate.
        left_gpu_bytes: GPU memory that plans leave unused beyond what they leave anyway.
    """

    seconds_ratio: float = 1.0
    copy_bytes_per_second: float | None = None
    left_gpu_bytes: int = 0

    def machine(self, machine: Machine) -> Machine:
        """The machine with these rates and this much less GPU memory."""
        rates = {"seconds_ratio": self.seconds_ratio}
        if self.copy_bytes_per_second is not None:
            rates["copy_bytes_per_second"] = self.copy_bytes_per_second
        again = machine.recalibrated(rates)
        return replace(again, gpu_bytes=max(again.gpu_bytes - self.left_gpu_bytes, 0))


def predict(
    plan: MemoryPlan, shape: ModelShape, machine: Machine, documents: Sequence[int]
) -> tuple[float, int]:
    """Seconds and peak GPU bytes of a batch under a plan that was made for it or for a longer one.

    Args:
        plan: Where everything waits.
        shape: The model.
        machine: Rates; its sizes are not looked at.
        documents: Lengths of the batch's documents.
    """
    codes = [[PLACES.index(layer.place(kind)) for layer in plan.layers] for kind in KINDS]
    places = np.array([codes])
    inner = (PLACES.index(plan.inner_input), PLACES.index(plan.inner_attention))
    setting = Setting(plan.tile_tokens, plan.loss_tile, plan.kv_heads_per_call, *inner)
    shape = shape.without_embedding() if plan.embedding_on_host else shape
    cost = StepCost(shape, sum(documents), squared_lengths(documents, plan.shifted_group), machine)
    found, _ = cost.seconds(places, setting)
    seconds = float(found[0]) + (cost.lookup_seconds if plan.embedding_on_host else 0.0)
    return seconds, int(np.ceil(cost.gpu_peak(places, setting)[0]))


def seconds_ratio(batches: Sequence[MeasuredBatch], shape: ModelShape, machine: Machine) -> float | None:
    """By what to divide `machine`'s rates of computation, so that its predictions are what was measured.

    The median over batches, because one that the system interrupted is no measure.

    Args:
        batches: What was measured.
        shape: The model.
        machine: With the copy rate that counts.

    Returns:
        The ratio; None when no batch says anything: its copies took all of its time, or no ratio explains it.
    """
    found = [r for batch in batches if (r := _ratio(batch, shape, machine)) is not None]
    return statistics.median(found) if found else None


def _ratio(batch: MeasuredBatch, shape: ModelShape, machine: Machine) -> float | None:
    def seconds(ratio: float) -> float:
        rates = machine.recalibrated({"seconds_ratio": ratio})
        return predict(batch.plan, shape, rates, batch.documents)[0]

    low, high = _LEAST_RATIO, _MOST_RATIO
    if batch.seconds <= _COPY_BOUND * seconds(low) or batch.seconds >= seconds(high):
        return None
    for _ in range(_HALVINGS):  # seconds grow with the ratio
        middle = math.sqrt(low * high)
        low, high = (middle, high) if seconds(middle) < batch.seconds else (low, middle)
    return math.sqrt(low * high)


def excess_gpu_bytes(batch: MeasuredBatch, shape: ModelShape, machine: Machine) -> int:
    """By how much a batch's GPU memory exceeded its prediction; 0 when it did not, or was not measured."""
    _, predicted = predict(batch.plan, shape, machine, batch.documents)
    return max(batch.peak_gpu_bytes - predicted, 0)


def copy_rate(arena: HostArena, size_bytes: int = _COPY_BYTES) -> float | None:
    """Bytes per second that the arena copies out while as many come back, the best of a few tries.

    Takes two blocks of `size_bytes` in the arena and three on the device meanwhile; call it when nothing else runs.

    Args:
        arena: Open, with nothing under way.
        size_bytes: Of one copy; less where the arena is small.

    Returns:
        The rate; None when the arena or the device has no room to measure it.
    """
    size = min(size_bytes, arena.free_bytes // 2 - _LEAST_COPY_BYTES)
    if size < _LEAST_COPY_BYTES:
        return None
    try:
        values = torch.zeros(size, dtype=torch.uint8, device=arena.device)
        # The first round registers the memory.
        return size / min(_copy_seconds(arena, values) for _ in range(_COPY_ROUNDS))
    except (ResourceError, torch.OutOfMemoryError):  # a measurement must not end a training
        return None


def _copy_seconds(arena: HostArena, values: Tensor) -> float:
    """Seconds of copying `values` out while as many bytes come back."""
    back = arena.save(values)
    slots = [back]
    try:
        _wait(arena.device)
        begin = time.perf_counter()
        slots.append(arena.save(values))
        arena.prefetch(back)
        _wait(arena.device)
        return time.perf_counter() - begin
    finally:
        for slot in slots:
            arena.drop(slot)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
