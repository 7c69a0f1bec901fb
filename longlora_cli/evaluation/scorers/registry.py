"""All scorers by name and version."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.scorers import (
    babilong,
    benchmarks,
    choices,
    helmet,
    infinitebench,
    leval,
    longbench,
    matching,
    overlap,
    structured,
    synthetic,
)
from longlora_cli.evaluation.scorers.base import NOTHING, Extra, Score, Scorer, Scores

_SCORE = ("score",)
_AT = "2e00731"  # THUDM/LongBench


def _longbench(rule: str, version: str, score: Score) -> Scorer:
    name = f"longbench.{rule}".removesuffix(".")
    return Scorer(name, f"{name}@{version}", _SCORE, False, score, tasks=tuple(longbench.TASK_RULES))


def _infinitebench(version: str, score: Score) -> Scorer:
    version = f"infinitebench@{version}"
    return Scorer(
        "infinitebench", version, _SCORE, False, score, raw_references=True, tasks=infinitebench.TASKS
    )


def _ruler(name: str, version: str, score: Score, key: str, *, binary: bool = False) -> Scorer:
    tasks = matching.RULER_TASKS
    return Scorer(name, f"{name}@{version}", (key,), binary, score, scale=100.0, tasks=tasks)


def _babilong(version: str, score: Score) -> Scorer:
    tasks = tuple(babilong.TASK_LABELS)
    return Scorer("babilong", f"babilong@{version}", _SCORE, True, score, tasks=tasks)


def _helmet(name: str, score: Score) -> Scorer:
    return Scorer(name, f"{name}@4526dfb", helmet.KEYS, False, score)


SCORERS = {
    scorer.name: scorer
    for scorer in (
        Scorer("rouge", "rouge@rouge_score-0.1.2-no-stemmer", overlap.ROUGE_TYPES, False, overlap.rouge),
        Scorer("f1", "f1@longbench-2e00731", ("f1",), False, matching.f1),
        Scorer("exact_match", "exact_match@squad-normalized", ("exact_match",), True, matching.exact_match),
        Scorer("accuracy", "accuracy@contains-any", ("accuracy",), True, matching.accuracy),
    )
}
"""What `--metrics` knows: scorers that need nothing of a row but its prediction and references."""

_GRAPH_KEYS = ("f1", "flexible_f1")
# The first of a name is what the name alone means.
ALL: tuple[Scorer, ...] = (
    *SCORERS.values(),
    Scorer("rouge", "rouge@rouge_score-0.1.2-stemmer", overlap.ROUGE_TYPES, False, overlap.rouge_stemmed),
    _longbench("", _AT, longbench.by_task(longbench.RULES)),
    _longbench("", "no-levenshtein", longbench.by_task(longbench.RULES_NO_LEVENSHTEIN)),
    _longbench("", "rouge_score", longbench.by_task(longbench.RULES_ROUGE_SCORE)),
    *(_longbench(name, _AT, longbench.best_of(rule)) for name, rule in longbench.RULES.items()),
    _longbench("code_sim", "no-levenshtein", longbench.best_of(longbench.code_sim_difflib)),
    _longbench("code_sim", "lm-eval-v6", longbench.best_of(longbench.code_sim_lm_eval)),
    _longbench("rouge", "lm-eval", longbench.best_of(longbench.rouge_lm_eval)),
    Scorer("longbench2", f"longbench2@{_AT}", _SCORE, True, choices.longbench2),
    Scorer("longbench2", "longbench2@compensated", _SCORE, False, choices.longbench2_compensated),
    _infinitebench("2024-06", infinitebench.infinitebench_2024_06),
    _infinitebench("2024-08", infinitebench.infinitebench_2024_08),
    _ruler("ruler", "c3f5e3b", matching.ruler, "score"),
    _ruler("ruler.all", "c3f5e3b", matching.ruler_all, "all"),
    _ruler("ruler.part", "c3f5e3b", matching.ruler_part, "part", binary=True),
    _ruler("ruler.part", "lm-eval", matching.ruler_part_lm_eval, "part"),
    _helmet("helmet", helmet.helmet),
    _helmet("helmet.raw", helmet.raw),
    _helmet("helmet.parsed", helmet.parsed),
    _babilong("7a6efee", babilong.babilong),
    _babilong("lm-eval", babilong.babilong_lm_eval),
    Scorer("nolima", "nolima@7532e4e", matching.NOLIMA_KEYS, True, matching.nolima),
    Scorer("leval.exact_match", "leval.exact_match@cd34b05", _SCORE, False, choices.leval_exact_match),
    Scorer(
        "graphwalks",
        "graphwalks@lm-eval-4e7e0d47f",
        _GRAPH_KEYS,
        False,
        structured.graphwalks,
        may_lack_references=True,
    ),
    Scorer("mrcr", "mrcr@card", _SCORE, False, structured.mrcr),
    *synthetic.RULES,
    *benchmarks.RULES,
    *leval.RULES,
)
_BY_NAME: dict[str, list[Scorer]] = {}
for _scorer in ALL:
    _BY_NAME.setdefault(_scorer.name, []).append(_scorer)
# Names of the published functions where ours are shorter.
_ALIASES = {
    "babilong.compare_answers": "babilong",
    "helmet.calculate_metrics": "helmet",
    "longbench.max_over_references(qa_f1)": "longbench.qa_f1",
    "longbench.classification.nested_names": "longbench.classification",
    "longbench.rouge.recursion_trap": "longbench.rouge",
    "longbench2.extract_answer": "longbench2",
    "ruler.string_match": "ruler",
    "ruler.string_match_all": "ruler.all",
    "ruler.string_match_part": "ruler.part",
}


@dataclass(frozen=True)
class Choice:
    """A scorer and the one of its scores that counts.

    Args:
        scorer: Judges a row.
        key: One of its keys.
    """

    scorer: Scorer
    key: str

    def score(self, prediction: str, references: Sequence[Any], extra: Extra = NOTHING) -> Scores:
        """All its scores of one row, in its own scale."""
        return self.scorer.score(prediction, references, extra)


def find_scorer(name: str) -> Choice:
    """The scorer of a name: `f1`, `longbench.qa_f1`, `infinitebench@2024-08`, or with one of its scores `rouge.rougeL`.

    `_score` after a name is passed over, so that the published functions' names lead here too.

    Raises:
        SettingsError: No such name, key or version.
    """
    plain, _, version = name.partition("@")
    plain = plain.removesuffix("_score").replace("_score.", ".")
    plain = _ALIASES.get(plain, plain)
    key = None
    if plain not in _BY_NAME:
        plain, _, key = plain.rpartition(".")
    if plain not in _BY_NAME or (key is not None and key not in _BY_NAME[plain][0].keys):
        raise _unknown(name)
    versions = {scorer.version.partition("@")[2]: scorer for scorer in _BY_NAME[plain]}
    if version and version not in versions:
        raise SettingsError(
            f"--scorer {name}: unknown version", rule=f"Versions of {plain}: {', '.join(versions)}."
        )
    scorer = versions[version] if version else _BY_NAME[plain][0]
    return Choice(scorer, key or scorer.keys[0])


def _unknown(name: str) -> SettingsError:
    return SettingsError(
        f"--scorer {name}: unknown scorer{_did_you_mean(name, [*_BY_NAME, *_ALIASES])}",
        rule=f"Known scorers: {', '.join(_BY_NAME)}.",
    )


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def check_metrics(names: Sequence[str]) -> None:
    """Raise `SettingsError` for a name that is no metric, or when there is none."""
    if not names:
        raise SettingsError("--metrics is empty", hint=f"Known metrics: {', '.join(SCORERS)}.")
    for name in names:
        if name not in SCORERS:
            raise SettingsError(
                f"--metrics {name}: unknown metric{_did_you_mean(name, SCORERS)}",
                rule=f"Known metrics: {', '.join(SCORERS)}.",
            )
