"""What a scorer is: a pure function with a name, a version and the scores it returns.

A scorer that fails raises; no fault is ever turned into a score of 0. Where a published scorer gives 0 by rule (an
empty answer), ours gives 0 too; where it gives 0 because an exception was swallowed, ours computes the score or raises.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from longlora_cli.errors import DataError, SettingsError

Scores = dict[str, float]
Extra = Mapping[str, Any]
Score = Callable[[str, Sequence[Any], Extra], Scores]
NOTHING: Extra = MappingProxyType({})
"""No extra fields."""

# What `pip install` needs for each package that a scorer imports when it is first used.
_INSTALL = {"jieba": "longlora-cli[chinese]", "rapidfuzz": "rapidfuzz", "rouge_score": "rouge-score"}


class UnscorableError(DataError, ValueError):
    """A row that a scorer cannot judge: a field is missing, or a reference is not what the rule needs."""


@dataclass(frozen=True)
class Scorer:
    """A named way to score.

    Args:
        name: As `--metrics`, `--rescore` and the results know it.
        version: `name@...`; changes whenever a score could.
        keys: The scores it returns, the one that counts first.
        binary: Its scores are 0 or 1 (times `scale`), so that their mean is a share.
        score: `(prediction, references, extra) -> {key: value in [0, scale]}`. References are not empty unless
            `may_lack_references`; `extra` holds the fields of the row that the rule needs besides.
        scale: 1, or 100 for scorers that publish per cent.
        may_lack_references: The rule has a score for a row without references.
        raw_references: References may be numbers and lists; else they are texts.
        tasks: The tasks whose rules differ, as files of predictions are named.
    """

    name: str
    version: str
    keys: tuple[str, ...]
    binary: bool
    score: Callable[..., Scores]
    scale: float = 1.0
    may_lack_references: bool = False
    raw_references: bool = False
    tasks: tuple[str, ...] = ()


def field(extra: Extra, name: str, kind: type | tuple[type, ...], wanted: str) -> Any:
    """A field that the rule needs besides prediction and references.

    Raises:
        UnscorableError: It is missing or of another kind.
    """
    value = extra.get(name)
    if value is None:
        raise UnscorableError(f"{name} is missing", rule=f"This scorer needs {name}: {wanted}.")
    if not isinstance(value, kind):
        raise UnscorableError(f"{name} is {value!r}", rule=f"This scorer needs {name}: {wanted}.")
    return value


def task_of(extra: Extra, prefix: str, known: Sequence[str]) -> str:
    """The row's task without its family's prefix (`longbench.hotpotqa` -> `hotpotqa`).

    Raises:
        UnscorableError: It is missing or none of the known ones.
    """
    task = bare_task(str(field(extra, "task", str, "the task decides the rule")), prefix)
    if task not in known:
        raise UnscorableError(f"task {task!r} is not of {prefix}", rule=f"Known tasks: {', '.join(known)}.")
    return task


def bare_task(task: str, family: str) -> str:
    """A task without `family.` or `family_` before it."""
    for joint in (".", "_"):
        task = task.removeprefix(family + joint)
    return task


def needed_package(name: str) -> Any:
    """Import a module of a package that only some scorers need.

    Raises:
        SettingsError: It is not installed; the message says what to install. No other metric takes its place.
    """
    package = name.split(".")[0]
    try:
        with warnings.catch_warnings():
            # jieba 0.42.1 has invalid escapes in its patterns and asks for pkg_resources; both work and both warn.
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package:
            raise  # it is there, but broken
        raise SettingsError(
            f"this scorer needs the package {package}, which is not installed",
            rule="No other metric is used in its place.",
            hint=f"pip install '{_INSTALL[package]}'",
        ) from error
