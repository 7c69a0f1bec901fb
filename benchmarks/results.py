"""Measured figures: one JSON object per line in `results.jsonl`, and the page made from them.

    python benchmarks/results.py            # write docs/results.md again

A row has `case`, `stack`, `seq`, `metric`, `value`, `unit`, `machine`, `commit`, `command`, and where they apply
`variant`, `n`, `low` and `high` (a 95 % interval) and `note`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parent / "results.jsonl"
PAGE = Path(__file__).parent.parent / "docs" / "results.md"
NEEDED = ("case", "stack", "seq", "metric", "value", "unit", "machine", "commit", "command")
EXTRA = ("variant", "n", "low", "high", "note")
TITLES = {
    "smollm2-32k": "SmolLM2-135M-Instruct: 8K to 32K",
    "smollm2-extension": "SmolLM2-135M-Instruct: 8K to 256K",
    "extension-methods": "Ways to a longer context, in equal time: SmolLM2-135M-Instruct",
    "smollm2-beacon": "SmolLM2-135M-Instruct: a compressed past (Activation Beacon) on the 32K model",
    "eval-speed": "Evaluation: depths on one cache, and the memory of a long prompt",
    "builtin-4k": "The embedded model: 512 to 4,096",
    "builtin": "The embedded model as shipped",
    "test-tiers": "Tests",
    "llama8b-qlora-step": "One training step: Llama-3.1-8B's shape, NF4, LoRA on 7 linear layers",
    "llama8b-max-context": "The longest context that runs: the same model",
    "smollm2-step": "One training step: SmolLM2-135M, bf16, LoRA on 7 linear layers",
    "attention-rate": "Attention kernels: causal, one document",
    "train-probe": "`--dry-run --probe`: predicted and measured",
    "prepare-books": "Preparing books: SmolLM2's tokenizer",
}
# Cases that compare stacks: one line a length and stack, one column a metric, in this order.
SIDE_BY_SIDE = ("llama8b-qlora-step", "llama8b-max-context", "smollm2-step", "prepare-books")
COLUMNS = {
    "tok_s": "tokens/s",
    "seconds": "seconds",
    "peak_gib": "GPU GiB",
    "host_gib": "host GiB",
    "peak_host_gib": "peak host GiB",
    "tflops": "TFLOP/s",
}


def read_rows(path: Path = ROWS) -> list[dict[str, Any]]:
    """All rows, checked.

    Raises:
        ValueError: A row lacks a field, has an unknown one, or a value that is no number.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        missing = [name for name in NEEDED if name not in row]
        unknown = [name for name in row if name not in NEEDED + EXTRA]
        if missing or unknown or not isinstance(row["value"], int | float):
            raise ValueError(
                f"{path.name}:{number}: missing {missing}, unknown {unknown}, value {row.get('value')!r}"
            )
        rows.append(row)
    return rows


def add_rows(rows: list[dict[str, Any]], path: Path = ROWS) -> None:
    """Append rows; rows of the same case, stack, variant, sequence and metric are replaced."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in ("case", "stack", "variant", "seq", "metric"))

    new = {key(row) for row in rows}
    kept = [row for row in (read_rows(path) if path.exists() else []) if key(row) not in new]
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept + rows), encoding="utf-8"
    )


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cell(row: dict[str, Any]) -> str:
    interval = f" ({_number(row['low'])}-{_number(row['high'])})" if "low" in row else ""
    return f"{_number(row['value'])}{interval}"


def _stack(row: dict[str, Any]) -> str:
    return row["stack"] + (f" ({row['variant']})" if row.get("variant") else "")


def _length(row: dict[str, Any]) -> str:
    return f"{row['seq']:,}" if row["seq"] else ""


def _one_by_one(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each figure."""
    lines = ["| metric | length | stack | value | unit | n |", "| --- | ---: | --- | ---: | --- | ---: |"]
    for row in sorted(rows, key=lambda r: (r["metric"], r["seq"] or 0)):
        number = f"{row['n']:,}" if "n" in row else ""
        lines.append(
            f"| {row['metric']} | {_length(row)} | {_stack(row)} | {_cell(row)} | {row['unit']} | {number} |"
        )
    return lines


def _side_by_side(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each length and stack, with all of its figures."""
    found = {row["metric"] for row in rows}
    metrics = [name for name in COLUMNS if name in found] + sorted(found - set(COLUMNS))
    lines = [
        f"| length | stack | {' | '.join(COLUMNS.get(name, name) for name in metrics)} |",
        f"| ---: | --- |{' ---: |' * len(metrics)}",
    ]
    by_place: dict[tuple[int, str], dict[str, str]] = {}
    for row in sorted(rows, key=lambda r: r["seq"] or 0):
        by_place.setdefault((row["seq"] or 0, _stack(row)), {"length": _length(row)})[row["metric"]] = _cell(
            row
        )
    for (_, stack), cells in by_place.items():
        lines.append(
            f"| {cells['length']} | {stack} | {' | '.join(cells.get(name, '') for name in metrics)} |"
        )
    return lines


def page(rows: list[dict[str, Any]]) -> str:
    """docs/results.md."""
    lines = [
        "# Results",
        "",
        "Every figure with the command, commit and machine that gave it. This page is made from",
        "`benchmarks/results.jsonl` by `python benchmarks/results.py`. Figures in brackets are 95 % intervals.",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        lines += ["", f"## {TITLES.get(case, case)}", ""]
        lines += _side_by_side(mine) if case in SIDE_BY_SIDE else _one_by_one(mine)
        origins = dict.fromkeys((r["machine"], r["commit"], r["command"]) for r in mine)
        lines += ["", *(f"- {machine}, commit {commit}: `{command}`" for machine, commit, command in origins)]
        lines += [f"- {note}" for note in dict.fromkeys(r["note"] for r in mine if r.get("note"))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(read_rows()), encoding="utf-8")
    sys.stdout.write(f"{PAGE}\n")
