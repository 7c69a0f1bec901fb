"""Run a plan on a model, keeping each finished piece in the journal."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longlora_cli.evaluation.generation import Advance, Answerer, Row, predict, score_rows, speed
from longlora_cli.evaluation.grid import score_grid
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.perplexity import Float32
from longlora_cli.evaluation.plan import EvalPlan
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

    @classmethod
    def of_share(cls, rows: list[Row]) -> TaskResult:
        """What a share of an evaluation gives: answers, which are judged when all shares are there."""
        return cls({"n": len(rows)}, rows)


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
    if journal.shard is not None:
        return TaskResult.of_share(rows)
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
    if journal.shard is not None:
        return TaskResult.of_share(rows)
    summary, scored = score_rows(rows, load_metrics(plan.config.metrics))
    return TaskResult({**summary, **speed(rows)}, scored)


def peak_bytes(loaded: LoadedModel) -> int:
    """Most memory used so far: allocated on the GPU, or resident in this process on a CPU."""
    if loaded.device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(loaded.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
