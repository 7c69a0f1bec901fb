"""InfiniteBench (OpenBMB, MIT): twelve tasks, one .jsonl each; both published rule sets judge every answer.

Prompts are those for GPT-4 where the model chats, and those for YaRN-Mistral, which end in an unfinished sentence,
where it continues texts. Source: OpenBMB/InfiniteBench `src/prompt.py` and `src/eval_utils.py`. GPT-4's own prompt for
math_calc is a chat that no other model was given, so the plain instruction is asked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from longlora_cli.data.faults import shown
from longlora_cli.data.row_values import RowFault
from longlora_cli.evaluation.scorers.infinitebench import TASKS
from longlora_cli.evaluation.tasks.files.family import Family, Row, one_turn, prompt_of, published_prompts
from longlora_cli.evaluation.tasks.files.reading import DataFile
from longlora_cli.evaluation.tasks.sample import Sample

MAX_NEW_TOKENS = {
    "passkey": 6,
    "number_string": 12,
    "kv_retrieval": 50,
    "longbook_sum_eng": 1200,
    "longbook_choice_eng": 40,
    "longbook_qa_eng": 40,
    "longbook_qa_chn": 40,
    "longdialogue_qa_eng": 40,
    "math_find": 3,
    "math_calc": 30000,
    "code_run": 5,
    "code_debug": 5,
}
CATEGORIES = {
    "retrieval": ("passkey", "number_string", "kv_retrieval"),
    "books": ("longbook_sum_eng", "longbook_qa_eng", "longbook_choice_eng", "longbook_qa_chn"),
    "dialogue": ("longdialogue_qa_eng",),
    "math": ("math_find", "math_calc"),
    "code": ("code_run", "code_debug"),
}
_CHOICES = ("longbook_choice_eng", "code_debug")
_ALIASES = {"kv_retrieval_eng": "kv_retrieval"}
_CALL = re.compile(r"func_\d+\(-?\d+\)")
_TARGET = re.compile(r"The \w+ number")
_LETTERS = "ABCD"


def _samples(row: Row) -> Iterator[Sample]:
    context = row.text("context")
    values: dict[str, Any] = {"context": context, "input": row.text("input", may_be_empty=True)}
    values["question"] = values["input"]
    answers = row.texts("answer")
    extra: dict[str, Any] = {}
    if row.task in _CHOICES:
        options = _options(row)
        values |= {f"OPTION_{letter}": option for letter, option in zip(_LETTERS, options, strict=True)}
        answers, extra = _labels(answers, options), {"options": options}
    elif row.task == "code_run":
        values["func_call"] = _searched(_CALL, row, "a call such as func_1(2)")
        values["func"] = values["func_call"].partition("(")[0]
    elif row.task == "math_find":
        target = _searched(_TARGET, row, '"The ... number"').lower()
        values["prefix"] = f"What is {target} in the following list?"
    prompts = published_prompts("infinitebench_chat" if row.as_chat else "infinitebench_base")
    prompt, source = prompt_of(row, prompts, values)
    yield one_turn(
        row,
        prompt,
        answers,
        scorer="infinitebench@2024-06",
        max_new_tokens=MAX_NEW_TOKENS[row.task],
        id=str(row.fields.get("id", row.line)),
        prompts=source,
        document=context,
        extra=extra,
    )


def _options(row: Row) -> list[str]:
    options = row.texts("options")
    if len(options) != len(_LETTERS):
        raise RowFault(f"options are {len(options)}, where four are needed")
    return options


def _labels(answers: list[str], options: list[str]) -> list[str]:
    """The right text and its letter."""
    if answers[0] in options:
        return [answers[0], _LETTERS[options.index(answers[0])]]
    if answers[0] in tuple(_LETTERS):
        return [options[_LETTERS.index(answers[0])], answers[0]]
    raise RowFault(f"answer is {shown(answers[0])}, which is none of the options")


def _searched(pattern: re.Pattern[str], row: Row, what: str) -> str:
    found = pattern.search(row.text("input"))
    if found is None:
        raise RowFault(f"input holds no {what}, which the prompt asks for")
    return found[0]


def _task_of(file: DataFile) -> str | None:
    stem = _ALIASES.get(file.stem, file.stem)
    return stem if stem in TASKS else None


INFINITEBENCH = Family(
    "infinitebench",
    "TASK.jsonl, such as passkey.jsonl; rows with context, input, answer and, for choices, options",
    _task_of,
    _samples,
    tasks=TASKS,
    columns=lambda task: ("infinitebench@2024-08",),
    categories=CATEGORIES,
)
