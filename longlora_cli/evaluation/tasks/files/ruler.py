"""Files in RULER's form (NVIDIA, Apache-2.0), its own or those of `longlora eval --make`, at any length.

Known by `TASK/validation.jsonl` or `TASK.jsonl`; where those name no task of RULER's, the first row's `task` counts.
Rows that name a `scorer` (as ours do) or a `metric` are judged by it, others by their task's rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longlora_cli.data.faults import shown
from longlora_cli.data.row_values import RowFault
from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.scorers import find_scorer
from longlora_cli.evaluation.scorers.matching import RULER_TASKS
from longlora_cli.evaluation.tasks.files.family import Family, Row, one_turn
from longlora_cli.evaluation.tasks.files.reading import DataFile
from longlora_cli.evaluation.tasks.sample import Sample

_QA = ("qa_1", "qa_2")
_MAX_NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, **dict.fromkeys(_QA, 32)}
_NIAH_TOKENS = 128
_SPLITS = ("validation", "test")


def _samples(row: Row) -> Iterator[Sample]:
    fields = row.fields
    outputs = row.texts("outputs")
    prefix = row.text("answer_prefix", may_be_empty=True) if "answer_prefix" in fields else ""
    extra = fields.get("extra") or {}
    if not isinstance(extra, dict):
        raise RowFault(f"extra is {shown(extra)}, where an object is needed")
    facts: dict[str, Any] = {"length": _length(row)} if _length(row) is not None else {}
    facts |= {name: fields[name] for name in ("depth", "actual_depth", "sample") if name in fields}
    longest = fields.get("max_new_tokens") or _MAX_NEW_TOKENS.get(row.task, _NIAH_TOKENS)
    sample = one_turn(
        row,
        row.text("input"),
        outputs,
        scorer=_scorer(row),
        max_new_tokens=int(longest),
        id=f"{facts.get('length', '')}:{fields.get('index', row.line)}".lstrip(":"),
        extra=extra,
        facts=facts,
        answer_prefix=prefix,
        stop=tuple(fields.get("stop") or ()),
    )
    if isinstance(fields.get("messages"), list):
        sample.messages[:] = fields["messages"]
    yield sample


def _scorer(row: Row) -> str:
    name = row.fields.get("scorer") or row.fields.get("metric")
    if name is None:
        if row.task not in RULER_TASKS:
            raise RowFault(
                f"scorer is missing, and {row.task} is none of RULER's tasks, whose rules are known"
            )
        return "ruler.part" if row.task in _QA else "ruler.all"
    try:
        find_scorer(str(name))
    except SettingsError as error:
        raise RowFault(f"scorer {name} is unknown") from error
    return str(name)


def _length(row: Row) -> int | None:
    """The length that was asked for: our `max_length`, or the folder above that is a number."""
    if isinstance(row.fields.get("max_length"), int):
        return int(row.fields["max_length"])
    numbers = [int(part) for part in row.file.parts[:-1] if part.isdecimal()]
    return numbers[-1] if numbers else None


def _task_of(file: DataFile) -> str | None:
    names = file.parts
    name = names[-2] if names[-1] in _SPLITS and len(names) > 1 else names[-1]
    return name if name in RULER_TASKS else None


def _task_in_row(fields: Any) -> str | None:
    return str(fields["task"]) if isinstance(fields.get("task"), str) and fields["task"] else None


RULER_FILES = Family(
    "ruler_files",
    "TASK/validation.jsonl or TASK.jsonl, such as niah_single_1; rows with input, outputs, answer_prefix and, for "
    "other tasks than RULER's, task and scorer",
    _task_of,
    _samples,
    marks=frozenset({"outputs"}),
    task_in_row=_task_in_row,
    columns=lambda task: ("ruler.part@lm-eval",) if task in _QA else (),
    many_files=True,
)
