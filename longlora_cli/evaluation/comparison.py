"""Two finished evaluations side by side: score by score, length by length, each difference with interval and p.

Needs no model and no torch. Only what was measured alike is compared: other scorer versions, windows or samples are
left out by name, and two folders with nothing in common are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longlora_cli.errors import IncompatibleError
from longlora_cli.evaluation.finished import Evaluation
from longlora_cli.evaluation.paired import holm, is_binary, mcnemar, mcnemar_by_text, paired_bootstrap
from longlora_cli.evaluation.pairing import Row, lengths_of, pair_rows, place_of, texts_of
from longlora_cli.evaluation.perplexity_pairs import compare_perplexity
from longlora_cli.evaluation.statistics import smallest_paired_gap

# Settings of the model and of the machine: what a comparison is about, or what changes no number.
_NOT_OF_THE_TASK = {
    *(
        "model",
        "adapter",
        "dtype",
        "quantization",
        "device",
        "attention",
        "chat_template",
        "rope",
        "rope_factor",
    ),
    *("rope_theta", "out", "compare", "tasks", "prefill_chunk", "effective_score", "metrics"),
    # How what was read is kept is a fact of the model, too.
    *("kv_bits", "beacon_ratio", "beacon_ratio_mix", "beacon_parallel_window"),
    *("retrieval_method", "retrieval_topk", "retrieval_key_length"),
}
_PERPLEXITY = ("window", "stride", "bos", "docs")
_PERPLEXITY_ONLY = {*_PERPLEXITY, "max_tokens", "short_context", "compat"}

Cell = dict[str, Any]


def require_common_tasks(settings: Mapping[str, Any], tasks: Sequence[str], other: Evaluation) -> None:
    """Refuse a comparison that can have no result, before anything is measured.

    Args:
        settings: Of the evaluation that is to be made.
        tasks: Its tasks.
        other: What it will be compared with.

    Raises:
        IncompatibleError: No task is in both, or each was measured with other settings.
    """
    reasons = []
    for task in dict.fromkeys(tasks):
        if task not in other.results["tasks"]:
            reasons.append(f"{task} is not in {other.folder}")
        elif (reason := _obstacle(task, settings, other.settings)) is None:
            return
        else:
            reasons.append(f"{task}: {reason}")
    raise _nothing(other, reasons)


def compare_evaluations(a: Evaluation, b: Evaluation) -> dict[str, Any]:
    """Compare `a` with `b`; differences are `a - b`.

    Returns:
        - `a`, `b`: `{"folder", "model"}`.
        - `cells`: for each task and score one over all pairs (`length` None) and one for each length: `n` pairs,
          `clusters` (independent texts or windows), `a`, `b`, `difference`, `ci95` (paired bootstrap of texts),
          `test`, `p`, `p_holm`. Yes/no scores have `a_only` and `b_only` (right answers of one alone), `p_by_text`
          where questions share texts, and `smallest_gap`. Perplexity has `ratio`, `ratio_ci95`, `perplexity_a`, `_b`.
        - `tasks`: for each task compared `pairs`, `only_a`, `only_b` (rows without a partner, by their place),
          `other_text`, `why`.
        - `left_out`: `{"task", "why"}`, with `score` where it is only one.
        - `settings`: those that differ, `{name: [a, b]}`.

        Holm's correction is over all cells of all pairs on the one hand and over all cells of a length on the other.

    Raises:
        IncompatibleError: There is nothing to compare.
    """
    tasks_a, tasks_b = a.results["tasks"], b.results["tasks"]
    cells: list[Cell] = []
    compared: dict[str, Any] = {}
    left_out: list[dict[str, Any]] = []
    for task in [*tasks_a, *(task for task in tasks_b if task not in tasks_a)]:
        if task not in tasks_a or task not in tasks_b:
            left_out.append({"task": task, "why": f"only in {(a if task in tasks_a else b).folder}"})
        elif reason := _obstacle(task, a.settings, b.settings):
            left_out.append({"task": task, "why": reason})
        else:
            found, facts, missing = compare_perplexity(a, b) if task == "ppl" else _compare_rows(a, b, task)
            cells += found
            left_out += missing
            if found:
                compared[task] = {**facts, "why": _why(a, b, task) if _has_lonely(facts) else []}
    if not cells:
        raise _nothing(b, [f"{entry['task']}: {entry['why']}" for entry in left_out], a)
    _adjust(cells)
    return {
        "a": {"folder": str(a.folder), "model": a.model},
        "b": {"folder": str(b.folder), "model": b.model},
        "cells": cells,
        "tasks": compared,
        "left_out": left_out,
        "settings": {name: list(pair) for name, pair in _differences(a.settings, b.settings).items()},
    }


def _nothing(b: Evaluation, reasons: Sequence[str], a: Evaluation | None = None) -> IncompatibleError:
    what = f"nothing to compare with {b.folder}" if a is None else f"{a.folder} and {b.folder} share nothing"
    return IncompatibleError(
        f"{what}: {'; '.join(reasons)}",
        rule="Only the same questions, scored by the same rules, can be compared.",
        hint=f"Measure again with the settings of {b.folder}/results.json.",
    )


def _obstacle(task: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """Why a task of two evaluations cannot be compared at all, from their settings."""
    if task == "ppl":
        names: tuple[str, ...] = _PERPLEXITY
        a, b = ({**s, "stride": s.get("stride") or max(1, s.get("window", 2) // 2)} for s in (a, b))
    else:
        # Grids are made for the room that their answer needs, so their samples tell; rows of a file do not.
        names = ("max_new_tokens",) if task == "generate" else ()
    different = [
        f"{_flag(name)} {a.get(name)} and {b.get(name)}" for name in names if a.get(name) != b.get(name)
    ]
    return "measured with " + ", ".join(different) if different else None


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = sorted((a.keys() | b.keys()) - _NOT_OF_THE_TASK)
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _why(a: Evaluation, b: Evaluation, task: str) -> list[str]:
    """What differs that can take a row of a task its partner."""
    skip = set() if task == "ppl" else _PERPLEXITY_ONLY
    found = [
        f"{_flag(name)} {_shown(one)} and {_shown(other)}"
        for name, (one, other) in _differences(a.settings, b.settings).items()
        if name not in skip
    ]
    names = {"haystack": "haystack", "tokenizer": "tokenizer", "chat_template": "chat template"}
    if a.inputs and b.inputs:
        found += [f"another {word}" for name, word in names.items() if a.inputs[name] != b.inputs[name]]
    return found or ["other texts"]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _has_lonely(facts: Mapping[str, Any]) -> bool:
    return bool(facts["only_a"] or facts["only_b"])


def _compare_rows(a: Evaluation, b: Evaluation, task: str) -> tuple[list[Cell], dict[str, Any], list[Any]]:
    """Cells, facts of the pairing, and what is left out."""
    different = _other_scorers(a.results["tasks"][task], b.results["tasks"][task])
    if "" in different:
        return [], {}, [{"task": task, "why": different[""]}]
    pairing = pair_rows(a, b, task)
    facts = {
        "pairs": len(pairing.pairs),
        "only_a": [place_of(row) for row in pairing.only_a],
        "only_b": [place_of(row) for row in pairing.only_b],
        "other_text": pairing.other_text,
    }
    if not pairing.pairs:
        return [], facts, [{"task": task, "why": "no sample in common: " + ", ".join(_why(a, b, task))}]
    cells, left_out = [], []
    for score in pairing.pairs[0][0]["scores"]:
        if score in different:
            left_out.append({"task": task, "score": score, "why": different[score]})
        elif any(score not in row["scores"] for pair in pairing.pairs for row in pair):
            left_out.append({"task": task, "score": score, "why": "not every row has it"})
        else:
            cells += _cells(task, score, pairing.pairs)
    return cells, facts, left_out


def _other_scorers(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, str]:
    """Scores whose scorers' versions differ: key -> what to say; an empty key stands for the whole task."""
    if a.get("scorer") != b.get("scorer"):
        return {"": f"scored by {a.get('scorer')} and {b.get('scorer')}"}
    # A task with one scorer has its means alone there.
    one, other = (
        {key: score.get("scorer") for key, score in task.get("scores", {}).items() if isinstance(score, dict)}
        for task in (a, b)
    )
    return {
        key: f"scored by {version} and {other[key]}"
        for key, version in one.items()
        if key in other and other[key] != version
    }


