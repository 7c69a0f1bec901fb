"""L-Eval: several questions about one long text, judged as each row's `evaluation` says: exam, f1 or rouge.

Source: OpenLMLab/LEval at cd34b05. Code and prompts are GPL-3.0 and not here: fields and rules are taken from their
description, prompts are this project's own, and so is the way an answer is found in what a model says (`leval@own-1`).
Rows that only people or models can judge (`human`, `LLM`) are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator

from longlora_cli.data.row_values import RowFault
from longlora_cli.evaluation.scorers.leval import KINDS
from longlora_cli.evaluation.tasks.files.family import OWN, Family, Row, fill, one_turn
from longlora_cli.evaluation.tasks.sample import Sample

_MAX_NEW_TOKENS = {"exam": 256, "f1": 128, "rouge": 512}
_OWN_PROMPT = "{input}\n\nThat was the text. Now do this:\n{instruction}\n\nAnswer:"


def _samples(row: Row) -> Iterator[Sample]:
    """One sample an instruction."""
    text, kind = row.text("input"), row.text("evaluation")
    asked, wanted = row.texts("instructions"), row.texts("outputs")
    if kind not in KINDS:
        raise RowFault(f"evaluation is {kind!r}; only {', '.join(KINDS)} are judged by a rule")
    if len(asked) != len(wanted):
        raise RowFault(f"{len(asked)} instructions and {len(wanted)} outputs are not the same number")
    own = row.prompts.get(row.task)
    for number, (instruction, output) in enumerate(zip(asked, wanted, strict=True), start=1):
        values = {"input": text, "instruction": instruction}
        yield one_turn(
            row,
            fill(row, own or _OWN_PROMPT, values),
            [output],
            scorer="leval@own-1",
            max_new_tokens=_MAX_NEW_TOKENS[kind],
            id=f"{row.line}:{number}",
            prompts=OWN if own is None else "--prompts",
            document=text,
            extra={"evaluation": kind},
            facts={"evaluation": kind},
        )


LEVAL = Family(
    "leval",
    "TASK.jsonl, such as coursera.jsonl; rows with input, instructions, outputs and evaluation (exam, f1, rouge)",
    lambda file: None,
    _samples,
    marks=frozenset({"instructions"}),
    parts=("evaluation",),
)
