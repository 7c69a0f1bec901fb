"""Tables of synthetic tasks: one line a task, one column a length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longlora_cli.console import Console
from longlora_cli.evaluation.effective_length import tokens


def show_tasks(
    summaries: Mapping[str, dict[str, Any]], groups: Mapping[str, dict[str, Any]], console: Console
) -> None:
    """Print scores in per cent by length, with intervals, then each group's mean and weighted means.

    Args:
        summaries: From `task_scores.score_task`, by task; nothing is printed where there is none.
        groups: From `task_scores.score_groups`.
        console: Prints.
    """
    if not summaries:
        return
    lengths = [part["length"] for part in next(iter(summaries.values()))["lengths"]]
    rows = [
        [name, *map(_cell, summary["lengths"]), _cell(summary)]
        for name, summary in {
            **summaries,
            **{f"{name} (mean)": group for name, group in groups.items()},
        }.items()
    ]
    n = next(iter(summaries.values()))["lengths"][0]["n"]
    columns = ["task", *(f"{length:,}" for length in lengths), "all"]
    console.table(f"Scores in per cent with 95 % intervals, n={n} a task and length", columns, rows)
    for name, group in groups.items():
        console.print(
            f"{name}: mean of {len(group['tasks'])} tasks {100 * group['score']:.1f}, weighted to long lengths "
            f"{100 * group['wavg_inc']:.1f}, to short ones {100 * group['wavg_dec']:.1f}"
        )
        show_effective_length(group, console, f"{name}: ")
    cut = {name: summary["cut"] for name, summary in summaries.items() if summary["cut"]}
    if cut:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in cut.items())
        console.print(f"answers that ended at their limit: {shares}")


def show_effective_length(summary: Mapping[str, Any], console: Console, name: str = "") -> None:
    """Print it by both rules; nothing for a task of one length."""
    rules = {"ruler": "{threshold:.1f} % right", "nolima": "85 % of the {base:.1f} % at {base_length}"}
    for rule, needed in rules.items() if "effective_length" in summary else ():
        found = summary["effective_length"][rule]
        numbers = {"threshold": 100 * found["threshold"], "base": 100 * found.get("base", 0.0)}
        wanted = needed.format(**numbers, base_length=tokens(found.get("base_length", 0)))
        console.print(f"{name}effective length ({wanted}): {found['text']}")


def _cell(part: Mapping[str, Any]) -> str:
    interval = part.get("ci95")
    low_high = "" if interval is None else f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"
    return f"{100 * part['score']:.0f}{low_high}"
