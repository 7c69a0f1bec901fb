"""Views of token losses: micro, macro, per byte and word, by position, and what a longer context gains.

Sums are in float64; nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longlora_cli.evaluation.statistics import bootstrap_ratio
from longlora_cli.evaluation.texts import TextSize
from longlora_cli.evaluation.windows import position_buckets

if TYPE_CHECKING:  # a dry run reads this file and should not wait for torch
    from longlora_cli.evaluation.perplexity import Float32, TextLosses

# Above it the exponential is no float64: a text of one long word costs more.
_MOST_NATS = 709.0


def exponential(nats: float) -> float | None:
    """e to the power of `nats`; None where that is no number."""
    return math.exp(nats) if nats <= _MOST_NATS else None


def per_text_units(nats: float, texts: Sequence[TextSize]) -> dict[str, Any]:
    """`bits_per_byte`, `byte_perplexity` and `word_perplexity` of a sum of losses, with their `bytes` and `words`.

    Source: lm-evaluation-harness, `api/metrics.py`: `bits_per_byte` and `weighted_perplexity`.
    """
    size, words = sum(text.bytes for text in texts), sum(text.words for text in texts)
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "byte_perplexity": exponential(nats / size),
        "word_perplexity": exponential(nats / words),
        "bytes": size,
        "words": words,
    }


def summarize(
    texts: Sequence[TextLosses], sizes: Sequence[TextSize], *, window: int, short: int | None = None
) -> dict[str, Any]:
    """Every view of the losses of some texts, as plain JSON.

    - `nll`: mean nats per token over all texts (micro); `perplexity` is its exponential, `ci95` its bootstrap
      interval over windows.
    - `perplexity_macro`: exponential of the mean over texts of each text's mean loss;
      `perplexity_mean_of_texts`: mean of the texts' perplexities.
    - `bits_per_byte`, `byte_perplexity`, `word_perplexity`: comparable between tokenizers.
    - `by_position`: see `position_curve`; `gain`: see `context_gain`.

    Args:
        texts: At least one text.
        sizes: Of the scored part of each text.
        window: Tokens of a window.
        short: Tokens of the short context, when the texts were scored with one.
    """
    sums = [float(text.nll.sum(dtype=np.float64)) for text in texts]
    counts = [len(text.nll) for text in texts]
    clusters = np.concatenate([text.windows for text in texts])
    nats, tokens = math.fsum(sums), sum(counts)
    means = [s / c for s, c in zip(sums, counts, strict=True)]
    each = [exponential(mean) for mean in means]
    rows, source = _rows(texts)
    summary = {
        "n": tokens,
        "texts": len(texts),
        "windows": len(clusters),
        "nll": nats / tokens,
        "perplexity": exponential(nats / tokens),
        "ci95": _exp_interval(clusters[:, 0], clusters[:, 1]),
        "perplexity_macro": exponential(math.fsum(means) / len(texts)),
        "perplexity_mean_of_texts": None if None in each else math.fsum(filter(None, each)) / len(texts),
        **per_text_units(nats, sizes),
        "by_position": position_curve(rows, window),
        "curve_windows": len(rows),
        "curve_source": source,
    }
    return summary if short is None else summary | {"gain": context_gain(rows, short)}


@dataclass(frozen=True)
class CurveRow:
    """One window of the curve: `full[i]` had `i + 1` tokens of context, `short[i]` at most the short context."""

    full: Float32
    short: Float32 | None


def _rows(texts: Sequence[TextLosses]) -> tuple[list[CurveRow], str]:
    """The curve's rows. When no text fills a window, each text as a whole takes the place of a window."""
    rows = [
        CurveRow(row, None if text.short is None else text.short[number])
        for text in texts
        for number, row in enumerate(text.curve)
    ]
    if rows:
        return rows, "full windows"
    return [CurveRow(t.nll, None if t.short is None else t.short[0]) for t in texts], "whole texts"


def position_curve(rows: Sequence[CurveRow], window: int) -> list[dict[str, Any]]:
    """Loss by the number of tokens of context, in buckets `[from, to)`.

    A token's position is how many tokens before it the model saw. The curve is made of full windows that
    score no token twice, and all of a window's tokens are in it: each bucket is an average over the same
    windows, so that buckets differ by context and not by text (`curve_source: full windows`). When every text
    is shorter than the window, late buckets hold fewer texts (`whole texts`).

    With a short context each bucket also has `short_nll`, `short_perplexity`, `short_ci95` of the same tokens,
    and `gain`, `short_nll - nll`, with `gain_ci95`: intervals draw whole windows, with both losses of a token.
    A bucket's place is that of the full context.
    """
    found = []
    for low, high in position_buckets(window):
        columns = slice(max(low - 1, 0), high - 1)  # column i had i + 1 tokens of context
        full = [row.full[columns] for row in rows]
        sums, counts = _sums(full), np.array([len(piece) for piece in full], dtype=np.float64)
        if not counts.sum():
            continue
        bucket = {"from": low, "to": high, "n": int(counts.sum()), **_mean_loss(sums, counts)}
        short = [row.short[columns] for row in rows if row.short is not None]
        if short:
            other = _sums(short)
            bucket |= {f"short_{name}": value for name, value in _mean_loss(other, counts).items()}
            bucket |= _gain(other - sums, counts)
        found.append(bucket)
    return found


def context_gain(rows: Sequence[CurveRow], short: int) -> dict[str, Any]:
    """What the full context gains over one of `short` tokens, in nats per token, over the curve's windows.

    Returns:
        `gain`, its 95 % interval over windows `gain_ci95`, `n` tokens; and under `beyond` the same for those
        tokens alone whose full context is longer than any short one (`short` tokens and more): for the others
        it is 0 because nothing differs.
    """
    parts = {}
    for name, start in (("all", 0), ("beyond", short - 1)):
        pairs = [(row.full[start:], row.short[start:]) for row in rows if row.short is not None]
        counts = np.array([len(full) for full, _ in pairs], dtype=np.float64)
        differences = _sums([other for _, other in pairs]) - _sums([full for full, _ in pairs])
        empty = not counts.sum()
        parts[name] = {"gain": None, "gain_ci95": None} if empty else _gain(differences, counts)
        parts[name] |= {"n": int(counts.sum()), "windows": int((counts > 0).sum())}
    return {**parts["all"], "beyond": parts["beyond"]}


def _sums(pieces: Sequence[Float32]) -> npt.NDArray[np.float64]:
    return np.array([piece.sum(dtype=np.float64) for piece in pieces])


def _mean_loss(sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> dict[str, Any]:
    nll = math.fsum(sums) / math.fsum(counts)
    return {"nll": nll, "perplexity": exponential(nll), "ci95": _exp_interval(sums, counts)}


def _gain(differences: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> dict[str, Any]:
    interval = bootstrap_ratio(differences.tolist(), counts.tolist())
    return {
        "gain": math.fsum(differences) / math.fsum(counts),
        "gain_ci95": None if interval is None else list(interval),
    }


def _exp_interval(sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64]) -> list[float] | None:
    interval = bootstrap_ratio(sums.tolist(), counts.tolist())
    if interval is None or exponential(interval[1]) is None:
        return None
    return [math.exp(value) for value in interval]
