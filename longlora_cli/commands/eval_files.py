"""Tables of benchmarks read from files: a line a task, then categories, parts, and what was cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longlora_cli.console import Console

_MOST_PARTS = 24  # v2 has 20 sub-domains; more lines than that hide the others


def show_benchmarks(
    benchmarks: Mapping[str, dict[str, Any]], tasks: Mapping[str, dict[str, Any]], console: Console
) -> None:
    """Print scores in per cent with intervals, the other rules' beside them.

    Args:
        benchmarks: From `file_scores.score_benchmark`, by family.
        tasks: From `file_scores.score_file_task`, by `family.task`.
        console: Prints.
    """
    for family, summary in benchmarks.items():
        columns = list(summary["columns"])
        heads = [name.removeprefix(family) for name in columns]
        rows = [
            [task, found["n"], _percent(found), *(_column(found, name) for name in columns), found["scorer"]]
            for task in summary["tasks"]
            for found in [tasks[f"{family}.{task}"]]
        ]
        mean = [f"{100 * summary['score']:.2f}", *(f"{100 * v:.2f}" for v in summary["columns"].values())]
        rows.append(["mean of tasks", summary["n"], *mean, ""])
        console.table(
            f"{family}: scores in per cent with 95 % intervals",
            ["task", "n", "score", *heads, "scorer"],
            rows,
        )
        _show_parts(summary, console)
        _show_cuts(family, summary, tasks, console)


def _show_parts(summary: Mapping[str, Any], console: Console) -> None:
    parts = [[name, "", f"{100 * score:.2f}"] for name, score in summary.get("categories", {}).items()]
    for fact, values in summary.get("parts", {}).items():
        parts += [[f"{fact}: {value}", p["n"], f"{100 * p['score']:.2f}"] for value, p in values.items()]
    parts += [
        [f"{p['length']:,} tokens", p["n"], f"{100 * p['score']:.2f}"] for p in summary.get("lengths", ())
    ]
    if parts:
        console.table("Means over tasks", ["part", "n", "score"], parts[:_MOST_PARTS])
    if len(parts) > _MOST_PARTS:
        console.print(f"{len(parts) - _MOST_PARTS} more parts are in results.json")


def _show_cuts(
    family: str, summary: Mapping[str, Any], tasks: Mapping[str, dict[str, Any]], console: Console
) -> None:
    if summary["truncated"]:
        console.print(
            f"{family}: {summary['truncated']} of {summary['n']} prompts were cut, by {summary['lost_tokens']:,} "
            "tokens in all"
        )
    if summary["skipped"]:
        console.print(f"{family}: {summary['skipped']} samples were too long and left out")
    ended = {task: tasks[f"{family}.{task}"]["cut"] for task in summary["tasks"]}
    if shares := [f"{task} {100 * share:.0f} %" for task, share in ended.items() if share]:
        console.print(f"{family}: answers that ended at their limit: {', '.join(shares)}")
    wordings = {source for task in summary["tasks"] for source in tasks[f"{family}.{task}"]["prompts"]}
    console.print(f"{family}: prompts are {', '.join(sorted(wordings))}")


def _percent(found: Mapping[str, Any]) -> str:
    interval = found["ci95"]
    low_high = "" if interval is None else f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return f"{100 * found['score']:.2f}{low_high}"


def _column(found: Mapping[str, Any], name: str) -> str:
    return f"{100 * found['columns'][name]:.2f}" if name in found["columns"] else ""
