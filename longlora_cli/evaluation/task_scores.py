"""Scores of tasks whose questions name their scorer: by length, by depth where there is one, and of groups of
tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from longlora_cli.errors import DataError
from longlora_cli.evaluation.effective_length import RULER_THRESHOLD, effective_lengths
from longlora_cli.evaluation.generation import Row
from longlora_cli.evaluation.scorers import find_scorer
from longlora_cli.evaluation.statistics import mean
from longlora_cli.task_names import GROUPS

# Answers longer than this many times the reference are counted: rules that look for a reference inside reward them.
_LONG_ANSWER = 3


def score_task(
    rows: Sequence[Row], *, threshold: float = RULER_THRESHOLD
) -> tuple[dict[str, Any], list[Row]]:
    """Judge a task's rows.

    Args:
        rows: From `predict`, of one task, each with its `scorer` and `length`; at least one.
        threshold: What a length must reach for the effective length by RULER's rule.

    Returns:
        The summary `{"n", "score", "ci95", "scores", "cut", "long", "scorer", "lengths": [...], "cells": [...]}`, with
        `effective_length` where there are several lengths, and the rows with their `scores`, where `score` is the one
        that counts. All are shares from 0 to 1. `scores` are the means of all that the scorer gives, `cut` the share
        of answers that ended at their limit, `long` of those more than three times as long as their longest
        reference. `cells` are there where rows have a `depth`. Intervals are Wilson's where each score is 0 or 1, else
        a bootstrap.

    Raises:
        DataError: No rows. A fault inside a scorer is raised as it is.
    """
    if not rows:
        raise DataError("there is nothing to score")
    scored = [{**row, "scores": judged(row)} for row in rows]
    lengths = sorted({row["length"] for row in rows})
    summary = _means(scored)
    summary["scorer"] = find_scorer(rows[0]["scorer"]).scorer.version
    summary["lengths"] = [
        {"length": length, **_means([row for row in scored if row["length"] == length])} for length in lengths
    ]
    summary |= _effective(summary["lengths"], threshold)
    places = sorted({(row["length"], row["depth"]) for row in rows if "depth" in row})
    if places:
        summary["cells"] = [
            {"length": length, "depth": depth, **_means(_at(scored, length, depth))}
            for length, depth in places
        ]
    return summary, scored


def score_groups(
    names: Sequence[str], summaries: Mapping[str, dict[str, Any]], *, threshold: float = RULER_THRESHOLD
) -> dict[str, dict[str, Any]]:
    """The groups that were asked for by name; see `score_group`."""
    return {
        name: score_group({task: summaries[task] for task in GROUPS[name]}, threshold=threshold)
        for name in names
        if name in GROUPS
    }


def score_group(
    summaries: Mapping[str, dict[str, Any]], *, threshold: float = RULER_THRESHOLD
) -> dict[str, Any]:
    """Mean over tasks at each length, as RULER has it, and its means over lengths.

    `wavg_inc` and `wavg_dec` weigh lengths by 1, 2, 3, ... and the other way round: for who reads long texts mostly,
    and for who seldom does. Source: NVIDIA/RULER, README, "wAvg".

    Args:
        summaries: Of the group's tasks, with the same lengths and the same n.
        threshold: As for `score_task`.

    Returns:
        `{"tasks", "n", "score", "wavg_inc", "wavg_dec", "lengths": [{"length", "n", "score", "ci95"}]}`. The
        interval of a mean of tasks has each task's own spread behind it: its halves are the root of the sum of
        squares of theirs.
    """
    lengths = []
    for place, first in enumerate(next(iter(summaries.values()))["lengths"]):
        parts = [summary["lengths"][place] for summary in summaries.values()]
        score = math.fsum(part["score"] for part in parts) / len(parts)
        n = sum(part["n"] for part in parts)
        lengths.append({"length": first["length"], "n": n, "score": score, "ci95": _interval(score, parts)})
    scores = [length["score"] for length in lengths]
    weights = range(1, len(scores) + 1)
    return {
        "tasks": list(summaries),
        "n": sum(length["n"] for length in lengths),
        "score": math.fsum(scores) / len(scores),
        "wavg_inc": _weighted(scores, weights),
        "wavg_dec": _weighted(scores, weights[::-1]),
        "lengths": lengths,
        **_effective(lengths, threshold),
        **control_mean(list(summaries.values())),
    }


def control_mean(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of tasks' controls, each counting once: `{"control": {"n", "left_out", "score", "ci95"}}`.

    Empty unless each has one; without a score where one of them could ask nothing without its context.
    """
    controls = [summary.get("control") for summary in summaries]
    if not controls or not all(controls):
        return {}
    found: dict[str, Any] = {name: sum(c[name] for c in controls if c) for name in ("n", "left_out")}
    if all(c is not None and c.get("score") is not None for c in controls):
        score = math.fsum(c["score"] for c in controls if c) / len(controls)
        parts = [{"ci95": None, **c} for c in controls if c]
        found |= {"score": score, "ci95": _interval(score, parts)}
    return {"control": found}


def _effective(lengths: Sequence[dict[str, Any]], threshold: float) -> dict[str, Any]:
    found = effective_lengths(lengths, threshold=threshold)
    return {} if found is None else {"effective_length": found}


def judged(row: Row) -> dict[str, float]:
    """All scores of a row as shares, the one that counts as `score`."""
    choice = find_scorer(row["scorer"])
    found = choice.score(row["prediction"], row["references"], row.get("extra", {}))
    scale = choice.scorer.scale
    others = {key: value / scale for key, value in found.items() if key != choice.key}
    return {"score": found[choice.key] / scale, **others}


def _at(rows: Sequence[Row], length: int, depth: float) -> list[Row]:
    return [row for row in rows if (row["length"], row.get("depth")) == (length, depth)]


def _means(rows: Sequence[Row]) -> dict[str, Any]:
    values = [row["scores"]["score"] for row in rows]
    means = {key: math.fsum(row["scores"][key] for row in rows) / len(rows) for key in rows[0]["scores"]}
    return {
        **mean(values, binary=set(values) <= {0.0, 1.0}),
        "scores": means,
        "cut": sum(row["finish"] == "length" for row in rows) / len(rows),
        "long": sum(is_long(row) for row in rows) / len(rows),
    }


def is_long(row: Row) -> bool:
    """The answer is over three times as long as what was asked for; rules that look for a reference reward that."""
    if not row["references"]:
        return False
    wanted = sum(map(len, row["references"])) if len(row["references"]) > 1 else len(row["references"][0])
    return len(row["prediction"]) > _LONG_ANSWER * wanted


def _interval(score: float, parts: Sequence[dict[str, Any]]) -> list[float] | None:
    if any(part["ci95"] is None for part in parts):
        return None
    below = math.sqrt(math.fsum((part["score"] - part["ci95"][0]) ** 2 for part in parts)) / len(parts)
    above = math.sqrt(math.fsum((part["ci95"][1] - part["score"]) ** 2 for part in parts)) / len(parts)
    return [max(0.0, score - below), min(1.0, score + above)]


def _weighted(values: Sequence[float], weights: Sequence[int]) -> float:
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
