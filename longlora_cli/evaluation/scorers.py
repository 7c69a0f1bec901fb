"""Scorers: pure functions of a prediction and its references. No files, no models, no state.

A scorer that fails raises; no fault is ever turned into a score of 0. Each has a version that is stored with
its
results: numbers of different versions are not comparable.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from longlora_cli.errors import SettingsError

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

Scores = dict[str, float]


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without articles, blanks collapsed - in this order.

    The order matters: `U.S.A.` becomes `usa`, and `a-b` becomes `ab` before articles are looked for. Source:
        the SQuAD
    v1.1 evaluation (Rajpurkar et al. 2016), as LongBench applies it (`metrics.py` at 2e00731).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_f1(prediction: str, reference: str) -> float:
    """Bag-of-words F1 of the normalised words, 0 to 1; two texts without a word give 0. Source: as above."""
    said, wanted = normalize_answer(prediction).split(), normalize_answer(reference).split()
    common = sum((Counter(said) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def same_answer(prediction: str, reference: str) -> float:
    """1 when the two are equal after trimming blanks and one final period and folding case, else 0."""
    return float(_bare(prediction) == _bare(reference))


def holds_answer(prediction: str, reference: str) -> float:
    """1 when the reference occurs in the prediction, case folded, else 0. An answer that rambles on still
    counts.

    Raises:
        ValueError: The reference is empty: everything would hold it.
    """
    if not reference.strip():
        raise ValueError("an empty reference is contained in every answer")
    return float(reference.strip().casefold() in prediction.casefold())


def _bare(text: str) -> str:
    return text.strip().removesuffix(".").rstrip().casefold()


def f1(prediction: str, references: Sequence[str]) -> Scores:
    """`f1`: the best `word_f1` over the references."""
    return {"f1": max(word_f1(prediction, reference) for reference in references)}


def exact_match(prediction: str, references: Sequence[str]) -> Scores:
    """`exact_match`: 1 when the prediction equals a reference after `normalize_answer`."""
    said = normalize_answer(prediction)
    return {"exact_match": float(any(said == normalize_answer(reference) for reference in references))}


def accuracy(prediction: str, references: Sequence[str]) -> Scores:
    """`accuracy`: 1 when any reference occurs in the prediction, case folded (RULER's string match, "part").

    A prediction that repeats its whole context scores 1; look at `exact_match` beside it.
    """
    return {"accuracy": max(holds_answer(prediction, reference) for reference in references)}


def rouge(prediction: str, references: Sequence[str]) -> Scores:
    """`rouge1`, `rouge2`, `rougeL`, `rougeLsum`: F-measures of the package rouge_score, without a stemmer.

    With several references each type takes its best one. rougeLsum takes lines as sentences.
    """
    scorer = _rouge_scorer()
    found = [scorer.score(reference, prediction) for reference in references]
    return {kind: float(max(scores[kind].fmeasure for scores in found)) for kind in ROUGE_TYPES}


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE_TYPES), use_stemmer=False)


@dataclass(frozen=True)
class Scorer:
    """A named way to score.

    Args:
        name: As `--metrics` and the results know it.
        version: Changes whenever a score could.
        keys: The scores it returns.
        binary: Its scores are 0 or 1, so that their mean is a share.
        score: `(prediction, references) -> {key: value in [0, 1]}`; references are not empty.
    """

    name: str
    version: str
    keys: tuple[str, ...]
    binary: bool
    score: Callable[[str, Sequence[str]], Scores]


SCORERS = {
    scorer.name: scorer
    for scorer in (
        Scorer("rouge", "rouge@rouge_score-0.1.2-no-stemmer", ROUGE_TYPES, False, rouge),
        Scorer("f1", "f1@longbench-2e00731", ("f1",), False, f1),
        Scorer("exact_match", "exact_match@squad-normalized", ("exact_match",), True, exact_match),
        Scorer("accuracy", "accuracy@contains-any", ("accuracy",), True, accuracy),
    )
}


def check_metrics(names: Sequence[str]) -> None:
    """Raise `SettingsError` for a name that is no metric, or when there is none."""
    if not names:
        raise SettingsError("--metrics is empty", hint=f"Known metrics: {', '.join(SCORERS)}.")
    for name in names:
        if name not in SCORERS:
            close = difflib.get_close_matches(name, list(SCORERS), n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise SettingsError(
                f"--metrics {name}: unknown metric{meant}", rule=f"Known metrics: {', '.join(SCORERS)}."
            )
