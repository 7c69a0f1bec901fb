"""HELMET's measures of a short answer, as princeton-nlp/HELMET `utils.py` at 4526dfb has them (MIT)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from longlora_cli.evaluation.scorers.base import NOTHING, Extra, Scores
from longlora_cli.evaluation.scorers.overlap import rouge_measures
from longlora_cli.evaluation.scorers.words import bag_f1, normalize_answer

KEYS = (
    "f1",
    "exact_match",
    "substring_exact_match",
    "rougeL_f1",
    "rougeL_recall",
    "rougeLsum_f1",
    "rougeLsum_recall",
)
_ROUGE = ("rougeL", "rougeLsum")
_GUARDED = ("yes", "no", "noanswer")
_ANSWER = re.compile(r"answer:(.*)(?:\n|$)", re.IGNORECASE)


def parse_output(text: str) -> str:
    """What stands behind the first `Answer:`, to the end of its line; without one, the first line."""
    match = _ANSWER.search(text)
    line = (match[1] if match else text.split("\n")[0]).strip()
    return re.sub("^answer:", "", line, flags=re.IGNORECASE).strip()


def guarded_f1(prediction: str, reference: str) -> float:
    """Bag-of-words F1; 0 where one side is just yes, no or noanswer and the other is not the same."""
    said, wanted = normalize_answer(prediction), normalize_answer(reference)
    if said != wanted and (said in _GUARDED or wanted in _GUARDED):
        return 0.0
    return bag_f1(said.split(), wanted.split())


def raw(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """Exact match, F1 with the guard, substring match, ROUGE-L and -Lsum with stemmer; each its best reference's."""
    said = normalize_answer(prediction)
    normal = [normalize_answer(reference) for reference in references]
    measures = [rouge_measures(prediction, reference, stem=True, kinds=_ROUGE) for reference in references]
    scores = {
        "f1": max(guarded_f1(prediction, reference) for reference in references),
        "exact_match": float(said in normal),
        "substring_exact_match": float(any(reference in said for reference in normal)),
    }
    for kind in _ROUGE:
        scores[f"{kind}_f1"] = max(found[kind]["f"] for found in measures)
        scores[f"{kind}_recall"] = max(found[kind]["r"] for found in measures)
    return scores


def parsed(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """The same of `parse_output(prediction)`."""
    return raw(parse_output(prediction), references)


def helmet(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """What HELMET reports: each measure's better one of the whole answer and the parsed one."""
    whole, part = raw(prediction, references), parsed(prediction, references)
    return {key: max(whole[key], part[key]) for key in KEYS}
