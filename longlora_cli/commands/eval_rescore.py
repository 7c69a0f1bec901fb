"""`longlora eval --rescore`: the scores of finished predictions. Imports neither torch nor transformers."""

from __future__ import annotations

from typing import Any

from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.evaluation.rescoring import rescore
from longlora_cli.evaluation.scorers import find_scorer


def run(config: EvalConfig, console: Console, *, dry_run: bool) -> dict[str, Any]:
    """Score a file of predictions.

    Args:
        config: With `rescore` and `scorer`.
        console: Where the table goes.
        dry_run: Judge every row, so that all is checked, but say only how many there are.

    Returns:
        See `rescoring.rescore`; for a dry run the number of rows.
    """
    assert config.rescore is not None
    assert config.scorer is not None
    choice = find_scorer(config.scorer)
    result = rescore(config.rescore, choice)
    if dry_run:
        console.print(f"{result['n']} predictions of {config.rescore} can be scored by {result['scorer']}")
        return {"dry_run": True, "n": result["n"], "scorer": result["scorer"]}
    if "columns" in result:
        rows = [[key, column["mean"]] for key, column in result["columns"].items()]
        console.table("Means of all scores", ["score", "mean"], rows)
    for kind in ("tasks", "buckets"):
        if kind in result:
            parts = [[name, part["n"], part["mean"]] for name, part in result[kind].items()]
            console.table(f"By {kind.removesuffix('s')}", [kind.removesuffix("s"), "n", "mean"], parts)
    low_high = "" if result["ci95"] is None else " [{:.4g}, {:.4g}]".format(*result["ci95"])
    console.print(
        f"{result['scorer']}, {result['key']}: mean {result['mean']:.4f}{low_high} of {result['scale']:g}, "
        f"n={result['n']}"
    )
    return result
