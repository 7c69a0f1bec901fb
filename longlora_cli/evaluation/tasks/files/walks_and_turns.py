"""Graphwalks and MRCR (openai, MIT): prompts that are whole in their rows, .jsonl or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from longlora_cli.data.faults import shown
from longlora_cli.data.row_values import RowFault
from longlora_cli.evaluation.tasks.files.family import Family, Row, one_turn
from longlora_cli.evaluation.tasks.sample import Sample

_MAX_NEW_TOKENS = 1024
_ROLES = ("system", "user", "assistant")


def _walks(row: Row) -> Iterator[Sample]:
    kind = row.text("problem_type") if "problem_type" in row.fields else "unknown"
    yield one_turn(
        row,
        row.text("prompt"),
        row.texts("answer_nodes", may_be_empty=True),
        scorer="graphwalks@lm-eval-4e7e0d47f",
        max_new_tokens=_MAX_NEW_TOKENS,
        id=row.line,
        facts={"problem_type": kind},
    )


def _turns(row: Row) -> Iterator[Sample]:
    prefix, answer = row.text("random_string_to_prepend"), row.text("answer")
    if not answer.startswith(prefix):
        raise RowFault("answer does not begin with random_string_to_prepend")
    sample = one_turn(
        row,
        "",
        [answer],
        scorer="mrcr@card",
        max_new_tokens=_MAX_NEW_TOKENS,
        id=row.line,
        extra={"random_string_to_prepend": prefix},
        facts={"needles": row.fields.get("n_needles", "unknown")},
    )
    sample.messages[:] = _messages(row.value("prompt"))
    yield sample


def _messages(prompt: Any) -> list[dict[str, str]]:
    """The chat of a row: a list of messages, or the JSON text of one."""
    try:
        messages = json.loads(prompt) if isinstance(prompt, str) else prompt
    except ValueError as error:
        raise RowFault(f"prompt is no JSON text of a chat: {error}") from error
    if not isinstance(messages, list) or not messages:
        raise RowFault(f"prompt is {shown(messages)}, where a list of messages is needed")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise RowFault(f"prompt holds {shown(message)}, where role and content are needed")
        if message.get("role") not in _ROLES:
            raise RowFault(f"prompt holds the role {shown(message.get('role'))}")
    if messages[-1]["role"] != "user":
        raise RowFault("prompt does not end with the user's turn")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


GRAPHWALKS = Family(
    "graphwalks",
    "rows with prompt and answer_nodes",
    lambda file: None,
    _walks,
    marks=frozenset({"answer_nodes"}),
    tasks=("all",),
    task_in_row=lambda fields: "all",
    parts=("problem_type",),
    many_files=True,
)
MRCR_FILES = Family(
    "mrcr_files",
    "rows with prompt, answer and random_string_to_prepend",
    lambda file: None,
    _turns,
    marks=frozenset({"random_string_to_prepend"}),
    tasks=("all",),
    task_in_row=lambda fields: "all",
    parts=("needles",),
    many_files=True,
)
