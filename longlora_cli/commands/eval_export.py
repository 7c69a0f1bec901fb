"""`longlora eval --report FOLDER --export lm-eval`: a finished evaluation as the files of another program."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from longlora_cli.commands.eval_report import read_finished
from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.evaluation.export.lm_eval import lm_eval_files
from longlora_cli.evaluation.export.longbench import longbench_files
from longlora_cli.storage import MANIFEST, atomic_folder, refuse_existing, write_text


def run(config: EvalConfig, console: Console, *, dry_run: bool) -> dict[str, Any]:
    """Make the folder `out` from the evaluation in `report`, which stays as it is.

    Args:
        config: The settings: `report`, a finished evaluation, `export`, the program, and `out`.
        console: Told what was written, and what the other program's files do not hold.
        dry_run: Read and make everything, write nothing.

    Returns:
        `export`, `out`, the `files` and the tasks that were `left_out`.

    Raises:
        SettingsError: `out` exists.
        DataError: `report` is not an evaluation, or none of its tasks is one of the other program's.
        IntegrityError: It is one whose bytes have changed.
    """
    assert config.report is not None  # or this module would not run: EvalConfig.module
    refuse_existing(config.out)
    results, rows = read_finished(config.report)
    left_out: list[str] = []
    if config.export == "longbench":
        files, left_out = longbench_files(results, rows)
    else:
        # lm-eval names its files by the time they were made at: here, when the evaluation was finished.
        finished = datetime.fromtimestamp((config.report / MANIFEST).stat().st_mtime, UTC)
        files = lm_eval_files(results, rows, date=finished.strftime("%Y-%m-%dT%H-%M-%S.%f"))
    if not dry_run:
        meta = {"format": config.export, "evaluation": str(config.report)}
        with atomic_folder(config.out, kind="export", meta=meta) as staging:
            for name, content in files.items():
                write_text(staging / name, content)
    verb = "would write" if dry_run else "wrote"
    console.print(f"{verb} {config.out} ({len(files)} files of {config.export})")
    if left_out:
        console.warn(f"--export {config.export} leaves out {', '.join(left_out)}")
    found = {"export": config.export, "out": str(config.out), "files": sorted(files), "left_out": left_out}
    return found | ({"dry_run": True} if dry_run else {})
