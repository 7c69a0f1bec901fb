"""Scores of finished predictions: no model, no GPU, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlora_cli.errors import DataError
from longlora_cli.evaluation import statistics
from longlora_cli.evaluation.predictions import Prediction, read_predictions
from longlora_cli.evaluation.scorers import Choice, Scores, UnscorableError
from longlora_cli.evaluation.scorers.longbench import BUCKETS, bucket_of


def rescore(path: Path, choice: Choice) -> dict[str, Any]:
    """Score every prediction of a file.

    Args:
        path: See `read_predictions`.
        choice: From `find_scorer`.

    Returns:
        `scores` (one per row, in the file's order and the scorer's own scale), their `mean`, `n`, `ci95`, `scorer`
        (name and version), `key`, `scale`; with several scores a row, `columns` (key -> `mean` and `scores`) of all;
        with several tasks, `tasks` (task -> `n`, `mean`, `ci95`); for LongBench's rules on rows with `length`,
        `buckets`.

    Raises:
        DataError: A row cannot be read or judged; the message begins with `file:line`.
    """
    scorer = choice.scorer
    rows = read_predictions(
        path,
        tasks=scorer.tasks,
        may_lack_references=scorer.may_lack_references,
        raw_references=scorer.raw_references,
    )
    found = [_score(path, row, choice) for row in rows]
    values = [scores[choice.key] for scores in found]
    result = {
        "scores": values,
        **_summary(values, choice),
        "scorer": scorer.version,
        "key": choice.key,
        "scale": scorer.scale,
    }
    if len(scorer.keys) > 1:
        result["columns"] = {key: _column(found, key, choice) for key in scorer.keys}
    return result | _parts(rows, values, choice)


def _parts(rows: Sequence[Prediction], values: Sequence[float], choice: Choice) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    tasks = [row.extra.get("task") for row in rows]
    if None not in tasks and len(set(map(str, tasks))) > 1:
        parts["tasks"] = _by([str(task) for task in tasks], values, choice)
    lengths = [row.extra.get("length") for row in rows]
    is_longbench = choice.scorer.name.split(".")[0] == "longbench"
    if is_longbench and all(isinstance(length, int | float) for length in lengths):
        found = _by([bucket_of(float(str(length))) for length in lengths], values, choice)
        parts["buckets"] = {bucket: found[bucket] for bucket in BUCKETS if bucket in found}
    return parts


def _score(path: Path, row: Prediction, choice: Choice) -> Scores:
    try:
        return choice.score(row.prediction, row.references, row.extra)
    except UnscorableError as error:
        place = f"{path}:{row.line}: {error.message}"
        raise DataError(place, rule=error.rule, hint=error.hint) from error


def _summary(values: Sequence[float], choice: Choice) -> dict[str, Any]:
    scale = choice.scorer.scale
    shares = [value / scale for value in values]
    # A rule that gives yes or no for one task and a grade for another counts by what it gave.
    binary = choice.scorer.binary or set(shares) <= {0.0, 1.0}
    found = statistics.mean(shares, binary=binary)
    interval = found["ci95"] and [scale * end for end in found["ci95"]]
    return {"mean": scale * found["score"], "n": found["n"], "ci95": interval}


def _column(found: Sequence[Scores], key: str, choice: Choice) -> dict[str, Any]:
    values = [scores[key] for scores in found]
    return {"mean": _summary(values, choice)["mean"], "scores": values}


def _by(names: Sequence[str], values: Sequence[float], choice: Choice) -> dict[str, Any]:
    groups: dict[str, list[float]] = {}
    for name, value in zip(names, values, strict=True):
        groups.setdefault(name, []).append(value)
    return {name: _summary(group, choice) for name, group in groups.items()}
