"""L-Eval's three kinds of rows: exams, answers judged by words, summaries."""

from __future__ import annotations

import re
from collections.abc import Sequence

from longlora_cli.evaluation.scorers.base import NOTHING, Extra, Scorer, Scores, UnscorableError
from longlora_cli.evaluation.scorers.choices import leval_exact_match
from longlora_cli.evaluation.scorers.matching import f1
from longlora_cli.evaluation.scorers.overlap import best_measures

KINDS = ("exam", "f1", "rouge")
"""What `evaluation` may be."""

_LETTERS = re.compile(r"[A-D]+")
_ALONE = re.compile(r"(?<![A-Za-z])[A-D]+(?![A-Za-z])")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def leval(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score` by the row's `evaluation`: `exam`: L-Eval's exact match (`leval.exact_match`) of the answer found in the
    prediction; `f1`: F1 of words; `rouge`: ROUGE-L of rouge_score without stemmer.

    Of an exam whose reference is letters, the answer is those of the first line that has capital letters A to D
    standing alone, one where one is wanted; whose reference is a number, the last number said. These two are this
    project's, since the published ones are many and differ by task.

    Raises:
        UnscorableError: No such `evaluation`.
    """
    kind = extra.get("evaluation")
    if kind == "exam":
        return {
            "score": max(leval_exact_match(_found(prediction, one), [one])["score"] for one in references)
        }
    if kind == "f1":
        return {"score": f1(prediction, references)["f1"]}
    if kind == "rouge":
        return {"score": best_measures(prediction, references, stem=False, kinds=("rougeL",))["rougeL"]}
    raise UnscorableError(f"evaluation is {kind!r}, none of {', '.join(KINDS)}")


def _found(prediction: str, reference: str) -> str:
    """The answer in a prediction, as far as its reference says what it looks like; else all of it."""
    wanted = reference.strip()
    if _LETTERS.fullmatch(wanted):
        said = next((found for line in prediction.split("\n") if (found := _ALONE.findall(line))), [])
        letters = "".join(sorted(set("".join(said))))
        # An empty answer is a part of every reference to the published rule.
        return (said[0] if len(wanted) == 1 and said else letters) or "none"
    if _NUMBER.fullmatch(wanted):
        numbers = _NUMBER.findall(prediction)
        return numbers[-1].replace(",", "") if numbers else "none"
    return prediction


RULES = (Scorer("leval", "leval@own-1", ("score",), False, leval),)
"""The rules as scorers."""
