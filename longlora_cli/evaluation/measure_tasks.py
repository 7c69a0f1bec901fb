"""Ask and judge the questions of a synthetic task."""

from __future__ import annotations

from typing import Any

from longlora_cli.evaluation.generation import Advance, Answerer, predict, speed
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.measure import TaskResult
from longlora_cli.evaluation.plan import EvalPlan
from longlora_cli.evaluation.task_scores import score_task
from longlora_cli.evaluation.tasks.registry import TASKS


def measure_task(
    task: str,
    answerer: Answerer,
    plan: EvalPlan,
    journal: Journal,
    identity: Any,
    advance: Advance | None = None,
) -> TaskResult:
    """Ask the questions of a synthetic task; `advance` is called with questions."""
    rows = list(
        predict(
            answerer,
            plan.sample_questions(task),
            max_new_tokens=TASKS[task].max_new_tokens,
            settings=identity,
            journal=journal,
            advance=advance,
        )
    )
    if journal.shard is not None:
        return TaskResult.of_share(rows)
    summary, scored = score_task(rows, threshold=plan.config.effective_score / 100)
    return TaskResult({**summary, **speed(rows)}, scored)
