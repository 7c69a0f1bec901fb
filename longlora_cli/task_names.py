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

FILES = (
    "longbench",
    "longbench_e",
    "longbench_v2",
    "longbench_v2_cot",
    "infinitebench",
    "ruler_files",
    "babilong",
    "longmemeval",
    "graphwalks",
    "mrcr_files",
    "qmsum",
    "longchat",
    "squality",
    "leval",
    "multiple_choice",
    "multiple_choice_cloze",
)
"""Benchmarks read from files, of `evaluation/tasks/files/registry.py`; `longbench.hotpotqa` is one task of one."""

GROUPS: dict[str, tuple[str, ...]] = {"ruler": RULER, "niah": NIAH, "synthetic": SYNTHETIC}
"""Several tasks by one name; a group's score is the mean of its tasks'."""


def expand(names: Iterable[str]) -> list[str]:
    """The tasks of these names, groups taken apart, each once, in order."""
    return list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))


def is_from_files(name: str) -> bool:
    """Whether the name is that of a benchmark read from files, or of one of its tasks."""
    return name.partition(".")[0] in FILES


def is_only_weighed(name: str) -> bool:
    """Whether a task is judged by likelihoods alone: nothing is generated for it."""
    return name == "ppl" or name.partition(".")[0] in ("multiple_choice", "multiple_choice_cloze")


def unknown_task(names: Iterable[str]) -> str | None:
    """What to say of the first name that is neither a task nor a group; None where there is none."""
    known = (*BUILT_IN, *GROUPS, *SYNTHETIC, *FILES)
    for name in names:
        if name not in known and not is_from_files(name):
            close = difflib.get_close_matches(name, known, n=1)
            return f"--tasks {name}: unknown task" + (
                f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
            )
    return None
