"""Which samples a report holds, and how: JSON in the page, which page.js shows as text and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from longlora_cli.evaluation.report.markup import Markup, clean, tag

Row = dict[str, Any]

# A page of 8 MiB of samples opens in a second; the rest of a report is far below 1 MB.
MOST_SAMPLES = 2000
MOST_BYTES = 8 << 20
_PREDICTION_CHARACTERS, _REFERENCE_CHARACTERS, _REFERENCES = 4000, 1000, 20
_FACT_CHARACTERS = 300
# A fifth of a task's places is for right answers, where it has so many: without them nobody sees what a scorer accepts.
_RIGHT_SHARE = 5
_OWN_PLACE = {"key", "task", "prediction", "references", "scores", "finish"}


@dataclass(frozen=True)
class Picked:
    """The samples of a report.

    Args:
        rows: As the page holds them, those with a score below 1 first in each task.
        kept: How many of each task's samples are in `rows`.
        total: How many each task has.
    """

    rows: list[Row]
    kept: dict[str, int]
    total: dict[str, int]

    @property
    def left_out(self) -> int:
        """Samples that are in the folder's `samples/*.jsonl` alone."""
        return sum(self.total.values()) - sum(self.kept.values())


def outcome(scores: dict[str, float]) -> str:
    """`right` when every score is at least 1, `wrong` when every score is 0, else `partly`."""
    if all(score >= 1 for score in scores.values()):
        return "right"
    return "wrong" if all(score <= 0 for score in scores.values()) else "partly"


def pick(
    rows_by_task: Mapping[str, Sequence[Row]], *, most: int = MOST_SAMPLES, most_bytes: int = MOST_BYTES
) -> Picked:
    """Choose samples: as many as fit, in fair shares of the tasks, wrong ones first, evenly from each task's rows.

    Args:
        rows_by_task: Rows with `prediction`, `references` and `scores`; rows of other kinds (perplexity's texts) are
            not samples and are left out without being counted.
        most: At most this many in all.
        most_bytes: At most this much JSON in all, UTF-8.
    """
    asked = {task: [row for row in rows if row.get("scores")] for task, rows in rows_by_task.items() if rows}
    asked = {task: rows for task, rows in asked.items() if rows}
    places, room = most, most_bytes
    found: dict[str, list[Row]] = {}
    # Small tasks first: what they leave of their share is the others'.
    for number, task in enumerate(sorted(asked, key=lambda task: len(asked[task]))):
        left = len(asked) - number
        found[task], used = _fitting(task, asked[task], places // left, room // left)
        places, room = places - len(found[task]), room - used
    return Picked(
        [row for task in asked for row in found[task]],
        {task: len(found[task]) for task in asked},
        {task: len(rows) for task, rows in asked.items()},
    )


def _chosen(rows: list[Row], most: int) -> list[Row]:
    below = [row for row in rows if outcome(row["scores"]) != "right"]
    right = [row for row in rows if outcome(row["scores"]) == "right"]
    for_right = max(min(len(right), most // _RIGHT_SHARE), most - len(below))
    return [*_spread(below, most - min(for_right, len(right))), *_spread(right, for_right)]


def _spread(rows: list[Row], most: int) -> list[Row]:
    """At most so many of them, evenly from first to last: files are ordered by length, and all should be seen."""
    if len(rows) <= most:
        return rows
    return [rows[place * len(rows) // most] for place in range(most)]


def _fitting(task: str, rows: list[Row], most: int, room: int) -> tuple[list[Row], int]:
    """The chosen samples as the page has them, fewer where they are too long, and their bytes."""
    while True:
        shown = [_shown(task, row) for row in _chosen(rows, most)]
        used = sum(len(_as_json(row).encode()) for row in shown)
        if used <= room:
            return shown, used
        most = min(len(shown) - 1, len(shown) * room // used)


def _shown(task: str, row: Row) -> Row:
    """What the page says of a row: texts cut at a length and cleaned, the rest as facts."""
    references = [str(reference) for reference in row.get("references", [])]
    prediction = str(row.get("prediction", ""))
    return {
        "task": task,
        "outcome": outcome(row["scores"]),
        "scores": {clean(str(name)): float(score) for name, score in row["scores"].items()},
        "prediction": clean(prediction[:_PREDICTION_CHARACTERS]),
        "prediction_left_out": max(0, len(prediction) - _PREDICTION_CHARACTERS),
        "references": [clean(reference[:_REFERENCE_CHARACTERS]) for reference in references[:_REFERENCES]],
        "references_cut": len(references) > _REFERENCES
        or any(len(reference) > _REFERENCE_CHARACTERS for reference in references),
        "finish": clean(str(row.get("finish", ""))),
        "facts": {
            clean(key): clean(value[:_FACT_CHARACTERS]) if isinstance(value, str) else value
            for key, value in row.items()
            if key not in _OWN_PLACE and isinstance(value, str | int | float | bool)
        },
    }


def _as_json(content: Any) -> str:
    """JSON that can stand in a script element: no character in it can end the element or begin another."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def data_block(picked: Picked) -> Markup:
    """The script element, of a type that no browser runs, in which page.js finds the samples."""
    return tag("script", Markup(_as_json(picked.rows)), type="application/json", id="sample-data")
