"""One longest step, run for real, so that a plan is believed before hours depend on it."""

from __future__ import annotations

import time
from typing import Any

import torch

from longlora_cli.config import TrainConfig
from longlora_cli.data.chunk import Chunk
from longlora_cli.data.collate import collate
from longlora_cli.models.loading import LoadedModel
from longlora_cli.training.engine import RunningEngine
from longlora_cli.training.meter import release_memory

# The first step compiles kernels and makes cuDNN's plans; the second is what every later one costs.
_STEPS = 2


def probe(config: TrainConfig, loaded: LoadedModel, engine: RunningEngine, chunk: Chunk) -> dict[str, Any]:
    """Train on the longest chunk and read it as evaluation would; nothing is written and nothing kept.

    Args:
        config: Batch size, optimizer and precision.
        loaded: Model with its adapter, the engine on it.
        engine: The engine.
        chunk: The longest chunk, repeated to a whole batch.

    Returns:
        `peak_gpu_bytes` (on a GPU), `host_bytes` in which activations waited, `seconds` of the second step,
        `evaluation_seconds`, and the first step's `loss`.
    """
    device, model = loaded.device, loaded.model
    batch = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in collate([chunk] * config.batch_size, pad_id=0).items()
    }
    optimizer = _optimizer(config, [p for p in model.parameters() if p.requires_grad])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model.train()
    losses, seconds = [], 0.0
    for _ in range(_STEPS):
        begin = time.perf_counter()
        with _autocast(loaded):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))  # waits for the GPU
        seconds = time.perf_counter() - begin
    release_memory(device)
    model.eval()
    begin = time.perf_counter()
    with torch.no_grad(), _autocast(loaded):
        batch.pop("labels")
        hidden = loaded.hidden(**batch, use_cache=False).last_hidden_state
        float(hidden[0, -1, 0])
    measured: dict[str, Any] = {}
    if device.type == "cuda":
        measured["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    measured["host_bytes"] = 0 if engine.arena is None else engine.arena.peak_bytes
    measured |= {"seconds": seconds, "evaluation_seconds": time.perf_counter() - begin, "loss": losses[0]}
    return measured


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
