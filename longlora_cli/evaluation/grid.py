"""Scores of retrieval tasks over lengths and depths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from longlora_cli.evaluation.effective_length import RULER_THRESHOLD, effective_lengths
from longlora_cli.evaluation.generation import Row
from longlora_cli.evaluation.scorers import holds_answer, same_answer
from longlora_cli.evaluation.statistics import share_clustered

SCORER = "retrieval@exact-1"
_WORD = re.compile(r"\s*(\w+)")


def score_retrieval(row: Row) -> dict[str, float]:
    """`score`: the answer is exactly a reference, but for blanks, case and a final period; `contains`: it
    holds one.

    A row with `first_word` (a text that was to be continued) is judged by its first word.
    """
    said = row["prediction"]
    if row.get("first_word"):
        match = _WORD.match(said)
        said = match[1] if match else ""
    return {
        "score": max(same_answer(said, reference) for reference in row["references"]),
        "contains": max(holds_answer(row["prediction"], reference) for reference in row["references"]),
    }


def score_grid(
    rows: Sequence[Row], *, threshold: float = RULER_THRESHOLD
) -> tuple[dict[str, Any], list[Row]]:
    """Shares of right answers with 95 % intervals, for each cell, each length and all.

    Questions of one sample share their text: a cell asks each text once, so its interval is Wilson's; a length asks
    each several times, so its interval counts texts (`statistics.wilson_clustered`). `samples` is how many there were.

    Args:
        rows: From `predict`, with `length`, `depth` and `sample`; at least one.
        threshold: What a length must reach for the effective length by RULER's rule.

    Returns:
        `{"n", "score", "ci95", "contains", "cut", "samples", "lengths": [...], "cells": [...]}`, with
        `effective_length` where there are several lengths, and the rows with their `scores`. Cells are ordered by
        length, then depth.
    """
    scored = [{**row, "scores": score_retrieval(row)} for row in rows]
    lengths = sorted({row["length"] for row in rows})
    cells = []
    for length, depth in sorted({(row["length"], row["depth"]) for row in rows}):
        inside = [row for row in scored if (row["length"], row["depth"]) == (length, depth)]
        cells.append({"length": length, "depth": depth, **_shares(inside)})
    per_length = [{"length": n, **_shares([row for row in scored if row["length"] == n])} for n in lengths]
    summary = {**_shares(scored), "scorer": SCORER, "lengths": per_length, "cells": cells}
    if (effective := effective_lengths(per_length, threshold=threshold)) is not None:
        summary["effective_length"] = effective
    return summary, scored


def _shares(rows: Sequence[Row]) -> dict[str, Any]:
    texts = [(row["length"], row["sample"]) for row in rows]
    contains = share_clustered([row["scores"]["contains"] for row in rows], texts)
    found = share_clustered([row["scores"]["score"] for row in rows], texts)
    samples = found.pop("clusters")
    return {
        **found,
        "contains": contains["score"],
        "contains_ci95": contains["ci95"],
        "cut": sum(row["finish"] == "length" for row in rows) / len(rows),
        "samples": samples,
    }
