"""LongBench v2 (THUDM, MIT): 503 questions of four choices in one `data.json`; the letter after a phrase counts.

`longbench_v2_cot` asks in two steps, as the published code does with `--cot`: the model thinks about the text, then it
is asked for the letter with what it thought and without the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
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
from longlora_cli.evaluation.tasks.sample import Sample, Then

TASK = "all"
_MAX_NEW_TOKENS = 128
_MAX_THOUGHT_TOKENS = 1024
_LETTERS = "ABCD"
_MARK = re.compile(r"\$(DOC|Q|C_[A-D])\$")
_THOUGHT = "$COT$"


def _samples(row: Row) -> Iterator[Sample]:
    yield _sample(row, "0shot", _MAX_NEW_TOKENS)


def _thinking_samples(row: Row) -> Iterator[Sample]:
    if TASK in row.prompts:
        raise RowFault("--prompts has one prompt, the two steps need two")
    template = published_prompts("longbench_v2")["0shot_cot_ans"]
    # Cut before it is filled: a question may hold the mark too.
    before, after = (_MARK.sub(partial(_value, row), part) for part in template.split(_THOUGHT))
    then = Then(before, after, _MAX_NEW_TOKENS)
    yield _sample(row, "0shot_cot", _MAX_THOUGHT_TOKENS, then=then)


def _sample(row: Row, template: str, most: int, **more: Any) -> Sample:
    answer = row.text("answer")
    if answer not in tuple(_LETTERS):
        raise RowFault(f"answer is {shown(answer)}, none of A, B, C, D")
    document = row.text("context")
    facts = {name: row.text(name) for name in ("difficulty", "domain")}
    if TASK in row.prompts:
        prompt, source = fill(row, row.prompts[TASK], {}), "--prompts"
    else:
        # In one pass: a mark that stands in a text is not looked for.
        prompt = _MARK.sub(partial(_value, row), published_prompts("longbench_v2")[template])
        source = PUBLISHED
    return one_turn(
        row,
        prompt,
        [answer],
        scorer="longbench2@2e00731",
        max_new_tokens=most,
        id=str(row.fields.get("_id") or row.line),
        prompts=source,
        document=document,
        context=document if TASK in row.prompts else document.strip(),
        facts={**facts, "length_class": row.text("length")},
        **more,
    )


def _value(row: Row, mark: re.Match[str]) -> str:
    """What stands for a mark of the templates."""
    name = {"DOC": "context", "Q": "question"}.get(mark[1], f"choice_{mark[1][-1]}")
    return row.text(name).strip()


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
LONGBENCH_V2_COT = replace(LONGBENCH_V2, name="longbench_v2_cot", samples=_thinking_samples)
