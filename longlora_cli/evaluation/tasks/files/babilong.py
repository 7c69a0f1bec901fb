"""BABILong (Apache-2.0): facts of bAbI in long books; .json, .jsonl, .csv or Parquet with input, question, target.

The task (qa1 to qa20) and the length (0k, 128k) are in the names of file and folders. Prompts of qa1 to qa10 are the
published ones (booydar/babilong `babilong/prompts.py`) with instruction, examples and form of the answer; qa11 to qa20
have none there that could be read, and are asked in this project's words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from longlora_cli.evaluation.scorers.babilong import TASK_LABELS
from longlora_cli.evaluation.tasks.files.family import (
    OWN,
    Family,
    Row,
    one_turn,
    prompt_of,
    published_prompts,
)
from longlora_cli.evaluation.tasks.files.reading import DataFile
from longlora_cli.evaluation.tasks.sample import Sample

_MAX_NEW_TOKENS = 20
_TASK = re.compile(r"(?:^|[^a-z0-9])(qa\d+)(?![0-9])")
_LENGTH = re.compile(r"(?:^|[^a-z0-9])(\d+)([km])(?![a-z0-9])")
_OWN_PROMPT = (
    "Facts are hidden in the text below. Answer the question with the facts alone, in as few words as you can.\n"
    "<context>\n{context}\n</context>\nQuestion: {question}"
)


def _samples(row: Row) -> Iterator[Sample]:
    question, context = row.text("question"), row.text("input", may_be_empty=True)
    values = {"context": context, "question": question}
    prompts = published_prompts("babilong")
    prompt, source = prompt_of(row, {row.task: _OWN_PROMPT, **prompts}, values)
    if row.task not in prompts and row.task not in row.prompts:
        source = OWN
    length = _length_of(row.file)
    yield one_turn(
        row,
        prompt.strip(),
        [row.text("target")],
        scorer="babilong@7a6efee",
        max_new_tokens=_MAX_NEW_TOKENS,
        id=f"{length or ''}:{row.line}".lstrip(":"),
        prompts=source,
        context=context,
        extra={"question": question},
        facts={} if length is None else {"length": length},
    )


def _length_of(file: DataFile) -> int | None:
    """Tokens (0k is 0), from the name nearest to the file."""
    for part in reversed(file.parts):
        if match := _LENGTH.search(part.lower()):
            return int(match[1]) * (1024 if match[2] == "k" else 1024 * 1024)
    return None


def _task_of(file: DataFile) -> str | None:
    for part in reversed(file.parts):
        match = _TASK.search(part.lower())
        if match and match[1] in TASK_LABELS:
            return match[1]
    return None


BABILONG = Family(
    "babilong",
    "files with qa1 to qa20 in their name or folder; rows with input, question and target",
    _task_of,
    _samples,
    marks=frozenset({"target"}),
    tasks=tuple(TASK_LABELS),
    columns=lambda task: ("babilong@lm-eval",),
    many_files=True,
)
