"""Multiple choice by likelihood, as lm-evaluation-harness does it: the choice counts that the model holds likeliest.

`multiple_choice` lists the choices and weighs their letters (MMLU's form). `multiple_choice_cloze` lists none and
weighs the texts (ARC's form), also by character, so that short texts are not preferred. Ties go to the first choice.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from longlora_cli.data.faults import shown
from longlora_cli.data.row_values import RowFault
from longlora_cli.evaluation.tasks.files.family import OWN, Family, Row, one_turn
from longlora_cli.evaluation.tasks.files.reading import DataFile
from longlora_cli.evaluation.tasks.sample import Sample

LETTERS = string.ascii_uppercase
_FEWEST = 2


def _samples(row: Row, *, cloze: bool) -> Iterator[Sample]:
    choices = row.texts("choices")
    if not _FEWEST <= len(choices) <= len(LETTERS):
        raise RowFault(f"choices are {len(choices)}, where 2 to {len(LETTERS)} are needed")
    answer = _answer(row.value("answer"), choices)
    context = row.text("context", may_be_empty=True) if row.fields.get("context") is not None else ""
    question = row.text("question").strip()
    listed = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    asked = f"Question: {question}\nAnswer:" if cloze else f"{question}{listed}\nAnswer:"
    yield one_turn(
        row,
        f"{context}\n\n{asked}" if context else asked,
        [LETTERS[answer]],
        scorer="multiple_choice@1",
        max_new_tokens=0,
        id=str(row.fields.get("id", row.line)),
        prompts=OWN,
        document=context,
        extra={"choices": choices if cloze else list(LETTERS[: len(choices)])},
        facts={"subject": str(row.fields.get("subject", "none"))},
        as_chat=False,
    )


def _answer(value: Any, choices: list[str]) -> int:
    """The place of the right choice, given by its number from 0, its letter or its text."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    # A choice may itself be a letter: its text goes before the letter of a place.
    if isinstance(value, str) and choices.count(value) == 1:
        return choices.index(value)
    if isinstance(value, str) and len(value) == 1 and value in LETTERS[: len(choices)]:
        return LETTERS.index(value)
    raise RowFault(f"answer is {shown(value)}, which is none of the {len(choices)} choices")


def _task_of(file: DataFile) -> str | None:
    return None


def _task_in_row(fields: Mapping[str, Any]) -> str | None:
    return "all"


def _family(name: str, *, cloze: bool) -> Family:
    return Family(
        name,
        "rows with question, choices and answer, and context if there is one",
        _task_of,
        partial(_samples, cloze=cloze),
        marks=frozenset({"choices"}),
        tasks=("all",),
        task_in_row=_task_in_row,
        parts=("subject",),
        many_files=True,
        is_choice=True,
    )


MULTIPLE_CHOICE = _family("multiple_choice", cloze=False)
MULTIPLE_CHOICE_CLOZE = _family("multiple_choice_cloze", cloze=True)
