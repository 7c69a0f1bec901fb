"""LongMemEval (MIT): questions about many chats of one user, a JSON list.

The published judge is a model. Here the answer's words are looked for instead, so that numbers are this project's own:
the scorer is called `longmemeval@no-judge-1`. Questions without an answer (`_abs`) are a part of their own, since their
reference is an explanation that no rule can find. Prompt and order of the chats: xiaowu0162/LongMemEval
`src/generation/run_generation.py`, whole sessions as text, no reasoning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longlora_cli.data.faults import shown
from longlora_cli.data.row_values import RowFault
from longlora_cli.evaluation.tasks.files.family import (
    PUBLISHED,
    Family,
    Row,
    fill,
    one_turn,
    published_prompts,
)
from longlora_cli.evaluation.tasks.files.reading import DataFile
from longlora_cli.evaluation.tasks.sample import Sample

_MAX_NEW_TOKENS = 500
_NO_ANSWER = "_abs"


def _samples(row: Row) -> Iterator[Sample]:
    id = row.text("question_id")
    templates = published_prompts("longmemeval")
    own = row.prompts.get(row.task)
    history = _history(row, templates["session"])
    values = {
        "history": history,
        "question": row.text("question"),
        "question_date": row.text("question_date"),
    }
    yield one_turn(
        row,
        fill(row, own or templates["answer"], values),
        row.texts("answer"),
        scorer="longmemeval@no-judge-1",
        max_new_tokens=_MAX_NEW_TOKENS,
        id=id,
        prompts="--prompts" if own else PUBLISHED,
        document=history,
        facts={
            "question_type": "abstention" if id.endswith(_NO_ANSWER) else row.text("question_type"),
        },
    )


def _history(row: Row, template: str) -> str:
    """All sessions by date, as the published code writes them."""
    dates, sessions = row.texts("haystack_dates"), row.value("haystack_sessions")
    if not isinstance(sessions, list) or len(sessions) != len(dates):
        raise RowFault("haystack_sessions and haystack_dates are not two lists of one length")
    told = []
    by_date = sorted(zip(dates, sessions, strict=True), key=lambda pair: pair[0])
    for number, (date, session) in enumerate(by_date, start=1):
        turns = session if isinstance(session, list) else [session]
        content = "".join("\n\n{}: {}".format(*_turn(turn)) for turn in turns)
        told.append(template.format(number=number, date=date, content=content))
    return "".join(told)


def _turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise RowFault(f"a turn of haystack_sessions is {shown(turn)}, where role and content are needed")
    role, content = turn.get("role"), turn.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise RowFault(f"a turn of haystack_sessions is {shown(turn)}, where role and content are needed")
    return role, content.strip()


def _task_of(file: DataFile) -> str | None:
    return file.stem.removeprefix("longmemeval_") if file.stem.startswith("longmemeval_") else None


LONGMEMEVAL = Family(
    "longmemeval",
    "longmemeval_s.json and its like; rows with question_id, question_type, question, answer, question_date, "
    "haystack_dates and haystack_sessions",
    _task_of,
    _samples,
    marks=frozenset({"haystack_sessions"}),
    task_in_row=lambda fields: "all",
    parts=("question_type",),
)
