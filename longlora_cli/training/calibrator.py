"""A training calibrates its own plans: the first batches are timed and weighed, and later plans use what they tell.

Only on GPUs. There, other tiles or another place to wait change nothing but rounding, which no two runs share anyway.
On a CPU a resumed run must equal an uninterrupted one bit for bit, and a plan that depends on the clock would break
that.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.calibration import (
    Calibration,
    MeasuredBatch,
    copy_rate,
    excess_gpu_bytes,
    seconds_ratio,
)
from longlora_cli.memory.machine import CONTEXT_BYTES
from longlora_cli.memory.plan import MemoryPlan
from longlora_cli.training.engine import Planner, RunningEngine
from longlora_cli.training.meter import release_memory

_log = logging.getLogger("longlora")
# The median of three is untouched by one that the system or a new kernel interrupted; at a million tokens more would
# take hours.
_TIMED_BATCHES = 3
# Time matters where the batches are long, and on short ones a GPU waits for its kernels to be started.
_LONG_SHARE = 0.5
# Plans stay where what they assume is as near as this: a new one may have to register host memory (0.64 s/GiB).
_NEAR = 0.05
# A larger peak than predicted counts beyond what is left free in any case (machine.py).
_NOTICEABLE_SHARE = 0.01
# For each round in which the allocator had to give blocks back: as much as a roomy plan leaves (roomy.py), at most
# four times, because what fits only so is not helped by planning.
RETRY_SHARE, _RETRY_ROUNDS = 0.03, 4


@contextlib.contextmanager
def measure_batch(
    plan: MemoryPlan, documents: Sequence[int], device: torch.device
) -> Iterator[list[MeasuredBatch]]:
    """Time and weigh a forward and backward pass, which must have ended when the block ends.

    Args:
        plan: Its plan.
        documents: Lengths of its documents.
        device: Where it runs; its peak counter is reset.

    Yields:
        A list that holds the measured batch afterwards.
    """
    gpu = device.type == "cuda"
    found: list[MeasuredBatch] = []
    before = _retries(device)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    yield found
    if gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated(device) + CONTEXT_BYTES if gpu else 0
    found.append(MeasuredBatch(plan, tuple(documents), seconds, peak, _retries(device) - before))


def _retries(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    # As a nested dictionary: `memory_stats` flattens and sorts two hundred numbers each time.
    return int(torch.cuda.memory_stats_as_nested_dict(device).get("num_alloc_retries", 0))


class BatchCalibrator:
    """Watches the batches of a training and corrects its planner.

    Args:
        planner: Whose plans are followed.
        arena: Where activations wait on the host.
        device: Where the batches run.
    """

    def __init__(self, planner: Planner, arena: HostArena, device: torch.device) -> None:
        self.planner, self.arena, self.device = planner, arena, device
        self._assumed = planner.machine
        self._warm = self._timed_all = False
        self._timed: list[MeasuredBatch] = []
        self._excess_bytes = self._retry_rounds = 0
        self._news: dict[str, float] = {}

    @classmethod
    def of(cls, engine: RunningEngine, planner: Planner, device: torch.device) -> BatchCalibrator | None:
        """The calibrator of a training; None on a CPU, and where the plan predicts nothing (the generic path)."""
        if engine.path != "fused" or engine.arena is None or device.type != "cuda":
            return None
        return cls(planner, engine.arena, device)

    @contextlib.contextmanager
    def batch(self, document_lengths: list[list[int]]) -> Iterator[None]:
        """Around the forward and backward pass of a batch with these documents; afterwards plans may be others."""
        documents = [n for row in document_lengths for n in row]
        registered = self.arena.registered_bytes
        with measure_batch(self.planner.plan(sum(documents)), documents, self.device) as found:
            yield
        # The first batch compiles kernels, and those that register host memory wait for that.
        if self._warm and self.arena.registered_bytes == registered:
            self.see(found[0])
        self._warm = True

    def news(self) -> dict[str, float]:
        """Figures for the metrics, once after each correction; empty otherwise."""
        news, self._news = self._news, {}
        return news

    def see(self, batch: MeasuredBatch) -> None:
        """Take a measured batch into account."""
        left = self._weigh(batch)
        if left > self.planner.calibration.left_gpu_bytes:
            gib = left / 2**30
            why = (
                "the allocator had to give blocks back" if batch.retries else "a batch took more than planned"
            )
            _log.info("plans leave %.2f GiB more of the GPU from here on: %s", gib, why)
            self._correct(replace(self.planner.calibration, left_gpu_bytes=left))
        longest = sum(self.planner.documents)
        long = sum(batch.documents) >= _LONG_SHARE * longest
        if self._timed_all or not long or batch.retries:
            return
        self._timed.append(batch)
        if len(self._timed) == _TIMED_BATCHES:
            self._timed_all = True
            self._clock()
            self._timed.clear()

    def _weigh(self, batch: MeasuredBatch) -> int:
        """GPU bytes to leave after this batch."""
        shape, card = self.planner.shape, self._assumed.gpu_bytes
        excess = excess_gpu_bytes(batch, shape, self._assumed)
        if excess > self._excess_bytes + _NOTICEABLE_SHARE * card:
            self._excess_bytes = excess
        if batch.retries and self._retry_rounds < _RETRY_ROUNDS:
            self._retry_rounds += 1
        return self._excess_bytes + int(self._retry_rounds * RETRY_SHARE * card)

    def _clock(self) -> None:
        """Fit the rates to the timed batches."""
        before = self.planner.calibration
        copies = copy_rate(self.arena)
        rates = replace(before, copy_bytes_per_second=copies)
        ratio = seconds_ratio(self._timed, self.planner.shape, rates.machine(self._assumed))
        rates = replace(rates, seconds_ratio=ratio or 1.0)
        assumed = self._assumed.copy_bytes_per_second
        near = abs(rates.seconds_ratio - 1) <= _NEAR and abs((copies or assumed) / assumed - 1) <= _NEAR
        found = {"calibrated_seconds_ratio": ratio, "calibrated_copy_gb_per_second": copies and copies / 1e9}
        self._news |= {name: round(value, 4) for name, value in found.items() if value is not None}
        said = (
            "copies take all the time"
            if ratio is None
            else f"computation takes {ratio:.2f} of what was assumed"
        )
        rate = "" if copies is None else f", copies run at {copies / 1e9:.1f} GB/s each way"
        then = "plans stay as they are" if near else "plans from here on use it"
        _log.info("calibrated by %d batches: %s%s; %s", len(self._timed), said, rate, then)
        self._correct(before if near else rates)

    def _correct(self, calibration: Calibration) -> None:
        if calibration != self.planner.calibration:
            self.planner.recalibrate(calibration)
            release_memory(self.device)  # cached blocks have the sizes of the plans before
        longest = self.planner.plan(sum(self.planner.documents)).predicted
        self._news |= {
            "calibrated_left_gpu_gib": round(calibration.left_gpu_bytes / 2**30, 3),
            "predicted_batch_seconds": round(longest.seconds, 4),
        }
