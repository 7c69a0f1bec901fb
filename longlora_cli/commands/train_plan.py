"""What `longlora train` is about to do: data, context length and memory plan, and the probe that checks the plan."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longlora_cli.beacon.loading import load_model, train_beacons
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.config import TrainConfig
from longlora_cli.console import Console
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.long_documents import LongDocuments
from longlora_cli.data.shorter import ShorterChunks
from longlora_cli.errors import SettingsError
from longlora_cli.memory.calibration import Calibration
from longlora_cli.memory.plan import MemoryPlan
from longlora_cli.memory.planner import describe as describe_plan
from longlora_cli.models import adapter as adapters
from longlora_cli.models.loading import LoadedModel, choose_dtype, choose_quantization
from longlora_cli.models.source import RUN_STATE, ModelSource, base_folder
from longlora_cli.parallel.mesh import Mesh
from longlora_cli.training.engine import (
    Planner,
    choose_path,
    embedding_fault,
    machine_for,
    model_shape,
    outline_fault,
    start_engine,
)
from longlora_cli.training.probe import probe

# Rows of a plan that the generic path follows.
_GENERIC_ROWS = ("tokens in a step", "layer groups", "layer inputs kept", "tiles")
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class PlannedTraining:
    """Data and memory plan of a training that has not begun.

    Args:
        data: Chunks as they will be read.
        context_length: Tokens to train for.
        longest: Index of the longest chunk.
        longest_batch: Tokens of the largest batch.
        planner: Its memory plans; None where there are beacons.
        path: `fused`, `generic`, `none` or `beacons`.
        cut_chunks: Chunks that are longer than the context and are cut.
        beacons: How beacons are trained; None without.
    """

    data: ChunkDataset | ShorterChunks | LongDocuments
    context_length: int
    longest: int
    longest_batch: int
    planner: Planner | None
    path: str
    cut_chunks: int = 0
    beacons: BeaconSettings | None = None


def plan_training(
    config: TrainConfig, prepared: ChunkDataset, source: ModelSource, device: torch.device, mesh: Mesh
) -> PlannedTraining:
    """Find the context length and check that a step of it fits, from configs alone, before any weight is read.

    Raises:
        SettingsError: `--max-length` is below the data's longest chunk.
        ResourceError: No plan fits.
        IncompatibleError: The model cannot train as asked.
    """
    from transformers import AutoConfig

    folder = base_folder(source.base)
    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    quantization = choose_quantization(config, source, folder, training=True)
    path = choose_path(config, outline_fault(model_config, config, quantization))
    element_bytes = _ELEMENT_BYTES[choose_dtype(config)]
    fault = embedding_fault(model_config, config, path, device, source)
    shape = model_shape(model_config, config, quantization, element_bytes, embedding_can_move=fault is None)
    machine = machine_for(config, device, mesh.world, element_bytes)
    planner = Planner(config, shape, machine)
    data: ChunkDataset | ShorterChunks = prepared
    if config.max_length == "auto":
        limit = _resumed_length(config.out) or planner.longest() // config.batch_size
        if limit < prepared.longest_chunk:
            data = ShorterChunks(prepared, limit)
        context_length = data.longest_chunk
    else:
        context_length = config.max_length or prepared.longest_chunk
        if context_length < prepared.longest_chunk:
            raise SettingsError(
                f"--max-length {context_length:,} is below the longest chunk of the data, "
                f"{prepared.longest_chunk:,} tokens",
                hint="Prepare the data with this --max-length, give a larger one, or --max-length auto.",
            )
    longest = max(range(len(data)), key=lambda index: len(data[index]))
    documents = tuple(int(n) for n in data[longest].document_lengths) * config.batch_size
    planner = Planner(config, shape, machine, documents)
    batch = len(data[longest]) * config.batch_size
    if path != "none":
        planner.decide(batch)  # refused here when it does not fit
    cut = data.cut_chunks if isinstance(data, ShorterChunks) else 0
    return PlannedTraining(data, context_length, longest, batch, planner, path, cut)


def _resumed_length(folder: Path) -> int | None:
    """The context length that a run in this folder began with; it must not follow the free memory of the day."""
    state = folder / RUN_STATE
    if not state.is_file():
        return None
    found = json.loads(state.read_text(encoding="utf-8"))["facts"].get("context_length")
    return None if found is None else int(found)


def load_trained(
    config: TrainConfig, newest: Path | None, context_length: int, beacons: BeaconSettings | None = None
) -> LoadedModel:
    """Load the base with fresh adapter and beacons, with those that `--model` brings, or with a checkpoint's."""
    torch.manual_seed(config.seed)
    if newest is not None:
        resumed = config.model_copy(update={"model": str(newest)})
        loaded = load_model(resumed, None, context_length=context_length, training=True)
    else:
        loaded = load_model(config, config, context_length=context_length, training=True)
        if not loaded.source_has_adapter and config.adapter != "none":
            loaded.model = adapters.attach(loaded.model, config, quantization=loaded.quantization)
    if beacons is not None:
        train_beacons(loaded, beacons)
    return loaded


