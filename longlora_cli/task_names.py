"""The names of evaluation's tasks, known before anything heavy is imported: settings are checked against them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

BUILT_IN = ("ppl", "passkey", "needle", "generate")
"""Tasks with settings of their own."""

NIAH = (
    *(f"niah_{kind}_{number}" for kind in ("single", "multikey") for number in (1, 2, 3)),
    "niah_multivalue",
    "niah_multiquery",
)
RULER = (*NIAH, "vt", "cwe", "fwe")
"""RULER's tasks that need no download: all but its two of questions and answers."""

SYNTHETIC = (
    *RULER,
    "niah_latent",
    "topic",
    "lines",
    "kv",
    "qa_needle",
    "babi_long",
    "graphwalk",
    "mrcr",
    "icl_many",
    "count",
    "sort",
    "code_run",
    "code_debug",
    "repeat",
)
"""Tasks of `evaluation/tasks/registry.py`."""

GROUPS: dict[str, tuple[str, ...]] = {"ruler": RULER, "niah": NIAH, "synthetic": SYNTHETIC}
"""Several tasks by one name; a group's score is the mean of its tasks'."""


def expand(names: Iterable[str]) -> list[str]:
    """The tasks of these names, groups taken apart, each once, in order."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


def unknown_task(names: Iterable[str]) -> str | None:
    """What to say of the first name that is neither a task nor a group; None where there is none."""
    known = (*BUILT_IN, *GROUPS, *SYNTHETIC)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            return f"--tasks {name}: unknown task" + (
                f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
            )
    return None
