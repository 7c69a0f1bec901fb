"""The scorers as `evaluate.Metric`s, for code that knows that interface. They need no network and no cache
folder.

    Metric("f1").compute(predictions=["Paris"], references=[["Paris", "City of Light"]])  ->  {"f1": 1.0}

`evaluate.load` of a local script imports the script's imports through the hub's rules, so these are classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from longlora_cli.evaluation.scorers import SCORERS, Scorer, check_metrics


class ScorerMetric(evaluate.Metric):
    """Mean of one scorer over predictions; a subclass names the scorer.

    `compute(predictions=[...], references=[[...], ...])` returns `{key: mean}`. With `per_sample=True` it
    also holds `per_sample`: `{key: [value of each prediction]}`.
    """

    scorer: Scorer

    def __init__(self, **options: Any) -> None:
        # In memory: a metric that is computed in one go has no use for evaluate's Arrow file in the home
        # folder.
        super().__init__(**{"keep_in_memory": True, **options})

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("string"), "references": [datasets.Value("string")]}
        return evaluate.MetricInfo(
            description=f"{self.scorer.version}: {self.scorer.score.__doc__}",
            citation="",
            features=datasets.Features(features),
        )

    def _download_and_prepare(self, dl_manager: Any) -> None:
        """Nothing to fetch."""

    def _compute(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]], per_sample: bool = False
    ) -> dict[str, Any]:
        rows = [self.scorer.score(p, r) for p, r in zip(predictions, references, strict=True)]
        values = {key: [row[key] for row in rows] for key in self.scorer.keys}
        means: dict[str, Any] = {key: sum(column) / len(column) for key, column in values.items()}
        return means | {"per_sample": values} if per_sample else means


class Rouge(ScorerMetric):
    """ROUGE-1, -2, -L and -Lsum, F-measure, best reference."""

    scorer = SCORERS["rouge"]


class F1(ScorerMetric):
    """Bag-of-words F1 with LongBench's normalisation, best reference."""

    scorer = SCORERS["f1"]


class ExactMatch(ScorerMetric):
    """Equality after SQuAD's normalisation."""

    scorer = SCORERS["exact_match"]


class Accuracy(ScorerMetric):
    """Any reference occurs in the prediction."""

    scorer = SCORERS["accuracy"]


METRICS: dict[str, type[ScorerMetric]] = {c.scorer.name: c for c in (Rouge, F1, ExactMatch, Accuracy)}


def load_metrics(names: Sequence[str]) -> list[ScorerMetric]:
    """The metrics of these names, each once.

    Raises:
        SettingsError: See `scorers.check_metrics`.
    """
    check_metrics(names)
    return [METRICS[name]() for name in dict.fromkeys(names)]
