"""What of a plan a killed run has finished already, so that the estimate of a resumed one counts the rest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from longlora_cli.evaluation.file_plan import CutCounts
from longlora_cli.evaluation.generation import Question, question_key
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.likelihood import weigh_key
from longlora_cli.evaluation.measure_perplexity import unscored
from longlora_cli.evaluation.plan import EvalPlan
from longlora_cli.evaluation.tasks.registry import TASKS
from longlora_cli.evaluation.texts import Text
from longlora_cli.evaluation.windows import Reading, Window

# So many questions are made to see whether a journal is of this model and these settings: with shares the first one
# may be another process's.
_LOOKED_AT = 4


@dataclass(frozen=True)
class Finished:
    """What a journal holds of a plan.

    Args:
        journal: Rows that are kept.
        identity: Of the model, as its rows' keys have it.
        questions: Answered ones by task, counted in their order.
    """

    journal: Journal
    identity: Any
    questions: dict[str, int]

    def windows_left(self, text: Text, reading: Reading) -> list[Window]:
        """Of a text's windows those that are not scored."""
        return unscored(text, reading, self.journal, self.identity)


def finished_of(plan: EvalPlan, journal: Journal, identity: Any) -> Finished | None:
    """What is finished of the plan; None where nothing is kept.

    Rows do not say under which settings they were made, their keys do. So a task's rows count when one of its first
    questions has its key among them.
    """
    if not len(journal):
        return None
    counts = {
        task: journal.of_task(task)
        for task, keys in _first_keys(plan, identity)
        if journal.of_task(task) and any(key in journal for key in islice(keys, _LOOKED_AT))
    }
    return Finished(journal, identity, counts)


def _first_keys(plan: EvalPlan, identity: Any) -> Iterator[tuple[str, Iterator[str]]]:
    if (files := plan.files) is not None:
        for opened in files.tasks:
            questions = files.questions(opened, CutCounts())
            if opened.family.is_choice:
                yield opened.name, (weigh_key(question, identity) for question in questions)
            else:
                yield opened.name, _keys(questions, 1, identity)  # each question says its own limit
    for task in plan.synthetic:
        yield task, _keys(plan.sample_questions(task), TASKS[task].max_new_tokens, identity)
    for task in plan.grids:
        yield task, _keys(plan.grid_questions(task), plan.grid_answer_tokens, identity)
    if plan.rows:
        yield plan.rows[0].task, _keys(plan.rows, plan.config.max_new_tokens, identity)


def _keys(questions: Iterable[Question], max_new_tokens: int, identity: Any) -> Iterator[str]:
    return (question_key(question, max_new_tokens, identity) for question in questions)
