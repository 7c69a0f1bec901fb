"""Pieces that several sections of a report are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longlora_cli.evaluation.report.curves import interval_bar
from longlora_cli.evaluation.report.markup import Markup, tag
from longlora_cli.evaluation.report.numbers import interval, number, percent
from longlora_cli.evaluation.report.scores import Score

SCORE_COLUMNS = ["score", "of", "value", "", "95 % interval", "n", "scorer"]
_SHOWN_VALUES = 12


def slug(task: str) -> str:
    """The id of a task's section."""
    return "task-" + "".join(character if character.isalnum() else "-" for character in task)


def definitions(facts: Sequence[tuple[str, str]]) -> Markup:
    """Names with a value each."""
    return tag("dl", *(tag("div", tag("dt", key), tag("dd", value)) for key, value in facts), class_="facts")


def figure(title: str, plot: Markup) -> Markup:
    """A plot under its title."""
    # Focusable, so that the keyboard can scroll a plot that is wider than the screen.
    scroll = tag("div", plot, class_="scroll", tabindex="0", role="region", aria_label=title)
    return tag("figure", tag("figcaption", title), scroll)


def folded(title: str, *inner: Markup) -> Markup:
    """What is shown on demand."""
    return tag("details", tag("summary", title), *inner)


def value_text(value: Any) -> str:
    """Any JSON value on one line; of a long list the beginning."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list):
        shown = ", ".join(value_text(item) for item in value[:_SHOWN_VALUES])
        more = len(value) - _SHOWN_VALUES
        return shown + (f" … {more:,} more" if more > 0 else "") if value else "–"
    if isinstance(value, dict):
        return ", ".join(f"{key} {value_text(item)}" for key, item in value.items())
    return str(value)


def score_cells(score: Score) -> list[str]:
    """A score as cells: name, where, value, bar, interval, n, scorer."""
    value = percent(score.value) if score.is_share else number(score.value)
    bounds = interval(score.ci95, is_share=score.is_share)
    bar = interval_bar(score.value, score.ci95, f"{value} {bounds}") if score.is_share else Markup("")
    return [
        score.name,
        score.where,
        tag("span", value, class_="value"),
        bar,
        bounds,
        f"{score.n:,}",
        score.scorer or "–",
    ]
