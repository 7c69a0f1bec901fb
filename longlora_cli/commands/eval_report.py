"""`longlora eval --report FOLDER`: the HTML report of a finished evaluation, made anew from its own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.errors import DataError, IntegrityError, SettingsError
from longlora_cli.evaluation.comparison import compare_evaluations
from longlora_cli.evaluation.finished import read_evaluation
from longlora_cli.evaluation.report.page import make_page
from longlora_cli.evaluation.report.samples import Row
from longlora_cli.storage import is_artifact, refuse_existing, verify_folder, write_text

_RESULTS = "results.json"


def run(config: EvalConfig, console: Console, *, dry_run: bool) -> dict[str, Any]:
    """Make `out` from the results and samples in `report`, which stays as it is: its manifest vouches for every byte.

    Args:
        config: The settings: `report`, a finished evaluation, `out`, the HTML file to make, and perhaps `compare`, a
            finished evaluation that the page sets beside it.
        console: Told what was written.
        dry_run: Read and make everything, write nothing.

    Returns:
        `report`, `bytes`, and how many `samples` are in the page and how many were `left_out`.

    Raises:
        SettingsError: `out` exists, or is not an .html file.
        DataError: `report` is not an evaluation.
        NotFoundError, IncompatibleError: `compare` is none, or has nothing in common with it.
        IntegrityError: It is one whose bytes have changed.
    """
    assert config.report is not None  # or this module would not run: EvalConfig.module
    folder, out = config.report, config.out
    if out.suffix.lower() != ".html":
        raise SettingsError(
            f"--out {out} is not an .html file",
            rule="--report makes one file, beside the evaluation and not in it.",
            hint=f"Write --out {folder.name}.html",
        )
    refuse_existing(out)
    results, rows = read_finished(folder)
    compared = None
    if config.compare is not None:
        other = read_evaluation(config.compare)
        compared = compare_evaluations(read_evaluation(folder), other), other.results
    page, picked = make_page(results, rows, compared=compared)
    if not dry_run:
        write_text(out, page)
    size, kept = len(page.encode()), sum(picked.kept.values())
    verb = "would write" if dry_run else "wrote"
    console.print(f"{verb} {out} ({size / 2**10:,.0f} KiB, {kept:,} samples, {picked.left_out:,} left out)")
    found = {"report": str(out), "bytes": size, "samples": kept, "left_out": picked.left_out}
    return found | ({"dry_run": True} if dry_run else {})


def read_finished(folder: Path) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """The results of the evaluation that `--report` names, and the samples of each task; every byte is verified.

    Raises:
        DataError: It is not a finished evaluation.
        IntegrityError: It is one whose bytes have changed.
    """
    if not is_artifact(folder, "evaluation"):
        what = "is not a finished evaluation" if folder.exists() else "does not exist"
        raise DataError(f"--report {folder} {what}", hint="Give it a folder that longlora eval made.")
    verify_folder(folder, "evaluation")
    try:
        results = json.loads((folder / _RESULTS).read_text(encoding="utf-8"))
        rows = {}
        for task in results["tasks"]:
            path = folder / "samples" / f"{task}.jsonl"
            lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
            rows[task] = [json.loads(line) for line in lines if line]
        return results, rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / _RESULTS} cannot be read as an evaluation: {error}") from error
