"""An evaluation of LongBench as the files that `pred.py` and `eval.py` of THUDM/LongBench (2e00731, MIT) write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from longlora_cli.errors import DataError
from longlora_cli.evaluation.export.names import short_folder_of
from longlora_cli.evaluation.scorers.longbench import BUCKETS

Row = Mapping[str, Any]
_FOLDERS = {"longbench": "pred", "longbench_e": "pred_e"}


def longbench_files(
    results: Mapping[str, Any], rows: Mapping[str, Sequence[Row]]
) -> tuple[dict[str, str], list[str]]:
    """Predictions and official numbers.

    Args:
        results: `results.json`.
        rows: Task -> its samples.

    Returns:
        Path -> content: `pred/MODEL/TASK.jsonl` with `pred`, `answers`, `all_classes` and `length`, and
        `pred/MODEL/result.json` with each task's mean, times 100, to 2 decimals; LongBench-E's are under `pred_e`,
        its numbers by bucket of length, without the buckets that have no row. And the tasks that are not LongBench's.

    Raises:
        DataError: None of the tasks is LongBench's.
    """
    model = short_folder_of(results["model"]["name"])
    found: dict[str, str] = {}
    others = []
    numbers: dict[str, dict[str, Any]] = {}
    for name in results["tasks"]:
        family, _, task = name.partition(".")
        if family not in _FOLDERS:
            others.append(name)
            continue
        folder = f"{_FOLDERS[family]}/{model}"
        found[f"{folder}/{task}.jsonl"] = "".join(map(_line, rows[name]))
        numbers.setdefault(folder, {})[task] = (
            _by_bucket(rows[name]) if family == "longbench_e" else _official(rows[name])
        )
    if not found:
        raise DataError(
            f"--export longbench does not know {', '.join(others)}",
            rule="It writes tasks of longbench and longbench_e.",
            hint="Use --export lm-eval.",
        )
    found |= {
        f"{folder}/result.json": json.dumps(scores, ensure_ascii=False, indent=4) + "\n"
        for folder, scores in numbers.items()
    }
    return found, others


def _line(row: Row) -> str:
    line = {
        "pred": row["prediction"],
        "answers": row["references"],
        "all_classes": row["extra"]["all_classes"],
        "length": row["extra"]["length"],
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def _official(rows: Sequence[Row]) -> float:
    # In their order and by plain sums, as `eval.py` has it: the second decimal may hang on it.
    return round(100 * sum(float(row["scores"]["score"]) for row in rows) / len(rows), 2)


def _by_bucket(rows: Sequence[Row]) -> dict[str, float]:
    groups = {bucket: [row for row in rows if row["bucket"] == bucket] for bucket in BUCKETS}
    return {bucket: _official(inside) for bucket, inside in groups.items() if inside}
