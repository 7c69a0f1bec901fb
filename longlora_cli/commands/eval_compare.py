"""`longlora eval --compare`: two evaluations side by side, by paired tests. No model, no torch, nothing written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.errors import NotFoundError
from longlora_cli.evaluation.comparison import compare_evaluations, require_common_tasks
from longlora_cli.evaluation.finished import Evaluation, read_evaluation

_MOST_NAMED = 3
_CERTAIN = 0.05


def run(config: EvalConfig, console: Console, *, dry_run: bool) -> dict[str, Any]:
    """Compare two finished folders.

    Args:
        config: With `out` and `compare`, and nothing else given.
        console: Where the table goes.
        dry_run: Read and pair as always, for nothing is written anyway.

    Returns:
        `comparison`, see `comparison.compare_evaluations`; for a dry run also `dry_run`.

    Raises:
        NotFoundError: One of the folders is not a finished evaluation.
        IntegrityError: One of them is damaged.
        IncompatibleError: They have nothing in common.
    """
    other = read_other(config)
    assert other is not None  # the settings are those of a comparison
    if not config.out.exists():
        raise NotFoundError(
            f"there is no evaluation {config.out}",
            rule="Without --model, --out and --compare are two finished evaluations.",
            hint="Give --model to measure one and compare it then.",
        )
    found = compare(config.out, other, console)
    return {"comparison": found, **({"dry_run": True} if dry_run else {})}


def read_other(config: EvalConfig) -> Evaluation | None:
    """The folder to compare with, None if none was asked for; refused now if no result could come of it.

    Raises:
        NotFoundError, IntegrityError: See `read_evaluation`.
        IncompatibleError: It shares no task with what is to be measured, or none measured alike.
    """
    if config.compare is None:
        return None
    other = read_evaluation(config.compare)
    if not config.only_compares:
        require_common_tasks(config.model_dump(mode="json"), config.tasks, other)
    return other


def compare(out: Path, other: Evaluation, console: Console) -> dict[str, Any]:
    """Compare the finished folder `out` with another and show it.

    Raises:
        NotFoundError, IntegrityError, IncompatibleError: See `run`.
    """
    found = compare_evaluations(read_evaluation(out), other)
    _show(found, console)
    return found


def _show(found: Mapping[str, Any], console: Console) -> None:
    a, b = found["a"], found["b"]
    console.table(
        f"A: {a['folder']} ({a['model']}) against B: {b['folder']} ({b['model']})",
        ["task", "score", "length", "A", "B", "A - B", "95 %", "p", "Holm", "n"],
        [_line(cell) for cell in _worth_showing(found["cells"])],
    )
    if any("p_by_text" in cell for cell in found["cells"]):
        console.print("p is McNemar's, then where questions share texts that of swapping whole texts.")
    sure = [cell for cell in found["cells"] if _differs(cell)]
    console.print(
        f"{len(sure)} of {len(found['cells'])} differences are below {100 * _CERTAIN:.0f} % after Holm's correction"
    )
    for task, facts in found["tasks"].items():
        if facts["other_text"]:
            console.print(
                f"{task}: {facts['other_text']} of {facts['pairs']} pairs are at the same place in another text, "
                "for samples are fitted to each model's tokenizer and chat template"
            )
        if facts["only_a"] or facts["only_b"]:
            lonely = [
                f"{len(rows)} of {name} ({_some(rows)})"
                for name, rows in (("A", facts["only_a"]), ("B", facts["only_b"]))
                if rows
            ]
            console.warn(f"{task}: without a partner {', '.join(lonely)}; {'; '.join(facts['why'])}")
    for entry in found["left_out"]:
        score = f" {entry['score']}" if "score" in entry else ""
        console.warn(f"{entry['task']}{score} is left out: {entry['why']}")


def _worth_showing(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All cells, but of a task with one length not that length again."""
    lengths: dict[tuple[str, str], int] = {}
    for cell in cells:
        if cell["length"] is not None:
            lengths[cell["task"], cell["score"]] = lengths.get((cell["task"], cell["score"]), 0) + 1
    return [c for c in cells if c["length"] is None or lengths[c["task"], c["score"]] > 1]


def _differs(cell: Mapping[str, Any]) -> bool:
    """Both p, where there are two, say so."""
    return max(cell["p_holm"], cell.get("p_by_text_holm", 0.0)) < _CERTAIN


def _line(cell: Mapping[str, Any]) -> list[str]:
    by_text = "p_by_text" in cell
    interval = "" if cell["ci95"] is None else f"[{cell['ci95'][0]:+.3f}, {cell['ci95'][1]:+.3f}]"
    return [
        cell["task"],
        cell["score"],
        "all" if cell["length"] is None else f"{cell['length']:,}",
        f"{cell['a']:.4f}",
        f"{cell['b']:.4f}",
        f"{cell['difference']:+.4f}",
        interval,
        _p(cell["p"]) + (f" / {_p(cell['p_by_text'])}" if by_text else ""),
        _p(cell["p_holm"]) + (f" / {_p(cell['p_by_text_holm'])}" if by_text else ""),
        f"{cell['n']:,}",
    ]


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _some(rows: Sequence[Mapping[str, Any]]) -> str:
    named = [" ".join(f"{key} {value}" for key, value in row.items() if key != "question") for row in rows]
    more = [f"{len(rows) - _MOST_NAMED} more"] if len(rows) > _MOST_NAMED else []
    return "; ".join(named[:_MOST_NAMED] + more)
