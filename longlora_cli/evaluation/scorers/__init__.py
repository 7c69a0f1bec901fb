"""Scorers: pure functions of a prediction, its references and what else the rule needs. No files, no models, no state.

    find_scorer("infinitebench@2024-08").score("B. get_x", ["get_x", "B"], {"task": "code_debug"})  ->  {"score": 1.0}

Each has a version that is stored with its results: numbers of different versions are not comparable.
"""

from longlora_cli.evaluation.scorers.base import NOTHING, Extra, Scorer, Scores, UnscorableError
from longlora_cli.evaluation.scorers.matching import accuracy, exact_match, f1, holds_answer, same_answer
from longlora_cli.evaluation.scorers.overlap import ROUGE_TYPES, rouge
from longlora_cli.evaluation.scorers.registry import ALL, SCORERS, Choice, check_metrics, find_scorer
from longlora_cli.evaluation.scorers.words import normalize_answer, word_f1

__all__ = [
    "ALL",
    "NOTHING",
    "ROUGE_TYPES",
    "SCORERS",
    "Choice",
    "Extra",
    "Scorer",
    "Scores",
    "UnscorableError",
    "accuracy",
    "check_metrics",
    "exact_match",
    "f1",
    "find_scorer",
    "holds_answer",
    "normalize_answer",
    "rouge",
    "same_answer",
    "word_f1",
]