def _cells(task: str, score: str, pairs: Sequence[tuple[Row, Row]]) -> list[Cell]:
    binary = is_binary([row["scores"][score] for pair in pairs for row in pair])
    groups: list[tuple[int | None, Sequence[tuple[Row, Row]]]] = [(None, pairs)]
    groups += [
        (length, [p for p in pairs if p[0].get("length") == length])
        for length in lengths_of([p[0] for p in pairs])
    ]
    return [
        {"task": task, "score": score, "length": length, **_cell(score, some, binary=binary)}
        for length, some in groups
    ]


def _cell(score: str, pairs: Sequence[tuple[Row, Row]], *, binary: bool) -> Cell:
    values = [(float(a["scores"][score]), float(b["scores"][score])) for a, b in pairs]
    sums: dict[Any, float] = {}
    counts: dict[Any, int] = {}
    for text, (one, other) in zip(texts_of([a for a, _ in pairs]), values, strict=True):
        sums[text] = sums.get(text, 0.0) + one - other
        counts[text] = counts.get(text, 0) + 1
    n = len(values)
    interval, p = paired_bootstrap(list(sums.values()), list(counts.values()))
    mean_a, mean_b = sum(one for one, _ in values) / n, sum(other for _, other in values) / n
    cell: Cell = {
        "n": n,
        "clusters": len(sums),
        "a": mean_a,
        "b": mean_b,
        "difference": sum(sums.values()) / n,
        "ci95": None if interval is None else list(interval),
        "test": "paired bootstrap",
        "p": p,
    }
    if not binary:
        return cell
    a_only, b_only = (sum(pair == wanted for pair in values) for wanted in ((1.0, 0.0), (0.0, 1.0)))
    cell |= {"test": "McNemar", "p": mcnemar(a_only, b_only), "a_only": a_only, "b_only": b_only}
    if len(sums) < n:
        cell["p_by_text"] = mcnemar_by_text([round(value) for value in sums.values()])
    disagreement = max(a_only + b_only, 1) / n
    cell["smallest_gap"] = min(1.0, smallest_paired_gap(len(sums), disagreement=disagreement))
    return cell


def _adjust(cells: Sequence[Cell]) -> None:
    """Add Holm's p to cells over all pairs, and to those of a length, separately: a length is part of the whole."""
    for family in ([c for c in cells if c["length"] is None], [c for c in cells if c["length"] is not None]):
        for name, target in (("p", "p_holm"), ("p_by_text", "p_by_text_holm")):
            # A cell whose questions share no text has one p for both.
            adjusted = holm([cell[name] if name in cell else cell["p"] for cell in family])
            for cell, value in zip(family, adjusted, strict=True):
                if name in cell:
                    cell[target] = value
