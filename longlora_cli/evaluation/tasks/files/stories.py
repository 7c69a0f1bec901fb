"""SQuALITY (stories of Project Gutenberg, summaries CC BY 4.0): five questions a story, four written summaries each.

Source: nyu-mll/SQuALITY `data/v1-3/txt`, or its earlier versions. There is no published prompt for models that are
prompted, so it is asked in this project's words. Its own score takes the best ROUGE over the references.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longlora_cli.data.faults import shown
from longlora_cli.data.row_values import RowFault
from longlora_cli.evaluation.tasks.files.family import OWN, Family, Row, fill, one_turn
from longlora_cli.evaluation.tasks.sample import Sample

TASK = "all"
# A reference has 237 words on average, the plot's up to 500.
_MAX_NEW_TOKENS = 768
_SPLITS = {"train": "train", "dev": "val", "val": "val", "test": "test"}
_OWN_PROMPT = (
    "Read the story and answer the question about it in one or several paragraphs.\n\n<story>\n{document}\n</story>\n\n"
    "Question: {question}\n\nAnswer:"
)


def _samples(row: Row) -> Iterator[Sample]:
    """One sample a question; rows of another split than the one that is measured give none."""
    split = next((_SPLITS[part] for part in reversed(row.file.parts) if part in _SPLITS), None)
    if split is not None and split != _SPLITS.get(row.split, row.split):
        return
    document, questions = row.text("document"), row.value("questions")
    if not isinstance(questions, list) or not questions:
        raise RowFault("questions is no list with a question in it")
    own = row.prompts.get(TASK)
    for number, item in enumerate(questions, start=1):
        question, summaries = _question(item)
        values = {"document": document, "question": question}
        yield one_turn(
            row,
            fill(row, own or _OWN_PROMPT, values),
            summaries,
            scorer="squality@rouge_score-0.1.2",
            max_new_tokens=_MAX_NEW_TOKENS,
            id=f"{_story(row)}:{number}",
            prompts=OWN if own is None else "--prompts",
            document=document,
            facts={"about": "plot" if number == 1 else "detail"},
        )


def _story(row: Row) -> str:
    metadata = row.fields.get("metadata")
    known = metadata.get("passage_id") if isinstance(metadata, dict) else None
    return str(known or f"{row.file.stem}:{row.line}")


def _question(item: Any) -> tuple[str, list[str]]:
    needed = "question_text and responses with response_text are needed"
    if not isinstance(item, dict) or not isinstance(item.get("question_text"), str):
        raise RowFault(f"a question is {shown(item)}, where {needed}")
    responses = item.get("responses")
    texts = [r.get("response_text") if isinstance(r, dict) else None for r in responses or ()]
    if (
        not isinstance(responses, list)
        or not texts
        or not all(isinstance(t, str) and t.strip() for t in texts)
    ):
        raise RowFault(f"a question is {shown(item)}, where {needed}")
    return item["question_text"], [str(text) for text in texts]


SQUALITY = Family(
    "squality",
    "train.jsonl, dev.jsonl or test.jsonl; rows with document and questions (question_text, responses with "
    "response_text)",
    lambda file: None,
    _samples,
    marks=frozenset({"document"}),
    tasks=(TASK,),
    task_in_row=lambda fields: TASK if "document" in fields and "questions" in fields else None,
    columns=lambda task: ("squality@rouge_score-0.1.2-stemmer",),
    parts=("about",),
    many_files=True,
)
