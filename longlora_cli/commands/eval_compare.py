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
    console.print(f"A is {a['folder']} ({a['model']}), B is {b['folder']} ({b['model']})")
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in found["cells"]:
        groups.setdefault((cell["task"], cell["score"]), []).append(cell)
    for (task, score), cells in groups.items():
        shown = cells[:1] if len(cells) == 2 else cells  # a single length is the whole
        by_text = any("p_by_text" in cell for cell in shown)
        header = ["length", "n", "A", "B", "A - B", "95 %", "p", *(["by text"] if by_text else []), "Holm"]
        test = cells[0]["test"] + ("; by text: whole texts change sides" if by_text else "")
        console.table(f"{task}: {score} ({test})", header, [_line(cell, by_text=by_text) for cell in shown])
        console.print(_remark(cells[0]))
    sure = [cell for cell in found["cells"] if _highest_p(cell) < _CERTAIN]
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


def _highest_p(cell: Mapping[str, Any]) -> float:
    """Holm's p, the higher one where there are two: a difference must stand by question and by text."""
    return float(max(cell["p_holm"], cell.get("p_by_text_holm", 0.0)))


def _line(cell: Mapping[str, Any], *, by_text: bool) -> list[str]:
    return [
        "all" if cell["length"] is None else f"{cell['length']:,}",
        f"{cell['n']:,}",
        f"{cell['a']:.3f}",
        f"{cell['b']:.3f}",
        f"{cell['difference']:+.3f}",
        _interval(
            cell["ci95"], 2 if "a_only" in cell else 3
        ),  # shares with signs on both ends fit 80 columns so
        _p(cell["p"]),
        *([_p(cell["p_by_text"]) if "p_by_text" in cell else ""] if by_text else []),
        _p(_highest_p(cell)),
    ]


def _interval(ci95: Sequence[float] | None, digits: int = 3) -> str:
    return "" if ci95 is None else f"[{ci95[0]:.{digits}f}, {ci95[1]:.{digits}f}]"


def _remark(cell: Mapping[str, Any]) -> str:
    if "ratio" in cell:
        return (
            f"perplexity {cell['perplexity_a']:.4g} and {cell['perplexity_b']:.4g}: "
            f"ratio {cell['ratio']:.4f} {_interval(cell['ratio_ci95'])}, {cell['clusters']} windows"
        )
    pairs = f"{cell['n']:,} pairs in {cell['clusters']:,} texts"
    if "smallest_gap" not in cell:
        return pairs
    return f"{pairs}: a true gap below {100 * cell['smallest_gap']:.0f} points is likely to be missed"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _some(rows: Sequence[Mapping[str, Any]]) -> str:
    named = [" ".join(f"{key} {value}" for key, value in row.items() if key != "question") for row in rows]
    more = [f"{len(rows) - _MOST_NAMED} more"] if len(rows) > _MOST_NAMED else []
    return "; ".join(named[:_MOST_NAMED] + more)
