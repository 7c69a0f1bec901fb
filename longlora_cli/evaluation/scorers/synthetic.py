"""Rules of the synthetic tasks that no published benchmark has one for; `score`, which counts, comes first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

from longlora_cli.evaluation.scorers.base import NOTHING, Extra, Scorer, Scores
from longlora_cli.evaluation.scorers.words import normalize_answer, word_f1

_NUMBER = re.compile(r"\d+(?:,\d{3})*")


def answer(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: the prediction's first line equals a reference after SQuAD's normalisation; `f1` of its words;
    `contains`: the whole prediction holds a reference.
    """
    line = first_line(prediction)
    said = normalize_answer(line)
    whole = f" {normalize_answer(prediction)} "
    return {
        "score": float(any(said == normalize_answer(reference) for reference in references)),
        "f1": max(word_f1(line, reference) for reference in references),
        "contains": float(any(f" {normalize_answer(reference)} " in whole for reference in references)),
    }


def contained(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: the prediction holds a reference, both normalised; `f1` of the words of its first line."""
    found = answer(prediction, references, extra)
    return {"score": found["contains"], "f1": found["f1"]}


def number(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: the first number of the prediction is a reference's, commas between thousands left out."""
    match = _NUMBER.search(prediction)
    said = None if match is None else int(match[0].replace(",", ""))
    return {"score": float(any(said == int(reference) for reference in references))}


def order(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: the share of pairs of things that the prediction names in the right order, which is (Kendall's tau +
    1) / 2 where all are named; `exact`: all pairs. A thing counts where it is named first; one that is missing
    spoils its pairs.

    The reference is a list with commas between the things.
    """
    text = prediction.casefold()
    places = [text.find(thing.casefold()) for thing in references[0].split(", ")]
    pairs = list(combinations(places, 2))
    right = sum(0 <= first < second for first, second in pairs)
    return {"score": right / len(pairs), "exact": float(right == len(pairs))}


def copy(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`score`: similarity by insertions and deletions, twice the longest common subsequence over both lengths, with
    runs of blanks as one; `exact`: equality.
    """
    said = " ".join(prediction.split())
    wanted = [" ".join(reference.split()) for reference in references]
    return {
        "score": max(edit_similarity(said, reference) for reference in wanted),
        "exact": float(said in wanted),
    }


def edit_similarity(first: str, second: str) -> float:
    """Twice the length of the longest common subsequence over the sum of lengths; 1 for two empty texts."""
    if not first and not second:
        return 1.0
    return 2 * _common(first, second) / (len(first) + len(second))


def _common(first: str, second: str) -> int:
    """Length of the longest common subsequence, a row of the table as the bits of one number.

    Source: Hyyrö 2004, "Bit-parallel LCS-length computation revisited".
    """
    places: dict[str, int] = {}
    for number, letter in enumerate(first):
        places[letter] = places.get(letter, 0) | 1 << number
    everything = (1 << len(first)) - 1
    row = everything
    for letter in second:
        matches = row & places.get(letter, 0)
        row = (row + matches | row - matches) & everything
    return len(first) - row.bit_count()


def first_line(text: str) -> str:
    """The first line that is not blank, else nothing."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


RULES = (
    Scorer("synthetic.answer", "synthetic.answer@1", ("score", "f1", "contains"), False, answer),
    Scorer("synthetic.contained", "synthetic.contained@1", ("score", "f1"), False, contained),
    Scorer("synthetic.number", "synthetic.number@1", ("score",), True, number),
    Scorer("synthetic.order", "synthetic.order@1", ("score", "exact"), False, order),
    Scorer("synthetic.copy", "synthetic.copy@1", ("score", "exact"), False, copy),
)
"""The rules as scorers."""
