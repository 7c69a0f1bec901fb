"""Scores of file-based tasks: of each task by its published rule, with the other rules as columns, and of benchmarks.

All scores are shares from 0 to 1. An interval is drawn from documents where several questions are about one text, since
they are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from longlora_cli.errors import DataError
from longlora_cli.evaluation.file_plan import CutCounts
from longlora_cli.evaluation.generation import Row
from longlora_cli.evaluation.scorers import find_scorer
from longlora_cli.evaluation.statistics import mean_clustered
from longlora_cli.evaluation.task_scores import control_mean, is_long, judged
from longlora_cli.evaluation.tasks.files.family import Family

Summary = dict[str, Any]


def score_file_task(
    family: Family, task: str, rows: Sequence[Row], counts: CutCounts
) -> tuple[Summary, list[Row]]:
    """Judge the rows of one task.

    Args:
        family: Its benchmark.
        task: Its name there.
        rows: From `predict`, each with its `scorer`; at least one.
        counts: What was cut.

    Returns:
        The summary `{"n", "score", "ci95", "clusters", "scores", "columns", "cut", "long", "scorer", "prompts",
        "parts", "lengths", "samples", "skipped", "truncated", "lost_tokens"}` and the rows with their `scores`.
        `columns` are the means by other rules, by their version; `parts` the scores by each fact of the family's;
        `lengths` are there where rows have a nominal length.

    Raises:
        DataError: No rows. A fault inside a scorer is raised as it is.
    """
    if not rows:
        raise DataError(
            f"{family.name}.{task}: all {counts.skipped} samples are longer than what is read",
            hint="Use --truncate middle.",
        )
    columns = family.columns(task)
    scored = [{**row, "scores": judged(row) | _by_columns(row, columns)} for row in rows]
    summary = _means(scored, columns)
    summary["scorer"] = find_scorer(rows[0]["scorer"]).scorer.version
    wordings = [row["prompts"] for row in rows]
    summary["prompts"] = {source: wordings.count(source) for source in sorted(set(wordings))}
    if family.parts:
        summary["parts"] = {
            fact: {str(value): means for value, means in _by(scored, fact, columns).items()}
            for fact in family.parts
        }
    if all("length" in row for row in scored):
        summary["lengths"] = [
            {"length": length, **means} for length, means in _by(scored, "length", columns).items()
        ]
    summary |= {
        "samples": counts.samples,
        "skipped": counts.skipped,
        "truncated": counts.truncated,
        "lost_tokens": counts.lost_tokens,
    }
    return summary, scored


def score_benchmark(family: Family, summaries: Mapping[str, Summary]) -> Summary:
    """Means over a benchmark's tasks, each of which counts once, as the published tables have it.

    Args:
        family: The benchmark.
        summaries: Of its tasks, by their names there.

    Returns:
        `{"tasks", "n", "score", "columns", "categories", "category_score", "parts", "lengths", "skipped", "truncated",
        "lost_tokens"}`: `score` is the mean over tasks, `category_score` the mean over the categories' means, `parts`
        and `lengths` the means over the tasks that have rows there.
    """
    every = list(summaries.values())
    names = sorted({name for summary in every for name in summary["columns"]})
    found: Summary = {
        "tasks": list(summaries),
        "n": sum(summary["n"] for summary in every),
        "score": _macro([summary["score"] for summary in every]),
        # A task without this column has one rule only, which is then the score that counts.
        "columns": {name: _macro([s["columns"].get(name, s["score"]) for s in every]) for name in names},
    }
    categories = {
        name: _macro([summaries[task]["score"] for task in tasks if task in summaries])
        for name, tasks in family.categories.items()
        if any(task in summaries for task in tasks)
    }
    if categories:
        found |= {"categories": categories, "category_score": _macro(list(categories.values()))}
    found |= control_mean(every)
    if family.parts:
        found["parts"] = {fact: _parts(every, fact) for fact in family.parts}
    if all("lengths" in summary for summary in every):
        found["lengths"] = _lengths(every)
    return found | {name: sum(s[name] for s in every) for name in ("skipped", "truncated", "lost_tokens")}


def _parts(summaries: Sequence[Summary], fact: str) -> Summary:
    values = dict.fromkeys(value for summary in summaries for value in summary["parts"][fact])
    return {
        value: {
            "n": sum(s["parts"][fact][value]["n"] for s in summaries if value in s["parts"][fact]),
            "score": _macro(
                [s["parts"][fact][value]["score"] for s in summaries if value in s["parts"][fact]]
            ),
        }
        for value in sorted(values)
    }


def _lengths(summaries: Sequence[Summary]) -> list[Summary]:
    lengths = sorted({part["length"] for summary in summaries for part in summary["lengths"]})
    return [
        {"length": length, "n": sum(p["n"] for p in parts), "score": _macro([p["score"] for p in parts])}
        for length in lengths
        for parts in [[p for summary in summaries for p in summary["lengths"] if p["length"] == length]]
    ]


def _by_columns(row: Row, columns: Sequence[str]) -> dict[str, float]:
    found = {}
    for name in columns:
        choice = find_scorer(name)
        values = choice.score(row["prediction"], row["references"], row.get("extra", {}))
        found[name] = values[choice.key] / choice.scorer.scale
    return found


def _by(rows: Sequence[Row], fact: str, columns: Sequence[str]) -> dict[Any, Summary]:
    groups: dict[Any, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (str(type(row[fact])), row[fact])):
        groups.setdefault(row[fact], []).append(row)
    return {value: _means(group, columns) for value, group in groups.items()}


def _means(rows: Sequence[Row], columns: Sequence[str]) -> Summary:
    values = [row["scores"]["score"] for row in rows]
    keys = [key for key in rows[0]["scores"] if key not in columns]
    return {
        **mean_clustered(values, [row["document"] for row in rows], binary=set(values) <= {0.0, 1.0}),
        "scores": {key: _macro([row["scores"][key] for row in rows]) for key in keys},
        "columns": {name: _macro([row["scores"][name] for row in rows]) for name in columns},
        "cut": sum(row["finish"] == "length" for row in rows) / len(rows),
        "long": sum(is_long(row) for row in rows) / len(rows),
    }


def _macro(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
