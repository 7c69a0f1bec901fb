"""How long a context a model really uses: the longest length whose score is still good, by two published rules.

A measured length passes or fails by a score that chance moves, so that each answer also says what its interval leaves
open: "32K, but 64K not excluded".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

RULER_THRESHOLD = 0.856
"""What Llama-2-7B scores at 4K, as RULER takes it (Hsieh et al. 2024, arXiv:2404.06654)."""

_NOLIMA_SHARE = 0.85
_NOLIMA_BASE_TOKENS = 1024


def effective_lengths(
    scores: Sequence[Mapping[str, Any]], *, threshold: float = RULER_THRESHOLD
) -> dict[str, dict[str, Any]] | None:
    """The effective context length by RULER's rule and by NoLiMa's.

    - `ruler`: the longest length with a score of at least `threshold`.
    - `nolima`: the longest length with at least 85 % of the base score, which is the best score at up to 1,024 tokens,
      or else that of the shortest length (Modarressi et al. 2025, arXiv:2502.05167). Its intervals count what chance
      did to the base too.

    Args:
        scores: For each length `{"length", "score", "ci95"}`, scores from 0 to 1; without an interval nothing is
            excluded.
        threshold: RULER's, or another, from 0 to 1.

    Returns:
        For each rule `threshold`, `length` (None where no length passes), `certain` (the longest length whose interval
        lies above the threshold, or None), `not_excluded` (longer lengths that fail, but whose interval reaches the
        threshold), `failed_before` (shorter lengths that fail), `text`; `base` and `base_length` for NoLiMa's. None
        for fewer than two lengths.
    """
    by_length = {int(entry["length"]): entry for entry in scores}
    if len(by_length) < 2:
        return None
    ruler = {
        length: (e["score"] - threshold, *(v - threshold for v in _interval(e)))
        for length, e in by_length.items()
    }
    short = [length for length in by_length if length <= _NOLIMA_BASE_TOKENS] or [min(by_length)]
    base_length = max(short, key=lambda length: (by_length[length]["score"], -length))
    base = by_length[base_length]
    nolima = {length: _margin(e, base) for length, e in by_length.items()}
    nolima[base_length] = (1.0, 1.0, 1.0)  # the base is 100 % of itself, whatever chance did to it
    if base["score"] == 0:  # every score is at least 85 % of nothing
        nolima = dict.fromkeys(nolima, (-1.0, -1.0, -1.0))
    return {
        "ruler": {"threshold": threshold, **_verdict(ruler)},
        "nolima": {
            "threshold": _NOLIMA_SHARE * base["score"],
            "base": base["score"],
            "base_length": base_length,
            **_verdict(nolima),
        },
    }


def _interval(entry: Mapping[str, Any]) -> tuple[float, float]:
    low, high = entry["ci95"] or (0.0, 1.0)
    return low, high


def _margin(entry: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[float, float, float]:
    """`score - 0.85 base` and its interval, from the intervals of both (squares of their halves added: Zou and Donner
    2008, Statistics in Medicine 27(10))."""
    score, reference = entry["score"], _NOLIMA_SHARE * base["score"]
    low, high = _interval(entry)
    base_low, base_high = (_NOLIMA_SHARE * value for value in _interval(base))
    margin = score - reference
    return (
        margin,
        margin - math.hypot(score - low, base_high - reference),
        margin + math.hypot(high - score, reference - base_low),
    )


def _verdict(margins: Mapping[int, tuple[float, float, float]]) -> dict[str, Any]:
    lengths = sorted(margins)
    # A margin of 1e-12 below 0 is a score equal to the threshold.
    passing = [length for length in lengths if margins[length][0] >= -1e-12]
    certain = [length for length in lengths if margins[length][1] >= -1e-12]
    found = max(passing, default=None)
    longer = [length for length in lengths if found is None or length > found]
    verdict: dict[str, Any] = {
        "length": found,
        "certain": max(certain, default=None),
        "not_excluded": [length for length in longer if margins[length][2] >= -1e-12],
        "failed_before": [n for n in lengths if found is not None and n < found and n not in passing],
    }
    return {**verdict, "text": _say(verdict, lengths)}


def _say(verdict: Mapping[str, Any], lengths: Sequence[int]) -> str:
    found = verdict["length"]
    if found is None:
        text = f"below {tokens(lengths[0])}"
    elif found == lengths[-1]:
        text = f"{tokens(found)} or more, the longest measured"
    else:
        text = tokens(found)
    if verdict["not_excluded"]:
        text += f", but {_join(verdict['not_excluded'])} not excluded"
    if verdict["failed_before"]:
        text += f"; fails at {_join(verdict['failed_before'])}"
    if found is not None and verdict["certain"] != found:
        text += f"; certain: {tokens(verdict['certain']) if verdict['certain'] else 'none'}"
    return text


def _join(lengths: Sequence[int]) -> str:
    return ", ".join(map(tokens, lengths))


def tokens(length: int) -> str:
    """A length as people write it: `32768` -> `32K`, `1048576` -> `1M`, `1000` -> `1,000`."""
    if length >= 1 << 20 and length % (1 << 20) == 0:
        return f"{length >> 20}M"
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else f"{length:,}"
