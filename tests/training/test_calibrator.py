"""Training corrects its own plans: by long batches, once for time, whenever memory is exceeded, never on a CPU."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from longlora_cli.commands import train
from longlora_cli.config import TrainConfig
from longlora_cli.console import Console
from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.calibration import Calibration, MeasuredBatch, predict
from longlora_cli.memory.machine import Machine
from longlora_cli.memory.plan import ModelShape
from longlora_cli.storage import read_json_lines
from longlora_cli.training import calibrator as module
from longlora_cli.training.calibrator import BatchCalibrator
from longlora_cli.training.engine import Planner, RunningEngine

GIB = 2**30
LONG = 32768
SHAPE = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, 2, int(5.31 * GIB), 42_000_000, 16)
COPIES = 55e9


@pytest.fixture
def planner() -> Planner:
    """Of batches of up to 32K tokens of an 8B model on a card of 77 GiB."""
    return Planner(TrainConfig(data=["d"], out=Path("o")), SHAPE, Machine(77 * GIB, 128 * GIB), (LONG,))


@pytest.fixture
def watching(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(module, "copy_rate", lambda arena: COPIES)
    with HostArena(torch.device("cpu"), 2**20) as arena:
        yield BatchCalibrator(planner, arena, torch.device("cpu"))


def batch(
    planner: Planner, *, tokens: int = LONG, times: float = 1.0, more_bytes: int = 0, retries: int = 0
) -> Any:
    """A batch that took `times` the assumed time of computation, and `more_bytes` than predicted."""
    plan = planner.plan(tokens)
    slower = planner.machine.recalibrated({"seconds_ratio": times, "copy_bytes_per_second": COPIES})
    seconds, gpu = predict(plan, SHAPE, slower, [tokens])
    return MeasuredBatch(plan, (tokens,), seconds, gpu + more_bytes, retries)


def test_three_long_batches_correct_the_plans_seconds_and_say_so_once(
    planner: Planner, watching: BatchCalibrator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "longlora")
    before = planner.plan(LONG).predicted.seconds
    for _ in range(2):
        watching.see(batch(planner, times=1.4))
    assert watching.news() == {}
    watching.see(batch(planner, times=1.4))
    assert planner.calibration.seconds_ratio == pytest.approx(1.4, rel=1e-3)
    assert 1.2 * before < planner.plan(LONG).predicted.seconds <= 1.41 * before
    assert watching.news() == {
        "calibrated_seconds_ratio": pytest.approx(1.4, rel=1e-3),
        "calibrated_copy_gb_per_second": 55.0,
        "calibrated_left_gpu_gib": 0.0,
        "predicted_batch_seconds": pytest.approx(planner.plan(LONG).predicted.seconds, abs=1e-4),
    }
    for _ in range(4):
        watching.see(batch(planner, times=3.0))
    assert watching.news() == {}
    assert [r.getMessage().split(";")[0] for r in caplog.records] == [
        "calibrated by 3 batches: computation takes 1.40 of what was assumed, copies run at 55.0 GB/s each way"
    ]


def test_plans_stay_when_the_prediction_was_near(planner: Planner, watching: BatchCalibrator) -> None:
    plan = planner.plan(LONG)
    for _ in range(3):
        watching.see(batch(planner, times=1.04))
    assert planner.plan(LONG) is plan
    assert watching.news()["calibrated_seconds_ratio"] == pytest.approx(1.04, rel=1e-3)


def test_a_copy_rate_that_was_assumed_wrong_corrects_the_plans(
    planner: Planner, watching: BatchCalibrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "copy_rate", lambda arena: 1.2e10)
    for _ in range(3):
        watching.see(batch(planner))
    assert planner.calibration.copy_bytes_per_second == 1.2e10


def test_short_batches_are_not_timed(planner: Planner, watching: BatchCalibrator) -> None:
    for _ in range(10):
        watching.see(batch(planner, tokens=LONG // 4, times=9.0))
    assert planner.calibration == Calibration()


def test_what_a_batch_takes_beyond_its_prediction_is_left_from_then_on(
    planner: Planner, watching: BatchCalibrator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "longlora")
    before = planner.plan(LONG).predicted.peak_gpu_bytes
    watching.see(batch(planner, more_bytes=3 * GIB))
    assert planner.calibration.left_gpu_bytes == 3 * GIB
    assert planner.plan(LONG).predicted.peak_gpu_bytes <= before - 2 * GIB
    assert watching.news()["calibrated_left_gpu_gib"] == 3.0
    assert "3.00 GiB more of the GPU" in caplog.text
    watching.see(batch(planner, more_bytes=3 * GIB))
    assert watching.news() == {}


def test_an_excess_within_the_reserve_changes_no_plan(planner: Planner, watching: BatchCalibrator) -> None:
    plan = planner.plan(LONG)
    watching.see(batch(planner, more_bytes=GIB // 2))
    assert planner.plan(LONG) is plan


def test_an_allocator_that_gives_blocks_back_gets_more_room_four_times(
    planner: Planner, watching: BatchCalibrator
) -> None:
    left = []
    for _ in range(6):
        watching.see(batch(planner, retries=2))
        left.append(planner.calibration.left_gpu_bytes / (77 * GIB))
    assert left == pytest.approx([0.03, 0.06, 0.09, 0.12, 0.12, 0.12], abs=1e-6)


def test_a_batch_in_which_the_allocator_gave_blocks_back_is_not_timed(
    planner: Planner, watching: BatchCalibrator
) -> None:
    for _ in range(5):
        watching.see(batch(planner, times=2.0, retries=1))
    assert planner.calibration.seconds_ratio == 1.0


def test_a_batch_that_fits_only_in_all_the_memory_goes_on_with_a_plan(planner: Planner) -> None:
    planner.machine = Machine(14 * GIB, 4 * GIB)
    before = planner.plan(LONG)
    planner.recalibrate(Calibration(2.0, None, 13 * GIB))
    after = planner.plan(LONG)
    assert after.predicted.peak_gpu_bytes <= planner.machine.gpu_bytes_for_step
    assert after.predicted.seconds > 1.5 * before.predicted.seconds


def test_the_first_batch_and_those_that_register_host_memory_are_not_looked_at(
    planner: Planner, watching: BatchCalibrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[MeasuredBatch] = []
    monkeypatch.setattr(watching, "see", seen.append)
    with watching.batch([[100, 28]]):
        pass
    with watching.batch([[60], [60]]):
        watching.arena._range.registered_bytes += 4096  # what a GPU's copies do when they need more
    assert seen == []
    with watching.batch([[50, 50], [100]]):
        pass
    (found,) = seen
    assert found.documents == (50, 50, 100)
    assert found.plan is planner.plan(200)


def test_only_the_fused_path_on_a_gpu_calibrates(planner: Planner) -> None:
    with HostArena(torch.device("cpu"), 2**20) as arena:
        engine = RunningEngine("fused", planner.plan, arena, lambda: None)
        assert isinstance(BatchCalibrator.of(engine, planner, torch.device("cuda")), BatchCalibrator)
        assert BatchCalibrator.of(engine, planner, torch.device("cpu")) is None
        generic = dataclasses.replace(engine, path="generic")
        assert BatchCalibrator.of(generic, planner, torch.device("cuda")) is None


def settings(model: Path, data: Path, out: Path, **more: Any) -> TrainConfig:
    values = {
        "model": str(model),
        "data": [str(data)],
        "device": "cpu",
        "lora_rank": 4,
        "steps": 6,
        "out": out,
    }
    return TrainConfig(**values | more)


def losses_and_corrections(config: TrainConfig) -> tuple[list[float], list[dict[str, Any]]]:
    train.run(config, Console(json_mode=True), dry_run=False)
    rows = read_json_lines(config.out / "metrics.jsonl")
    return [r["loss"] for r in rows if "loss" in r], [r for r in rows if "predicted_batch_seconds" in r]


def test_a_run_on_a_cpu_does_not_calibrate(
    tiny_model_folder: Path, tiny_data_folder: Path, tmp_path: Path
) -> None:
    _, corrections = losses_and_corrections(settings(tiny_model_folder, tiny_data_folder, tmp_path / "r"))
    assert corrections == []


def test_plans_that_change_on_the_way_change_no_loss_and_are_in_the_metrics(
    tiny_model_folder: Path, tiny_data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = losses_and_corrections(settings(tiny_model_folder, tiny_data_folder, tmp_path / "a"))
    plans = []

    def calibrated(engine: RunningEngine, planner: Planner, device: torch.device) -> BatchCalibrator:
        assert engine.arena is not None
        plans.append(planner.plan(96))
        original = planner.recalibrate

        def recalibrate(calibration: Calibration) -> None:
            original(calibration)
            planner.settings = planner.settings.model_copy(
                update={"plan": ["group=2", "tile_tokens=16", "offload=host"]}
            )
            plans.append(planner.plan(96))

        monkeypatch.setattr(planner, "recalibrate", recalibrate)
        return BatchCalibrator(planner, engine.arena, device)

    monkeypatch.setattr(BatchCalibrator, "of", calibrated)
    changed, corrections = losses_and_corrections(
        settings(tiny_model_folder, tiny_data_folder, tmp_path / "b")
    )
    assert changed == pytest.approx(plain, rel=1e-5)
    assert [plan.tile_tokens for plan in plans] == [96, 16]
    (row,) = corrections
    assert row["step"] == 3  # one to warm up, three measured, in the fourth step
    assert row["calibrated_seconds_ratio"] > 1  # of a machine that is assumed to take no time for small steps


@pytest.mark.gpu
def test_a_run_on_a_gpu_calibrates_itself(
    tiny_model_folder: Path, tiny_data_folder: Path, tmp_path: Path
) -> None:
    config = settings(tiny_model_folder, tiny_data_folder, tmp_path / "r", device="cuda", steps=8)
    _, corrections = losses_and_corrections(config)
    timed = [row for row in corrections if "calibrated_seconds_ratio" in row]
    assert len(timed) == 1
    assert timed[0]["calibrated_copy_gb_per_second"] > 1
