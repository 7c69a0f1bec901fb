"""Two ROUGEs that share a name: Google's `rouge_score`, and the arithmetic of PyPI's `rouge`, which LongBench uses.

They differ on most inputs: `rouge_score` folds case, drops punctuation and takes one common subsequence; `rouge` keeps
both, takes every full stop for the end of a sentence, and unites subsequences over sets of words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from longlora_cli.evaluation.scorers.base import NOTHING, Extra, Scores, needed_package

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """`rouge1`, `rouge2`, `rougeL`, `rougeLsum`: F-measures of the package rouge_score, without a stemmer.

    With several references each type takes its best one. rougeLsum takes lines as sentences.
    """
    return best_measures(prediction, references, stem=False)


def rouge_stemmed(prediction: str, references: Sequence[str], extra: Extra = NOTHING) -> Scores:
    """As `rouge`, with Porter's stemmer on words of more than three letters."""
    return best_measures(prediction, references, stem=True)


def best_measures(
    prediction: str, references: Sequence[str], *, stem: bool, kinds: tuple[str, ...] = ROUGE_TYPES
) -> Scores:
    """F-measures of rouge_score, for each type that of the best reference."""
    found = [rouge_measures(prediction, reference, stem=stem, kinds=kinds) for reference in references]
    return {kind: max(measures[kind]["f"] for measures in found) for kind in kinds}


def rouge_measures(
    prediction: str, reference: str, *, stem: bool, kinds: tuple[str, ...] = ROUGE_TYPES
) -> dict[str, Scores]:
    """Precision `p`, recall `r` and F-measure `f` of each type, from rouge_score 0.1.2."""
    found = _rouge_scorer(stem, kinds).score(reference, prediction)
    return {
        kind: {"p": float(s.precision), "r": float(s.recall), "f": float(s.fmeasure)}
        for kind, s in found.items()
    }


@cache
def _rouge_scorer(stem: bool, kinds: tuple[str, ...]) -> Any:
    scorers = needed_package("rouge_score.rouge_scorer")
    return scorers.RougeScorer(list(kinds), use_stemmer=stem)


def sentence_union_rouge(prediction: str, reference: str) -> float:
    """ROUGE-L F as the package `rouge` 1.0.1 defines it for whole texts, 0 to 1.

    Sentences end at each full stop, words at blanks; case and other punctuation count. For each sentence of the
    reference the longest common subsequences with all sentences of the prediction are united as a set of words that
    grows over the sentences. Precision and recall divide its size by the different words of either text, and
    F = 2PR / (P + R + 1e-8), so that equal texts score 0.999999995. A text without a sentence scores 0, as there.

    The package itself walks the table of subsequences by recursion and dies between 600 and 1,200 words without a full
    stop, which LongBench turns into a score of 0; here the walk is a loop, so long sentences have their score. Hence it
    is not imported: raising the interpreter's recursion limit for it would change the whole process.

    Source: Lin 2004, ROUGE, section 3.2; ties are broken as pltrdy/rouge 1.0.1 (Apache-2.0) breaks them, for which
    subsequence is found decides which words are united.
    """
    said, wanted = _sentences(prediction), _sentences(reference)
    if not said or not wanted:
        return 0.0
    united: set[str] = set()
    for sentence in wanted:
        for other in said:
            united |= _common_words(sentence, other)
    precision, recall = (len(united) / len({w for s in part for w in s}) for part in (said, wanted))
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    # A blank between two full stops is a sentence of one empty word there; it counts.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_words(first: Sequence[str], second: Sequence[str]) -> set[str]:
    """The different words of the longest common subsequence that a walk from the end finds."""
    if set(first).isdisjoint(second):
        return set()
    table = [[0] * (len(second) + 1)]
    for word in first:
        above, row = table[-1], [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        table.append(row)
    words: set[str] = set()
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            words.add(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words