def describe(config: TrainConfig, planned: PlannedTraining, console: Console) -> dict[str, Any]:
    """Say what training would do, and with `--probe` run one longest step of it."""
    per_step = config.batch_size * config.accumulate
    facts: dict[str, Any] = {
        "chunks": len(planned.data),
        "context_length": planned.context_length,
        "steps": config.steps or max(1, round(config.epochs * len(planned.data) / per_step)),
        "chunks_per_step": per_step,
        "engine": planned.path,
    }
    console.table("would train", ["", ""], facts.items())
    if planned.path == "none" or planned.planner is None:
        if config.probe:
            raise SettingsError("--probe compares a plan, and --engine none has none")
        return {"dry_run": True, **facts}
    plan = planned.planner.plan(planned.longest_batch)
    rows = describe_plan(plan, planned.planner.shape, planned.planner.machine)
    facts["predicted"] = {}
    if planned.path == "fused":
        facts["predicted"] = _predicted(plan)
    else:  # the plan's arithmetic is the fused path's; the generic one follows these parts of it and takes more
        rows = [row for row in rows if row[0] in _GENERIC_ROWS]
        rows.append(("memory and time", "not predicted on the generic path; --probe measures them"))
    console.table(f"memory plan for {planned.longest_batch:,} tokens", ["", ""], rows)
    facts["plan"] = dict(rows)
    if config.probe:
        facts |= _probe(config, planned, console, facts["predicted"])
    return {"dry_run": True, **facts}


def _probe(
    config: TrainConfig, planned: PlannedTraining, console: Console, predicted: dict[str, Any]
) -> dict[str, Any]:
    """Run one longest step, and say what was measured and what the plan becomes with it."""
    planner = planned.planner
    assert planner is not None  # beacons, which have none, refuse --probe
    loaded = load_trained(config, None, planned.context_length)
    engine = start_engine(loaded, planner, planned.longest_batch)
    try:
        found = probe(config, loaded, engine, planner, planned.data[planned.longest])
    finally:
        engine.close()
    facts: dict[str, Any] = {"measured": found.measured}
    calibrated: dict[str, Any] = {}
    if found.calibration is not None:
        planner.recalibrate(found.calibration)
        calibrated = _predicted(planner.plan(planned.longest_batch))
        facts |= {"calibration": asdict(found.calibration), "calibrated": calibrated}
    rows = _compared(predicted, found.measured, calibrated)
    console.table("probe", ["", "predicted", "measured", "calibrated"], rows)
    if found.calibration is not None:
        console.table("calibration", ["", ""], _corrections(found.calibration))
    return facts


def _predicted(plan: MemoryPlan) -> dict[str, Any]:
    names = ("peak_gpu_bytes", "host_bytes", "disk_bytes", "seconds")
    return {name: getattr(plan.predicted, name) for name in names}


def _corrections(calibration: Calibration) -> list[tuple[str, str]]:
    """What the measured step says about this machine; a training finds it by itself in its first batches."""
    copies = calibration.copy_bytes_per_second
    return [
        ("time of computation", f"{calibration.seconds_ratio:.2f} of what was assumed"),
        ("copies each way", "not measured" if copies is None else f"{copies / 1e9:.1f} GB/s"),
        ("GPU memory to leave", f"{calibration.left_gpu_bytes / 2**30:.2f} GiB"),
    ]


def _compared(
    predicted: dict[str, Any], measured: dict[str, Any], calibrated: dict[str, Any]
) -> list[tuple[str, str, str, str]]:
    """Rows of predicted, measured and predicted with what was learnt; what one of them does not know is empty."""
    rows = []
    for name in measured:
        values = [found.get(name) for found in (predicted, measured, calibrated)]
        if name.endswith("_bytes"):
            shown = [f"{v / 2**30:.2f} GiB" if v is not None else "" for v in values]
        else:
            shown = [f"{v:.3f}" if v is not None else "" for v in values]
        rows.append((name.removesuffix("_bytes").replace("_", " "), shown[0], shown[1], shown[2]))
    return rows
