"""Scorers that compare an answer with a reference as a whole: equal to it, or holding it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from longlora_cli.evaluation.scorers.base import NOTHING, Extra, Scores, UnscorableError, field
from longlora_cli.evaluation.scorers.words import normalize_answer, word_f1

_CONTROL = re.compile(r"[\x00-\x1f]")


def same_answer(prediction: str, reference: str) -> float:
    """1 when the two are equal after trimming blanks and one final period and folding case, else 0."""
    return float(_bare(prediction) == _bare(reference))


def holds_answer(prediction: str, reference: str) -> float:
    """1 when the reference occurs in the prediction, case folded, else 0. An answer that rambles on still counts.

    Raises:
        ValueError: The reference is empty: everything would hold it.
    """
    if not reference.strip():
        raise UnscorableError("an empty reference is contained in every answer")
    return float(reference.strip().casefold() in prediction.casefold())


def _bare(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()


def f1(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`f1`: the best `word_f1` over the references."""
    return {"f1": max(word_f1(prediction, reference) for reference in references)}


def exact_match(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`exact_match`: 1 when the prediction equals a reference after `normalize_answer`."""
    said = normalize_answer(prediction)
    return {"exact_match": float(any(said == normalize_answer(reference) for reference in references))}


def accuracy(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`accuracy`: 1 when any reference occurs in the prediction, case folded (RULER's string match, "part").

    A prediction that repeats its whole context scores 1; look at `exact_match` beside it.
    """
    return {"accuracy": max(holds_answer(prediction, reference) for reference in references)}


def printable_answer(text: str) -> str:
    """`text` as RULER reads it: each control character is a newline, blanks at both ends are gone."""
    return _CONTROL.sub("\n", text.strip()).strip()


def _found(prediction: str, references: Sequence[str]) -> list[bool]:
    if not all(references):
        raise UnscorableError("an empty reference is contained in every answer")
    said = printable_answer(prediction).lower()
    return [reference.lower() in said for reference in references]


def ruler_all(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`all`: per cent of the references that occur in the prediction, in any case (niah, vt, cwe, fwe).

    Source: NVIDIA/RULER at c3f5e3b, `scripts/eval`: `string_match_all` after `postprocess_pred`.
    """
    found = _found(prediction, references)
    return {"all": 100.0 * (sum(found) / len(found))}


def ruler_part(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`part`: 100 when any reference occurs in the prediction, in any case, else 0 (qa). Source: as `ruler_all`."""
    return {"part": 100.0 * any(_found(prediction, references))}


def ruler_part_lm_eval(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`part` as lm-evaluation-harness has it: the share of references found, so lower than RULER's with several."""
    return {"part": ruler_all(prediction, references)["all"]}


RULER_TASKS = (
    *(f"niah_{kind}_{number}" for kind in ("single", "multikey") for number in (1, 2, 3)),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
"""RULER's thirteen tasks."""


def ruler(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: `ruler_part` for the tasks qa_1 and qa_2 (and qa), else `ruler_all`; `task` is needed."""
    task = str(field(extra, "task", str, "qa is scored by any reference, the others by all"))
    is_qa = re.search(r"(?:^|[._])qa(?:$|[._])", task) is not None
    found = (ruler_part if is_qa else ruler_all)(prediction, references)
    return {"score": sum(found.values())}


NOLIMA_KEYS = ("contains", "EM", "lastline_contains", "lastline_EM")


def nolima(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`contains`, `EM` and the same of the last line only, each 1 or 0, case-sensitive.

    Source: the rules of adobe-research/NoLiMa at 7532e4e; its code and data may be read for research only and are not
    here.
    """
    whole = prediction.strip()
    last = whole.split("\n")[-1]
    return {
        "contains": float(any(reference in prediction for reference in references)),
        "EM": float(whole in references),
        "lastline_contains": float(any(reference in last for reference in references)),
        "lastline_EM": float(last in references),
    }
