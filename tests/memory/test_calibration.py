"""What measured batches say about predictions: each factor is found again, and nothing is learnt from nothing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longlora_cli.errors import ResourceError
from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.calibration import (
    Calibration,
    MeasuredBatch,
    copy_rate,
    excess_gpu_bytes,
    predict,
    seconds_ratio,
)
from longlora_cli.memory.machine import Machine
from longlora_cli.memory.plan import MemoryPlan, ModelShape
from longlora_cli.memory.planner import make_plan

GIB = 2**30
# Llama-3.1-8B in NF4 with an adapter of rank 16.
SHAPE = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, 2, int(5.31 * GIB), 42_000_000, 16)
MACHINE = Machine(77 * GIB, 128 * GIB)


def plan_of(tokens: int, machine: Machine = MACHINE, **more: Any) -> MemoryPlan:
    return make_plan(SHAPE, tokens, machine, **more)


def batch_of(plan: MemoryPlan, machine: Machine, *documents: int, times: float = 1.0) -> MeasuredBatch:
    """A batch that took `times` what `machine` is predicted to take."""
    return MeasuredBatch(plan, documents, times * predict(plan, SHAPE, machine, documents)[0])


@pytest.mark.parametrize(
    ("tokens", "more"),
    [
        (8192, {}),
        (131072, {}),
        (131072, {"documents": [100_000, 31_072]}),
        (524288, {}),
        (65536, {"shifted_group": 8192}),
        (4096, {"explicit": {"tile_tokens": 512, "kv_heads_per_call": 1, "group": 4}}),
    ],
)
def test_the_prediction_of_a_batch_that_the_plan_was_made_for_is_the_plans(
    tokens: int, more: dict[str, Any]
) -> None:
    plan = plan_of(tokens, **more)
    seconds, gpu = predict(plan, SHAPE, MACHINE, more.get("documents", [tokens]))
    assert seconds == pytest.approx(plan.predicted.seconds, rel=1e-12)
    assert gpu == plan.predicted.peak_gpu_bytes


def test_a_shorter_batch_under_the_same_plan_takes_less_and_packed_documents_less_time() -> None:
    plan = plan_of(131072)
    whole, packed, half = (predict(plan, SHAPE, MACHINE, d) for d in ([131072], [4096] * 32, [65536]))
    assert packed[0] < 0.8 * whole[0]
    assert packed[1] == whole[1]
    assert half[0] < 0.5 * whole[0]
    assert half[1] < whole[1]


def test_a_plan_with_its_embedding_on_the_host_is_predicted_as_the_planner_did() -> None:
    shape = dataclasses.replace(SHAPE, embedding_bytes=2 * SHAPE.vocabulary * SHAPE.width)
    plan = make_plan(shape, 16384, MACHINE, explicit={"embedding": "host"})
    seconds, gpu_bytes = predict(plan, shape, MACHINE, [16384])
    assert plan.embedding_on_host
    assert seconds == pytest.approx(plan.predicted.seconds)
    assert gpu_bytes == plan.predicted.peak_gpu_bytes


@pytest.mark.parametrize("true_ratio", [0.6, 1.0, 1.7, 40.0])
@pytest.mark.parametrize("tokens", [8192, 131072, 1048576])
def test_the_factor_by_which_computation_is_slower_is_found(tokens: int, true_ratio: float) -> None:
    slower = MACHINE.recalibrated({"seconds_ratio": true_ratio})
    batch = batch_of(plan_of(tokens), slower, tokens)
    assert seconds_ratio([batch], SHAPE, MACHINE) == pytest.approx(true_ratio, rel=1e-3)


def test_slow_copies_are_not_taken_for_slow_computation() -> None:
    real = MACHINE.recalibrated({"seconds_ratio": 1.2, "copy_bytes_per_second": 1.5e10})
    plan = plan_of(32768, explicit={"offload": "host", "keep_attention": True})
    batch = batch_of(plan, real, 32768)
    known = Calibration(copy_bytes_per_second=1.5e10).machine(MACHINE)
    assert seconds_ratio([batch], SHAPE, known) == pytest.approx(1.2, rel=1e-3)
    assert seconds_ratio([batch], SHAPE, MACHINE) > 1.25  # type: ignore[operator]


def test_one_interrupted_batch_changes_nothing() -> None:
    plan = plan_of(32768)
    batches = [batch_of(plan, MACHINE, 32768, times=t) for t in (1.1, 25.0, 1.1)]
    assert seconds_ratio(batches, SHAPE, MACHINE) == pytest.approx(1.1, rel=0.02)


def test_a_batch_that_waits_for_copies_says_nothing_about_computation() -> None:
    slow = dataclasses.replace(MACHINE, copy_bytes_per_second=1e8)
    plan = plan_of(32768, explicit={"offload": "host", "keep_attention": True})
    assert plan.kept("input", "host") == 32
    assert seconds_ratio([batch_of(plan, slow, 32768)], SHAPE, slow) is None


def test_memory_beyond_the_prediction_is_counted_and_less_is_not() -> None:
    plan = plan_of(32768)
    batch = MeasuredBatch(plan, (32768,), 1.0)
    for peak, excess in ((plan.predicted.peak_gpu_bytes + 12345, 12345), (GIB, 0), (0, 0)):
        measured = dataclasses.replace(batch, peak_gpu_bytes=peak)
        assert excess_gpu_bytes(measured, SHAPE, MACHINE) == excess


def test_without_corrections_the_machine_is_the_same() -> None:
    assert Calibration().machine(MACHINE) == MACHINE


def test_plans_of_a_calibrated_machine_use_its_rates_and_leave_its_memory() -> None:
    machine = Calibration(1.5, 2e10, 10 * GIB).machine(MACHINE)
    assert machine.copy_bytes_per_second == 2e10
    before, after = plan_of(32768), plan_of(32768, machine)
    assert after.predicted.seconds > 1.3 * before.predicted.seconds
    assert after.predicted.peak_gpu_bytes <= 0.99 * 67 * GIB < before.predicted.peak_gpu_bytes


@pytest.fixture
def arena() -> Iterator[HostArena]:
    with HostArena(torch.device("cpu"), 16 * 2**20) as found:
        yield found


def test_copies_are_timed_and_nothing_stays_in_the_arena(
    arena: HostArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = copy_rate(arena, 2**20)
    assert arena.used_bytes == 0
    fetch = arena.prefetch

    def late(slot: Any) -> None:
        time.sleep(0.02)
        fetch(slot)

    monkeypatch.setattr(arena, "prefetch", late)
    slow = copy_rate(arena, 2**20)
    assert fast is not None
    assert slow is not None
    assert slow < 2**20 / 0.02 < fast


def test_an_arena_without_room_measures_no_copies(arena: HostArena) -> None:
    slot = arena.save(torch.zeros(15 * 2**20, dtype=torch.uint8))
    assert copy_rate(arena) is None
    arena.take(slot)
    assert copy_rate(arena) is not None


def test_copies_that_the_system_refuses_are_not_measured_and_nothing_stays(
    arena: HostArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(slot: Any) -> None:
        raise ResourceError("CUDA refuses to register 1 GiB of host memory")

    monkeypatch.setattr(arena, "prefetch", refuse)
    assert copy_rate(arena) is None
    assert arena.used_bytes == 0


@pytest.mark.gpu
def test_a_gpu_copies_both_ways_at_the_rate_of_its_link() -> None:
    with HostArena(torch.device("cuda"), GIB) as arena:
        rate = copy_rate(arena)
    assert rate is not None
    assert 5e9 < rate < 1e12
