"""Answers that are a choice: LongBench v2's letter, L-Eval's exact match."""

from __future__ import annotations

import re
from collections.abc import Sequence

from longlora_cli.evaluation.scorers.base import NOTHING, Extra, Scores, UnscorableError
from longlora_cli.evaluation.scorers.words import without_articles, without_punctuation

_BRACKETED = re.compile(r"The correct answer is \(([A-D])\)")
_BARE = re.compile(r"The correct answer is ([A-D])")
_CHANCE = 0.25
_LETTERS = set("ABCD")


def extract_answer(text: str) -> str | None:
    """The letter that LongBench v2 reads: after `The correct answer is`, in brackets anywhere first, then without.

    Asterisks are dropped before. Source: THUDM/LongBench `pred.py` at 2e00731 (MIT).
    """
    plain = text.replace("*", "")
    match = _BRACKETED.search(plain) or _BARE.search(plain)
    return match[1] if match else None


def longbench2(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: 1 when `extract_answer` gives the reference's letter; no letter is wrong."""
    _check_letters(references)
    return {"score": float(extract_answer(prediction) in references)}


def longbench2_compensated(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """As `longbench2`, but an answer without a letter gets 0.25, what guessing would."""
    _check_letters(references)
    letter = extract_answer(prediction)
    return {"score": _CHANCE if letter is None else float(letter in references)}


def _check_letters(references: Sequence[str]) -> None:
    for reference in references:
        if reference not in _LETTERS:
            raise UnscorableError(f"reference {reference!r} is none of A, B, C, D")


def leval_exact_match(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: L-Eval's exact match, the best over the references.

    Letters (`AC`): 1 when equal without punctuation, 0.25 when only right ones are given. Numbers: equal values. Else 1
    when the first line of more than one character holds the reference, blanks and case aside.

    Source: the rule of OpenLMLab/LEval's `Evaluation/em.py` at cd34b05, which is GPL-3.0: written from its description
    and its results, nothing is copied.
    """
    return {"score": max(_exact_match(prediction, reference) for reference in references)}


def _exact_match(prediction: str, reference: str) -> float:
    said, wanted = (
        without_articles(without_punctuation(text)) for text in (prediction, reference)
    )  # case counts
    if set(wanted) <= _LETTERS:
        if said == wanted:
            return 1.0
        return 0.25 if set(said) <= set(wanted) else 0.0
    numbers = _number(prediction), _number(reference)
    if None not in numbers:
        return float(numbers[0] == numbers[1])
    line = next((line for line in prediction.split("\n") if len(line) > 1), prediction)
    return float(_without_blanks(reference) in _without_blanks(line))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None  # by rule: then texts are compared


def _without_blanks(text: str) -> str:
    return text.lower().replace(" ", "")
