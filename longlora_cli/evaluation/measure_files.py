"""Ask and judge the questions of file-based tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from longlora_cli.evaluation.control import Asked, ask_twice, bare_question
from longlora_cli.evaluation.file_plan import CutCounts, FilePlan, question_of
from longlora_cli.evaluation.file_scores import score_file_task
from longlora_cli.evaluation.generation import Advance, Answerer, Question, Row
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.likelihood import Weigher, weigh
from longlora_cli.evaluation.measure import TaskResult, ask_questions, asked_result
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
    *,
    control: str = "none",
) -> TaskResult:
    """Ask the questions of one task, or weigh its choices; `advance` is called with questions.

    Raises:
        DataError: A row cannot be used, or all are too long and skipped.
    """
    counts = CutCounts()
    if task.family.is_choice:
        asked = _weigh_all(task, model, plan, counts, journal, identity, advance, control)
    else:
        asked = ask_questions(
            model,
            plan.questions(task, counts),
            journal,
            identity,
            control=control,
            max_new_tokens=1,  # each question says its own
            advance=advance,
        )
    return asked_result(asked, journal, lambda rows: score_file_task(task.family, task.task, rows, counts))


@dataclass(frozen=True)
class _Weighed:
    """A question of choices with its prompt as text, and that text without the context."""

    question: Question
    text: str
    bare_text: str | None = None


def _weigh_all(
    task: FileTask,
    model: Model,
    plan: FilePlan,
    counts: CutCounts,
    journal: Journal,
    identity: object,
    advance: Advance | None,
    control: str,
) -> Asked:
    def ask(some: Iterable[_Weighed], settings: Any, whole: bool) -> Iterator[Row]:
        pairs = ((one.question, one.text) for one in some)
        told = advance if whole else None
        return weigh(model, pairs, plan.tokenizer, settings=settings, journal=journal, advance=told)

    def bare_of(one: _Weighed) -> _Weighed | None:
        question = bare_question(one.question)
        return None if question is None or one.bare_text is None else _Weighed(question, one.bare_text)

    return ask_twice(ask, _with_texts(task, plan, counts), identity, control=control, bare_of=bare_of)


def _with_texts(task: FileTask, plan: FilePlan, counts: CutCounts) -> Iterator[_Weighed]:
    for found in plan.fitted(task, counts):
        bare = None if found.bare is None else plain_text(found.bare.sample)
        yield _Weighed(question_of(plan.tokenizer, found, plan.limits), plain_text(found.sample), bare)
