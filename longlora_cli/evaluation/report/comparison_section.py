"""Two evaluations side by side: the grid before and after, perplexity by position, and every difference with its p."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longlora_cli.evaluation.report.markup import Markup, table, tag
from longlora_cli.evaluation.report.numbers import interval, number, percent, tokens

ID = "comparison"


def comparison_section(
    found: Mapping[str, Any], tasks: Mapping[str, Any], others: Mapping[str, Any]
) -> Markup:
    """The section of a page about `tasks` that was compared with another evaluation.

    Args:
        found: What `comparison.compare_evaluations` gives; A is the page's own evaluation.
        tasks: `tasks` of the page's own results.
        others: `tasks` of the other's.
    """
    a, b = found["a"], found["b"]
    parts = [
        tag("p", f"Before: {b['folder']} ({b['model']}). After, this page: {a['folder']} ({a['model']}).")
    ]
    for task in (task for task in tasks if task in others):
        if tasks[task].get("cells") and others[task].get("cells"):
            parts.append(_grid(task, others[task], tasks[task]))
        if tasks[task].get("by_position") and others[task].get("by_position"):
            parts.append(_positions(task, others[task], tasks[task]))
    if found["cells"]:
        parts.append(_differences(found))
    parts += [
        tag("p", f"{left['task']} {left.get('score', '')} is left out: {left['why']}")
        for left in found["left_out"]
    ]
    return tag("section", tag("h2", "Before and after"), *parts, id=ID)


def _grid(task: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Markup:
    """Depths down, lengths across, `0 → 98` in each cell that both have."""
    cells = [{(c["length"], c["depth"]): c for c in one["cells"]} for one in (before, after)]
    places = sorted(cells[0].keys() & cells[1].keys())
    lengths, depths = sorted({length for length, _ in places}), sorted({depth for _, depth in places})

    def cell(length: int, depth: float) -> str:
        if (length, depth) not in places:
            return "–"
        was, now = (f"{100 * one[length, depth]['score']:.0f}" for one in cells)
        return f"{was} → {now}"

    rows = [[percent(depth), *(cell(length, depth) for length in lengths)] for depth in depths]
    least = min((one[place]["n"] for one in cells for place in places), default=0)
    caption = (
        f"{task}: per cent right before → after by length (tokens) and depth, n of a cell at least {least:,}"
    )
    return table(["depth", *(tokens(length) for length in lengths)], rows, caption=caption, class_="lengths")


def _positions(task: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Markup:
    """Perplexity of the buckets that both have; gains where both were read with a short context too."""
    was = {(bucket["from"], bucket["to"]): bucket for bucket in before["by_position"]}
    pairs = [(was[key], b) for b in after["by_position"] if (key := (b["from"], b["to"])) in was]
    rows = [
        [
            f"{new['from']:,} to {new['to']:,}",
            number(old["perplexity"]),
            number(new["perplexity"]),
            number(old.get("gain")),
            number(new.get("gain")),
            f"{old['n']:,}, {new['n']:,}",
        ]
        for old, new in pairs
    ]
    head = ["tokens of context", "before", "after", "gain before", "gain after", "n (tokens)"]
    caption = f"{task}: perplexity by position, and what the full context gains over the short one in nats"
    return table(head, rows, caption=caption)


def _differences(found: Mapping[str, Any]) -> Markup:
    rows = [
        [
            cell["task"],
            cell["score"],
            "all" if cell["length"] is None else f"{cell['length']:,}",
            number(cell["b"]),
            number(cell["a"]),
            number(cell["difference"]),
            interval(cell["ci95"], is_share=False),
            _p(max(cell["p_holm"], cell.get("p_by_text_holm", 0.0))),
            f"{cell['n']:,}",
        ]
        for cell in found["cells"]
    ]
    head = [
        "task",
        "score",
        "length",
        "before",
        "after",
        "difference",
        "95 % interval",
        "p (Holm)",
        "n (pairs)",
    ]
    return table(head, rows, caption="Every difference, paired; p as the terminal shows it", class_="scores")


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"
