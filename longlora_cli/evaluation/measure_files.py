"""Ask and judge the questions of file-based tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from longlora_cli.evaluation.file_plan import CutCounts, FilePlan, question_of
from longlora_cli.evaluation.file_scores import score_file_task
from longlora_cli.evaluation.generation import Advance, Answerer, Question, predict, speed
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.likelihood import Weigher, weigh
from longlora_cli.evaluation.measure import TaskResult
from longlora_cli.evaluation.tasks.files.opening import FileTask
from longlora_cli.evaluation.tasks.prompts import plain_text


class Model(Answerer, Weigher, Protocol):
    """What answers and weighs."""


def measure_file_task(
    task: FileTask,
    model: Model,
    plan: FilePlan,
    journal: Journal,
    identity: object,
    advance: Advance | None = None,
) -> TaskResult:
    """Ask the questions of one task, or weigh its choices; `advance` is called with questions.

    Raises:
        DataError: A row cannot be used, or all are too long and skipped.
    """
    counts = CutCounts()
    shared: dict[str, Any] = {"settings": identity, "journal": journal, "advance": advance}
    if task.family.is_choice:
        rows = list(weigh(model, _with_texts(task, plan, counts), plan.tokenizer, **shared))
    else:
        rows = list(predict(model, plan.questions(task, counts), max_new_tokens=1, **shared))
    if journal.shard is not None:
        return TaskResult.of_share(rows)
    summary, scored = score_file_task(task.family, task.task, rows, counts)
    return TaskResult({**summary, **speed(rows)}, scored)


def _with_texts(task: FileTask, plan: FilePlan, counts: CutCounts) -> Iterator[tuple[Question, str]]:
    for found in plan.fitted(task, counts):
        yield question_of(found, plan.limits), plain_text(found.sample)
