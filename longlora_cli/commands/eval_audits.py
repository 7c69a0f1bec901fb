"""Tables of an evaluation's audits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longlora_cli.console import Console
from longlora_cli.evaluation.report.parts import value_text


def show_audits(audits: Sequence[dict[str, Any]], console: Console) -> None:
    """Print what is not as it should be, and how many checks there were."""
    bad = [one for one in audits if one["ok"] is False]
    if bad:
        console.table(
            "Look at this before the scores",
            ["check", "value", "note"],
            [[one["name"], value_text(one["value"]), one["note"]] for one in bad],
        )
    console.print(f"{len(audits)} audits, {len(bad)} to look at; all of them are in report.html")
