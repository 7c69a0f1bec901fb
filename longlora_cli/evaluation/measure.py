"""Run a plan on a model, keeping each finished piece in the journal."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from longlora_cli.evaluation.control import Asked, ask_twice, bare_question
from longlora_cli.evaluation.generation import Advance, Answerer, Question, Row, predict, score_rows, speed
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
    beacons = loaded.source.beacons
    weights = [] if adapter is None else sorted(adapter.glob("*.safetensors"))
    weights += [] if beacons is None else sorted(beacons.glob("*.safetensors"))
    return {
        "base": loaded.source.base,
        "base_fingerprint": fingerprint(base_folder(loaded.source.base)),
        "adapter": None if adapter is None else str(adapter),
        "adapter_folded": loaded.source.low_rank is not None and not loaded.source_has_adapter,
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
    asked = ask_questions(
        answerer,
        plan.grid_questions(task),
        journal,
        identity,
        control=plan.config.control,
        max_new_tokens=plan.grid_answer_tokens,
        advance=advance,
    )
    return asked_result(asked, journal, partial(score_grid, threshold=plan.config.effective_score / 100))


def measure_generation(
    answerer: Answerer, plan: EvalPlan, journal: Journal, identity: Any, advance: Advance | None = None
) -> TaskResult:
    """Answer the plan's rows and score them with its metrics; `advance` is called with rows."""
    from longlora_cli.evaluation.metrics import (
        load_metrics,
    )  # imports datasets: 0.6 s that grids need not pay

    asked = ask_questions(
        answerer,
        plan.rows,
        journal,
        identity,
        control=plan.config.control,
        max_new_tokens=plan.config.max_new_tokens,
        advance=advance,
    )
    return asked_result(asked, journal, lambda rows: score_rows(rows, load_metrics(plan.config.metrics)))


def ask_questions(
    answerer: Answerer,
    questions: Iterable[Question],
    journal: Journal,
    identity: Any,
    *,
    control: str,
    max_new_tokens: int,
    advance: Advance | None,
) -> Asked:
    """Answer a task's questions, and its control's where one is wanted; `advance` is called with whole ones."""

    def ask(some: Iterable[Question], settings: Any, whole: bool) -> Iterator[Row]:
        return predict(
            answerer,
            some,
            max_new_tokens=max_new_tokens,
            settings=settings,
            journal=journal,
            advance=advance if whole else None,
        )

    return ask_twice(ask, questions, identity, control=control, bare_of=bare_question)


def asked_result(
    asked: Asked, journal: Journal, score: Callable[[Sequence[Row]], tuple[dict[str, Any], list[Row]]]
) -> TaskResult:
    """The result of a task's answers; a share's are not judged."""
    if journal.shard is not None:
        return TaskResult.of_share(asked.all)
    summary, scored = asked.controlled(*score(asked.rows), score)
    return TaskResult({**summary, **speed(asked.rows)}, scored)


def peak_bytes(loaded: LoadedModel) -> int:
    """Most memory used so far: allocated on the GPU, or resident in this process on a CPU."""
    if loaded.device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(loaded.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
