"""Every score of a task's summary as one list, whatever the task: what tables and headlines are made of.

A summary is recognised by its shape, not by its task's name, so that a new task needs no new code here:

- `score`, `ci95`, `n` and perhaps `contains`, `contains_ci95`: right answers, with `lengths` and `cells` of such;
- `control`: the score of the same questions without their context;
- `scores`: `{name: {"score", "ci95", "n"}}`, with `scorer` inside where scores differ in it;
- `perplexity`, `nll`, ...: losses, with `gain` where a short context was measured too, and those of `compat` by the
  rules of other programs.

`scorer` or `scorers` name the versions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Summary = dict[str, Any]

_LOSSES = (
    "perplexity",
    "perplexity_macro",
    "perplexity_mean_of_texts",
    "nll",
    "bits_per_byte",
    "byte_perplexity",
    "word_perplexity",
)
# Shown elsewhere: as scores, pictures or beside every number.
_SHOWN = {
    "n",
    "score",
    "ci95",
    "contains",
    "contains_ci95",
    "scorer",
    "scorers",
    "gain",
    "effective_length",
    "control",
    *_LOSSES,
}


@dataclass(frozen=True)
class Score:
    """One number and what it rests on.

    Args:
        name: Its key in `results.json`.
        where: What it is of: `all`, or a length in tokens.
        value: Right answers and metrics lie in 0 to 1, losses do not.
        ci95: Its 95 % interval, where there is one.
        n: Samples, or tokens for losses.
        scorer: Which rule gave it, with its version; empty for losses.
        is_share: It lies in 0 to 1 and is written in per cent.
    """

    name: str
    where: str
    value: float
    ci95: Sequence[float] | None
    n: int
    scorer: str
    is_share: bool


def scores_of(summary: Summary) -> list[Score]:
    """All scores, the one that matters most first; none for a summary of another shape."""
    scorer: str = summary.get("scorer") or ", ".join(summary.get("scorers", []))
    found = list(_shares(summary, "all", scorer))
    for name, each in summary.get("scores", {}).items():
        if name == "score" and "score" in summary:
            continue
        one = each if isinstance(each, dict) else {"score": each, "n": summary["n"]}
        found.append(
            Score(name, "all", one["score"], one.get("ci95"), one["n"], one.get("scorer", scorer), True)
        )
    found += _control(summary.get("control", {}), scorer)
    by_length = [_shares(part, f"{part['length']:,} tokens", scorer) for part in summary.get("lengths", [])]
    # All lengths of one score after another, so that a column is read downwards.
    found += [score for scores in zip(*by_length, strict=True) for score in scores]
    for name in _LOSSES:
        if summary.get(name) is not None:
            ci95 = summary.get("ci95") if name == "perplexity" else summary.get(f"{name}_ci95")
            found.append(Score(name, "all", summary[name], ci95, summary["n"], "", False))
    for peer, other in summary.get("compat", {}).items():
        values = {name: other[name] for name in _LOSSES if other.get(name) is not None}
        found += [Score(name, f"by {peer}", values[name], None, other["n"], "", False) for name in values]
    gain = summary.get("gain", {})
    for where, part in (("all", gain), ("beyond the short context", gain.get("beyond", {}))):
        if part.get("gain") is not None:
            found.append(Score("gain", where, part["gain"], part["gain_ci95"], part["n"], "", False))
    return found


def _control(control: Summary, scorer: str) -> Iterator[Score]:
    """The same questions without their context."""
    several = control["scores"].items() if "scores" in control else ()
    one = [("score", control)] if control.get("score") is not None else []
    for name, part in (*one, *several):
        rule = part.get("scorer", scorer)
        yield Score(name, "without context", part["score"], part.get("ci95"), control["n"], rule, True)


def _shares(part: Summary, where: str, scorer: str) -> Iterator[Score]:
    if part.get("score") is not None:
        yield Score("score", where, part["score"], part.get("ci95"), part["n"], scorer, True)
    if part.get("contains") is not None:
        yield Score("contains", where, part["contains"], part.get("contains_ci95"), part["n"], scorer, True)


def other_facts(summary: Summary) -> dict[str, Any]:
    """What else a summary says in single values, such as `cut`, `window` or `seconds`, in its order."""
    return {key: value for key, value in flat(summary).items() if key.split(".")[0] not in _SHOWN}


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as `{"a.b": value}`; lists of single values stay, lists of objects are left out."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            if key != "scores":
                found |= flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list) or not any(isinstance(item, dict | list) for item in value):
            found[prefix + key] = value
    return found
