"""The section of one task, and of a group of tasks: pictures, tables of the same numbers, every score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longlora_cli.evaluation.report.curves import accuracy_by_length, loss_by_position
from longlora_cli.evaluation.report.heatmap import heatmap
from longlora_cli.evaluation.report.markup import Markup, table, tag
from longlora_cli.evaluation.report.numbers import interval, number, percent
from longlora_cli.evaluation.report.parts import (
    SCORE_COLUMNS,
    definitions,
    figure,
    folded,
    score_cells,
    slug,
    value_text,
)
from longlora_cli.evaluation.report.samples import Row
from longlora_cli.evaluation.report.scores import other_facts, scores_of

# Perplexity's texts in a table; more of them are in samples/ppl.jsonl.
_MOST_TEXTS = 200


def group_section(name: str, group: dict[str, Any]) -> Markup:
    """The mean of several tasks."""
    tasks = group.get("tasks", [])
    parts: list[Markup] = [tag("p", "The mean of " + ", ".join(tasks))]
    if len(group.get("lengths", [])) > 1:
        plot = accuracy_by_length(name, group)
        parts.append(figure("Mean score by length, band: 95 % intervals", plot))
    caption = f"{name}: every score"
    parts.append(
        table(
            SCORE_COLUMNS,
            [score_cells(score) for score in scores_of(group)],
            caption=caption,
            class_="scores",
        )
    )
    facts = {key: value for key, value in other_facts(group).items() if key != "tasks"}
    if facts:
        parts.append(definitions([(key, value_text(value)) for key, value in facts.items()]))
    return tag("section", tag("h2", name), *parts, id=slug(name), class_="group")


def task_section(task: str, summary: dict[str, Any], rows: Sequence[Row]) -> Markup:
    """Everything about a task but its samples.

    Args:
        task: Its name.
        summary: What `results.json` says of it; parts of known shape are drawn, see `scores_of`.
        rows: Its rows; perplexity's texts make a table.
    """
    scores = scores_of(summary)
    parts: list[Markup] = []
    if summary.get("cells"):
        parts.append(figure("Score by length and depth, in per cent", heatmap(task, summary)))
        parts.append(_cells_table(task, summary))
    if len(summary.get("lengths", [])) > 1:
        parts.append(figure("Score by length, band: 95 % intervals", accuracy_by_length(task, summary)))
    if summary.get("effective_length"):
        parts.append(_effective(summary["effective_length"]))
    if summary.get("by_position"):
        title = (
            f"Loss by tokens of context, band: 95 % intervals; {summary['curve_windows']:,} "
            f"{summary['curve_source']}"
        )
        parts += [figure(title, loss_by_position(task, summary)), _positions_table(task, summary)]
    if scores:
        caption = f"{task}: every score"
        parts.append(
            table(SCORE_COLUMNS, [score_cells(score) for score in scores], caption=caption, class_="scores")
        )
    if texts := [row for row in rows if "scores" not in row and "text" in row]:
        parts.append(_texts_table(task, texts))
    if facts := other_facts(summary):
        parts.append(
            folded("Counts and costs", definitions([(key, value_text(facts[key])) for key in facts]))
        )
    return tag("section", tag("h2", task), *parts, id=slug(task), class_="task", data_task=task)


def _cells_table(task: str, summary: dict[str, Any]) -> Markup:
    rows = [
        [
            f"{cell['length']:,}",
            percent(cell["depth"]),
            percent(cell["score"]),
            interval(cell.get("ci95"), is_share=True),
            f"{cell['n']:,}",
        ]
        for cell in summary["cells"]
    ]
    head = ["length (tokens)", "depth", "score", "95 % interval", "n"]
    return folded("The same as a table", table(head, rows, caption=f"{task}: score of every cell"))


def _positions_table(task: str, summary: dict[str, Any]) -> Markup:
    rows = [
        [
            f"{bucket['from']:,} to {bucket['to']:,}",
            name,
            number(bucket[f"{prefix}nll"]),
            number(bucket[f"{prefix}perplexity"]),
            interval(bucket.get(f"{prefix}ci95"), is_share=False),
            f"{bucket['n']:,}",
        ]
        for name, prefix in (("full", ""), ("short", "short_"))
        for bucket in summary["by_position"]
        if f"{prefix}nll" in bucket
    ]
    head = ["tokens of context", "context", "nats a token", "perplexity", "95 % interval", "n (tokens)"]
    return folded("The same as a table", table(head, rows, caption=f"{task}: loss by position"))


def _texts_table(task: str, texts: Sequence[Row]) -> Markup:
    rows = [
        [str(row["text"]), *(value_text(row.get(key)) for key in ("n", "nll", "bytes", "seconds"))]
        for row in texts[:_MOST_TEXTS]
    ]
    caption = f"{task}: {len(texts):,} texts"
    if len(texts) > _MOST_TEXTS:
        caption += f", the first {_MOST_TEXTS} of them; all are in samples/{task}.jsonl"
    return folded(
        "Texts", table(["text", "tokens", "nats a token", "bytes", "seconds"], rows, caption=caption)
    )


def _effective(rules: dict[str, Any]) -> Markup:
    """The effective context length by each rule, in words that say what the intervals leave open."""
    facts = [
        (f"Effective length by {rule}, {percent(found['threshold'])} needed", str(found["text"]))
        for rule, found in rules.items()
    ]
    return definitions(facts)
