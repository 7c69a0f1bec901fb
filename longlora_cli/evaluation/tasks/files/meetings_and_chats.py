"""QMSum (MIT): questions about meetings; LongChat's topics and lines (Apache-2.0): what came first, which number."""

from __future__ import annotations

import re
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

_QMSUM_TOKENS = 512
_TOPIC_TOKENS, _LINE_TOKENS = 50, 100
_LONGCHAT = re.compile(r"\d+_(?:topics|lines)")
_SPLITS = ("train", "val", "test")


def _qmsum(row: Row) -> Iterator[Sample]:
    """One sample a question; rows of other splits than the one that is measured give none."""
    split = row.fields.get("split") or next((p for p in row.file.parts if p in _SPLITS), None)
    if split is not None and split != row.split:
        return
    is_repository = "meeting_transcripts" in row.fields
    context = _transcript(row) if is_repository else row.text("context")
    meeting = str(row.fields.get("id") or f"{row.file.stem}:{row.line}")
    template = row.prompts.get("qmsum")
    for number, (query, answers) in enumerate(_queries(row, is_repository=is_repository), start=1):
        values = {"context": context, "input": query}
        yield one_turn(
            row,
            fill(row, template or published_prompts("longbench")["qmsum"], values),
            answers,
            scorer="qmsum@rouge_score-0.1.2-stemmer",
            max_new_tokens=_QMSUM_TOKENS,
            id=f"{meeting}:{number}",
            prompts=PUBLISHED if template is None else "--prompts",
            document=context,
        )


def _queries(row: Row, *, is_repository: bool) -> list[tuple[str, list[str]]]:
    if is_repository:
        both = [*row.value("general_query_list"), *row.value("specific_query_list")]
        names = ("query", "answer")
    else:
        both, names = row.value("questions"), ("input", "answers")
    if not isinstance(both, list) or not both:
        raise RowFault("questions is no list with a question in it")
    return [_query(item, *names) for item in both]


def _query(item: Any, query: str, answers: str) -> tuple[str, list[str]]:
    if not isinstance(item, dict):
        raise RowFault(f"a question is {shown(item)}, where {query} and {answers} are needed")
    asked, said = item.get(query), item.get(answers)
    found: list[Any] = said if isinstance(said, list) else [said]
    if not isinstance(asked, str) or not found or not all(isinstance(a, str) for a in found):
        raise RowFault(f"a question is {shown(item)}, where {query} and {answers} are needed")
    return asked, found


def _transcript(row: Row) -> str:
    turns = row.value("meeting_transcripts")
    try:
        return "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in turns)
    except (TypeError, KeyError) as error:
        raise RowFault("a turn of meeting_transcripts has no speaker or no content") from error


def _longchat(row: Row) -> Iterator[Sample]:
    id = str(row.fields.get("test_id", row.line))
    if row.task.endswith("_topics"):
        shared: dict[str, Any] = {"scorer": "synthetic.contained@1", "max_new_tokens": _TOPIC_TOKENS}
        outputs = row.texts("topics")[:1]
    else:
        shared = {"scorer": "longchat.lines@4b5faa5", "max_new_tokens": _LINE_TOKENS}
        outputs = row.texts("expected_number")
    yield one_turn(row, row.text("prompt"), outputs, id=id, **shared)


def _longchat_task(file: DataFile) -> str | None:
    return file.stem if _LONGCHAT.fullmatch(file.stem) else None


def _longchat_in_row(fields: Any) -> str | None:
    kind = "topics" if "topics" in fields else "lines" if "expected_number" in fields else None
    return None if kind is None else f"own_{kind}"


QMSUM = Family(
    "qmsum",
    "rows with context and questions (input, answers), or the repository's with meeting_transcripts, "
    "general_query_list and specific_query_list",
    lambda file: None,
    _qmsum,
    marks=frozenset({"questions", "meeting_transcripts"}),
    tasks=("all",),
    task_in_row=lambda fields: None if "document" in fields else "all",  # that is SQuALITY's
    columns=lambda task: ("longbench.rouge@2e00731",),
    many_files=True,
)
LONGCHAT = Family(
    "longchat",
    "NUMBER_topics.jsonl with prompt and topics, NUMBER_lines.jsonl with prompt and expected_number",
    _longchat_task,
    _longchat,
    marks=frozenset({"expected_number"}),
    task_in_row=_longchat_in_row,
)
