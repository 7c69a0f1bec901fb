"""LongBench v2 (THUDM, MIT): 503 questions of four choices in one `data.json`; the letter after a phrase counts."""

from __future__ import annotations

import re
from collections.abc import Iterator

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
from longlora_cli.evaluation.tasks.sample import Sample

TASK = "all"
_MAX_NEW_TOKENS = 128
_LETTERS = "ABCD"
_MARK = re.compile(r"\$(DOC|Q|C_[A-D])\$")


def _samples(row: Row) -> Iterator[Sample]:
    document = row.text("context")
    answer = row.text("answer")
    if answer not in tuple(_LETTERS):
        raise RowFault(f"answer is {shown(answer)}, none of A, B, C, D")
    choices = {f"choice_{letter}": row.text(f"choice_{letter}") for letter in _LETTERS}
    question = row.text("question")
    facts = {name: row.text(name) for name in ("difficulty", "domain")}
    if TASK in row.prompts:
        prompt, source = fill(row, row.prompts[TASK], {}), "--prompts"
    else:
        # In one pass: a mark that stands in a text is not looked for.
        marked = {"DOC": document, "Q": question, **{f"C_{x}": choices[f"choice_{x}"] for x in _LETTERS}}
        template, source = published_prompts("longbench_v2")["0shot"], PUBLISHED
        prompt = _MARK.sub(lambda match: marked[match[1]].strip(), template)
    yield one_turn(
        row,
        prompt,
        [answer],
        scorer="longbench2@2e00731",
        max_new_tokens=_MAX_NEW_TOKENS,
        id=str(row.fields.get("_id") or row.line),
        prompts=source,
        document=document,
        context=document if TASK in row.prompts else document.strip(),
        facts={**facts, "length_class": row.text("length")},
    )


LONGBENCH_V2 = Family(
    "longbench_v2",
    "data.json; rows with context, question, choice_A to choice_D, answer, difficulty, length and domain",
    lambda file: None,
    _samples,
    marks=frozenset({"choice_A"}),
    tasks=(TASK,),
    task_in_row=lambda fields: TASK,
    columns=lambda task: ("longbench2@compensated",),
    parts=("difficulty", "length_class", "domain"),
)
