from __future__ import annotations

import evaluate
import pytest

from longlora_cli.evaluation.metrics import F1, METRICS, Accuracy, Rouge, load_metrics
from longlora_cli.evaluation.scorers import SCORERS

PREDICTIONS = ["Paris", "the cat sat", "no"]
REFERENCES = [["Paris", "City of Light"], ["a cat sat down"], ["yes"]]


def test_metrics_are_evaluate_metrics_and_every_scorer_has_one():
    assert set(METRICS) == set(SCORERS)
    assert all(isinstance(metric, evaluate.Metric) for metric in load_metrics(list(METRICS)))


@pytest.mark.parametrize("name", METRICS)
def test_compute_is_the_mean_of_the_scorer_and_gives_each_sample_when_asked(name):
    metric = METRICS[name]()
    expected = [SCORERS[name].score(p, r) for p, r in zip(PREDICTIONS, REFERENCES, strict=True)]
    means = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    full = metric.compute(predictions=PREDICTIONS, references=REFERENCES, per_sample=True)
    for key in SCORERS[name].keys:
        assert means[key] == pytest.approx(sum(row[key] for row in expected) / 3)
        assert full["per_sample"][key] == [row[key] for row in expected]


def test_batches_add_up_and_metrics_combine_as_evaluate_does_it():
    metric = Accuracy()
    for prediction, references in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add(prediction=prediction, references=references)
    assert metric.compute() == {"accuracy": pytest.approx(1 / 3)}
    both = evaluate.combine([F1(), Rouge()]).compute(predictions=PREDICTIONS, references=REFERENCES)
    assert {"f1", "rougeL"} <= set(both)


def test_metrics_leave_nothing_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    metric = F1(cache_dir=str(tmp_path / "cache"))
    metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
