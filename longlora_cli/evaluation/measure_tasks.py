"""Ask and judge the questions of a synthetic task."""

from __future__ import annotations

from functools import partial
from typing import Any

from longlora_cli.evaluation.generation import Advance, Answerer
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.measure import TaskResult, ask_questions, asked_result
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
    asked = ask_questions(
        answerer,
        plan.sample_questions(task),
        journal,
        identity,
        control=plan.config.control,
        max_new_tokens=TASKS[task].max_new_tokens,
        advance=advance,
    )
    return asked_result(asked, journal, partial(score_task, threshold=plan.config.effective_score / 100))
