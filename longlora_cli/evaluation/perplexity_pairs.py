"""Perplexity of two models on the same texts: token by token with one tokenizer, byte by byte with two."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

from longlora_cli.evaluation.finished import Evaluation
from longlora_cli.evaluation.paired import paired_bootstrap
from longlora_cli.evaluation.windows import plan_windows

Floats = npt.NDArray[np.floating[Any]]


def compare_perplexity(
    a: Evaluation, b: Evaluation
) -> tuple[list[dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
    """The cell of `ppl`, facts of the pairing, and what is left out; see `comparison.compare_evaluations`.

    With one tokenizer the same tokens were scored: the cell is in nats per token, and what is drawn again are windows.
    With two, texts are compared by bits per byte and drawn whole, so that one text alone shows nothing.
    """
    same_tokens = a.inputs.get("tokenizer") == b.inputs.get("tokenizer")
    marks_a, marks_b = (_marks(e, same_tokens=same_tokens) for e in (a, b))
    place_b = {mark: index for index, mark in enumerate(marks_b)}
    pairs = [(index, place_b[mark]) for index, mark in enumerate(marks_a) if mark in place_b]
    if same_tokens:
        pairs = [(i, j) for i, j in pairs if len(a.nll[i]) == len(b.nll[j])]
    facts = {
        "pairs": len(pairs),
        "only_a": [
            {"text": row["text"]} for i, row in enumerate(a.rows["ppl"]) if i not in {i for i, _ in pairs}
        ],
        "only_b": [
            {"text": row["text"]} for j, row in enumerate(b.rows["ppl"]) if j not in {j for _, j in pairs}
        ],
        "other_text": 0,
    }
    if not pairs:
        return [], facts, [{"task": "ppl", "why": "no text in common"}]
    cell = _by_token(a, b, pairs) if same_tokens else _by_byte(a, b, pairs)
    return [{"task": "ppl", "length": None, **cell}], {**facts, "texts": _texts(a, b, pairs)}, []


def _marks(evaluation: Evaluation, *, same_tokens: bool) -> list[Hashable]:
    """What tells texts apart: the hash of their tokens, else name and size; equal ones are numbered."""
    rows, hashes = evaluation.rows["ppl"], evaluation.inputs.get("texts", [])
    marks: list[Hashable] = (
        list(hashes) if same_tokens and len(hashes) == len(rows) else [(r["text"], r["bytes"]) for r in rows]
    )
    seen: Counter[Hashable] = Counter()
    numbered = []
    for mark in marks:
        numbered.append((mark, seen[mark]))
        seen[mark] += 1
    return list(numbered)


def _total(losses: Floats) -> float:
    return float(losses.sum(dtype=np.float64))


def _texts(a: Evaluation, b: Evaluation, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
    return [
        {
            "text": a.rows["ppl"][i]["text"],
            "perplexity_a": math.exp(_total(a.nll[i]) / len(a.nll[i])),
            "perplexity_b": math.exp(_total(b.nll[j]) / len(b.nll[j])),
        }
        for i, j in pairs
    ]


def _by_token(a: Evaluation, b: Evaluation, pairs: list[tuple[int, int]]) -> dict[str, Any]:
    window = a.settings["window"]
    stride = a.settings.get("stride") or max(1, window // 2)
    sums: list[float] = []
    counts: list[int] = []
    for i, j in pairs:
        difference = a.nll[i].astype(np.float64) - b.nll[j]
        # A window scores the tokens that no window before it reached.
        starts = [w.first - 1 for w in plan_windows(len(difference) + 1, window, stride)]
        sums += np.add.reduceat(difference, starts).tolist()
        counts += np.diff([*starts, len(difference)]).tolist()
    tokens = sum(counts)
    cell = _cell(
        sums, counts, sum(_total(a.nll[i]) for i, _ in pairs), sum(_total(b.nll[j]) for _, j in pairs), tokens
    )
    interval = cell["ci95"]
    return {
        "score": "nll",
        "n": tokens,
        **cell,
        "test": "paired bootstrap of windows",
        "perplexity_a": math.exp(cell["a"]),
        "perplexity_b": math.exp(cell["b"]),
        "ratio": math.exp(cell["difference"]),
        "ratio_ci95": None if interval is None else [math.exp(value) for value in interval],
    }


def _by_byte(a: Evaluation, b: Evaluation, pairs: list[tuple[int, int]]) -> dict[str, Any]:
    bits_a = [_total(a.nll[i]) / math.log(2) for i, _ in pairs]
    bits_b = [_total(b.nll[j]) / math.log(2) for _, j in pairs]
    sizes = [int(a.rows["ppl"][i]["bytes"]) for i, _ in pairs]
    differences = [one - other for one, other in zip(bits_a, bits_b, strict=True)]
    cell = _cell(differences, sizes, math.fsum(bits_a), math.fsum(bits_b), sum(sizes))
    return {"score": "bits_per_byte", "n": sum(sizes), **cell, "test": "paired bootstrap of texts"}


def _cell(sums: list[float], counts: list[int], total_a: float, total_b: float, n: int) -> dict[str, Any]:
    interval, p = paired_bootstrap(sums, counts)
    return {
        "clusters": len(sums),
        "a": total_a / n,
        "b": total_b / n,
        "difference": math.fsum(sums) / n,
        "ci95": None if interval is None else list(interval),
        "p": p,
    }
