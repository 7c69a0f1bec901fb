"""Rules of benchmarks read from files that have no scorer of their own elsewhere; what counts comes first."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from longlora_cli.evaluation.scorers.base import NOTHING, Extra, Scorer, Scores, UnscorableError
from longlora_cli.evaluation.scorers.overlap import rouge_measures
from longlora_cli.evaluation.scorers.synthetic import contained

_DIGITS = re.compile(r"\d+")
_ROUGES = ("rougeL", "rouge1", "rouge2")


def qmsum(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`rougeL`, `rouge1`, `rouge2`: F-measures of rouge_score with stemmer, the best over the references, and with
    `_mean` their mean over them.
    """
    return _best_and_mean(prediction, references, stem=True)


def squality(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """As `qmsum` without stemmer: the best over the references is what nyu-mll/SQuALITY's `multi_rouge` gives by
    default.
    """
    return _best_and_mean(prediction, references, stem=False)


def _best_and_mean(prediction: str, references: Sequence[str], *, stem: bool) -> Scores:
    found = [rouge_measures(prediction, reference, stem=stem) for reference in references]
    best = {kind: max(measures[kind]["f"] for measures in found) for kind in _ROUGES}
    mean = {f"{kind}_mean": math.fsum(m[kind]["f"] for m in found) / len(found) for kind in _ROUGES}
    return best | mean


def longmemeval(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: the prediction holds a reference, both normalised; `f1` of its first line's words. No model judges, so
    that these are not the published numbers.
    """
    return contained(prediction, references, extra)


def longchat_lines(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: the last number of the prediction is the expected one. Source: DachengLi1/LongChat at 4b5faa5."""
    if not all(reference.isdecimal() for reference in references):
        raise UnscorableError(f"reference {references[0]!r} is no whole number")
    numbers = _DIGITS.findall(prediction)
    said = numbers[-1].lstrip("0") if numbers else None
    return {"score": float(any(said == reference.lstrip("0") for reference in references))}


def multiple_choice(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: the letter that was likeliest is right; `normalized`: the one that was likeliest by character is, which
    `extra` has as `normalized` (the same letter where nothing was divided).
    """
    said = prediction.strip()
    by_character = extra.get("normalized", said)
    return {"score": float(said in references), "normalized": float(by_character in references)}


_KEYS = (*_ROUGES, *(f"{kind}_mean" for kind in _ROUGES))
RULES = (
    Scorer("qmsum", "qmsum@rouge_score-0.1.2-stemmer", _KEYS, False, qmsum),
    Scorer("squality", "squality@rouge_score-0.1.2", _KEYS, False, squality),
    Scorer("squality", "squality@rouge_score-0.1.2-stemmer", _KEYS, False, qmsum),
    Scorer("longmemeval", "longmemeval@no-judge-1", ("score", "f1"), False, longmemeval),
    Scorer("longchat.lines", "longchat.lines@4b5faa5", ("score",), True, longchat_lines),
    Scorer("multiple_choice", "multiple_choice@1", ("score", "normalized"), True, multiple_choice),
)
"""The rules as scorers."""
