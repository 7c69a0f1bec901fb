"""One longest step, run for real, so that a plan is believed before hours depend on it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from longlora_cli.config import TrainConfig
from longlora_cli.data.chunk import Chunk
from longlora_cli.data.collate import collate
from longlora_cli.data.shorter import cut
from longlora_cli.memory.arena import HostArena
from longlora_cli.memory.calibration import (
    Calibration,
    MeasuredBatch,
    copy_rate,
    excess_gpu_bytes,
    seconds_ratio,
)
from longlora_cli.memory.machine import CONTEXT_BYTES
from longlora_cli.models.loading import LoadedModel
from longlora_cli.training.calibrator import RETRY_SHARE, measure_batch
from longlora_cli.training.engine import Planner, RunningEngine
from longlora_cli.training.meter import release_memory

# The first step compiles kernels, makes cuDNN's plans for its length and the optimizer's state. From 256K tokens on,
# where a step takes minutes, a short one must do.
_LONG_TOKENS, _SHORT_TOKENS = 256 * 1024, 8 * 1024


@dataclass(frozen=True)
class Probed:
    """What a probe found.

    Args:
        measured: `peak_gpu_bytes` (on a GPU), `host_bytes` in which activations waited, `seconds` of forward and
            backward, `evaluation_seconds`, and the `loss` of the step that warmed up.
        calibration: What this says about the planner's assumptions; None where it predicts nothing (the generic path).
    """

    measured: dict[str, Any]
    calibration: Calibration | None


def probe(
    config: TrainConfig, loaded: LoadedModel, engine: RunningEngine, planner: Planner, chunk: Chunk
) -> Probed:
    """Train on the longest chunk and read it as evaluation would; nothing is written and nothing kept.

    Args:
        config: Batch size, optimizer and precision.
        loaded: Model with its adapter, the engine on it.
        engine: The engine.
        planner: Its plans, not calibrated yet.
        chunk: The longest chunk, repeated to a whole batch.
    """
    device, model = loaded.device, loaded.model
    optimizer = _optimizer(config, [p for p in model.parameters() if p.requires_grad])
    batch = _batch(config, chunk, device)
    documents = [n for row in batch["document_lengths"] for n in row]
    plan = planner.plan(sum(documents))
    arena = engine.arena if engine.path == "fused" else None
    if arena is not None:  # registered now, as in a training before its second step
        arena.reserve(plan.predicted.host_bytes)
    short = sum(documents) >= _LONG_TOKENS
    model.train()
    loss = _forward_backward(loaded, _batch(config, cut(chunk, 0, _SHORT_TOKENS), device) if short else batch)
    _update(optimizer)
    with measure_batch(plan, documents, device) as found:
        _forward_backward(loaded, batch)
    _update(optimizer)
    release_memory(device)
    model.eval()
    begin = time.perf_counter()
    with torch.no_grad(), _autocast(loaded):
        batch.pop("labels")
        hidden = loaded.hidden(**batch, use_cache=False).last_hidden_state
        float(hidden[0, -1, 0])
    measured: dict[str, Any] = {}
    if device.type == "cuda":  # of all this, since `measure_batch` began
        measured["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device) + CONTEXT_BYTES
    measured["host_bytes"] = 0 if engine.arena is None else engine.arena.peak_bytes
    measured |= {"seconds": found[0].seconds, "evaluation_seconds": time.perf_counter() - begin, "loss": loss}
    return Probed(measured, None if arena is None else _calibration(found[0], planner, arena))


def _calibration(batch: MeasuredBatch, planner: Planner, arena: HostArena) -> Calibration:
    rates = Calibration(copy_bytes_per_second=copy_rate(arena))
    ratio = seconds_ratio([batch], planner.shape, rates.machine(planner.machine))
    left = excess_gpu_bytes(batch, planner.shape, planner.machine)
    if batch.retries:
        left += int(RETRY_SHARE * planner.machine.gpu_bytes)
    return replace(rates, seconds_ratio=ratio or 1.0, left_gpu_bytes=left)


def _batch(config: TrainConfig, chunk: Chunk, device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in collate([chunk] * config.batch_size, pad_id=0).items()
    }


def _forward_backward(loaded: LoadedModel, batch: dict[str, Any]) -> float:
    """The loss, when the GPU is done."""
    with _autocast(loaded):
        loss = loaded.model(**batch, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def _update(optimizer: Any) -> None:
    optimizer.step()
    optimizer.zero_grad()


def _autocast(loaded: LoadedModel) -> Any:
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = kinds.get(loaded.dtype)
    return torch.autocast(loaded.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> Any:
    """The optimizer of the training, for the memory it takes."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    import bitsandbytes

    kind = (
        bitsandbytes.optim.AdamW8bit
        if config.optimizer == "adamw_8bit"
        else bitsandbytes.optim.PagedAdamW8bit
    )
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
