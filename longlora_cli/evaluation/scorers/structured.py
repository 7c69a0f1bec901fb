"""Answers with a form: a list of graph nodes, a text behind an agreed prefix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from longlora_cli.evaluation.scorers.base import NOTHING, Extra, Scores, UnscorableError, field

_FINAL = re.compile(r"Final Answer:\s*\[(.*)\]")


def final_nodes(line: str) -> set[str] | None:
    """The nodes of `Final Answer: [a, b]` in a line, without quotes; None where the line has no such list."""
    match = _FINAL.search(line)
    if match is None:
        return None
    return {node.strip().strip("'\"") for node in match[1].split(",") if node.strip()}


def graphwalks(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`f1`: F1 of the set of nodes on the last line; `flexible_f1`: of the last line that has a list.

    No nodes to find gives 0. The parser of the data set's card keeps `Final Answer: [` in the first node; this one is
    that of lm-evaluation-harness `tasks/graphwalks` at 4e7e0d47f (MIT), and so are its scores.
    """
    lines = prediction.rstrip("\n").split("\n")
    lists = [final_nodes(line) for line in lines]
    wanted = set(references)
    last_list = next((nodes for nodes in reversed(lists) if nodes is not None), None)
    return {"f1": _set_f1(lists[-1], wanted), "flexible_f1": _set_f1(last_list, wanted)}


def _set_f1(said: set[str] | None, wanted: set[str]) -> float:
    common = len((said or set()) & wanted)
    if not common or not said:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * (recall * precision) / (recall + precision)


def mrcr(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: difflib's ratio of answer and reference, both without their prefix; 0 unless the answer opens with it.

    Needs `random_string_to_prepend`, or `prefix`. Source: the rule on the card of the data set openai/mrcr (MIT).
    """
    name = "prefix" if extra.get("random_string_to_prepend") is None else "random_string_to_prepend"
    prefix = field(extra, name, str, "what the answer must open with (random_string_to_prepend)")
    if not prefix:
        raise UnscorableError("the prefix is empty, which every answer opens with")
    if not prediction.startswith(prefix):
        return {"score": 0.0}
    said = prediction.removeprefix(prefix)
    return {
        "score": max(
            difflib.SequenceMatcher(None, said, reference.removeprefix(prefix)).ratio()
            for reference in references
        )
    }
