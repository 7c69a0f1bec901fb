"""Run a plan on a model, keeping each finished piece in the journal."""

from __future__ import annotations

import base64
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longlora_cli.config import EvalConfig
from longlora_cli.evaluation.generation import Advance, Answerer, Row, predict, score_rows, speed
from longlora_cli.evaluation.grid import score_grid
from longlora_cli.evaluation.journal import Journal, hash_ids, key_of
from longlora_cli.evaluation.perplexity import Float32, TextLosses, score_text, summarize
from longlora_cli.evaluation.plan import EvalPlan
from longlora_cli.evaluation.texts import Text
from longlora_cli.models.loading import LoadedModel
from longlora_cli.models.source import base_folder, fingerprint
from longlora_cli.storage import sha256_of


@dataclass(frozen=True)
class TaskResult:
    """What one task gave.

    Args:
        summary: For `results.json`.
        rows: For `samples/<task>.jsonl`.
        nll: Perplexity only: the losses of each text.
    """

    summary: dict[str, Any]
    rows: list[Row]
    nll: Sequence[Float32] = ()


def model_identity(loaded: LoadedModel) -> dict[str, Any]:
    """What decides a model's answers, as JSON: hashes of its weights, positions, numbers and attention."""
    adapter = loaded.source.adapter
    weights = [] if adapter is None else sorted(adapter.glob("*.safetensors"))
    return {
        "base": loaded.source.base,
        "base_fingerprint": fingerprint(base_folder(loaded.source.base)),
        "adapter": None if adapter is None else str(adapter),
        "adapter_folded": adapter is not None and not loaded.source_has_adapter,
        "adapter_sha256": [sha256_of(path) for path in weights],
        "rope": loaded.rope.to_json(),
        "own_length": loaded.own_length,
        "dtype": loaded.dtype,
        "quantization": loaded.quantization,
        "device": loaded.device.type,
        "attention": loaded.causal_lm.config._attn_implementation,
    }


def measure_perplexity(
    loaded: LoadedModel, plan: EvalPlan, journal: Journal, identity: Any, advance: Advance | None = None
) -> TaskResult:
    """Score the plan's texts; `advance` is called with tokens."""
    config = plan.config
    rows = []
    for text in plan.texts:
        key = key_of("ppl", hash_ids(text.ids.tolist()), config.window, stride_of(config), identity)
        row = journal.get(key)
        if row is None:
            row = _score(loaded, text, config, key, advance)
            journal.add(row)
        elif advance is not None:
            advance(len(text.ids) - 1)
        rows.append(row)
    found = [_unpack(row, config.window) for row in rows]
    sizes = [text.scored_bytes for text in plan.texts]
    seconds = sum(row["seconds"] for row in rows)
    summary = summarize(found, sizes, window=config.window)
    summary |= {"window": config.window, "stride": stride_of(config), "seconds": seconds}
    summary["tokens_per_second"] = summary["n"] / seconds if seconds > 0 else None
    samples = [
        {
            "text": text.name,
            "n": len(losses.nll),
            "nll": float(losses.nll.mean(dtype=np.float64)),
            "bytes": text.scored_bytes,
            "seconds": row["seconds"],
        }
        for text, losses, row in zip(plan.texts, found, rows, strict=True)
    ]
    return TaskResult(summary, samples, [losses.nll for losses in found])


def stride_of(config: EvalConfig) -> int:
    """The stride in use: the given one, else half a window."""
    return config.stride if config.stride is not None else max(1, config.window // 2)


def _score(loaded: LoadedModel, text: Text, config: EvalConfig, key: str, advance: Advance | None) -> Row:
    started = time.perf_counter()
    losses = score_text(
        loaded,
        text.ids.tolist(),
        window=config.window,
        stride=stride_of(config),
        chunk=config.prefill_chunk,
        advance=advance,
    )
    return {
        "key": key,
        "nll": _pack(losses.nll),
        "curve": _pack(losses.curve),
        "windows": losses.windows.tolist(),
        "seconds": round(time.perf_counter() - started, 4),
    }


def _pack(values: Float32) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _unpack(row: Row, window: int) -> TextLosses:
    def read(packed: str) -> Float32:
        return np.frombuffer(base64.b64decode(packed), dtype="<f4").astype(np.float32)

    return TextLosses(read(row["nll"]), np.array(row["windows"]), read(row["curve"]).reshape(-1, window - 1))


def measure_grid(
    task: str,
    answerer: Answerer,
    plan: EvalPlan,
    journal: Journal,
    identity: Any,
    advance: Advance | None = None,
) -> TaskResult:
    """Ask the questions of `passkey` or `needle`; `advance` is called with questions."""
    questions = plan.grid_questions(task)
    rows = list(
        predict(
            answerer,
            questions,
            max_new_tokens=plan.grid_answer_tokens,
            settings=identity,
            journal=journal,
            advance=advance,
        )
    )
    summary, scored = score_grid(rows, threshold=plan.config.effective_score / 100)
    return TaskResult({**summary, **speed(rows)}, scored)


def measure_generation(
    answerer: Answerer, plan: EvalPlan, journal: Journal, identity: Any, advance: Advance | None = None
) -> TaskResult:
    """Answer the plan's rows and score them with its metrics; `advance` is called with rows."""
    from longlora_cli.evaluation.metrics import (
        load_metrics,
    )  # imports datasets: 0.6 s that grids need not pay

    rows = list(
        predict(
            answerer,
            plan.rows,
            max_new_tokens=plan.config.max_new_tokens,
            settings=identity,
            journal=journal,
            advance=advance,
        )
    )
    summary, scored = score_rows(rows, load_metrics(plan.config.metrics))
    return TaskResult({**summary, **speed(rows)}, scored)


def peak_bytes(loaded: LoadedModel) -> int:
    """Most memory used so far: allocated on the GPU, or resident in this process on a CPU."""
    if loaded.device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(loaded.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
