"""Rows, aims and the estimate of `smollm2_extension.py`: what its folders hold, and what a phase will take of a GPU."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from extension_data import GENRES, read_lines
from smollm2_32k import results_of

CASE = "smollm2-extension"
Row = dict[str, Any]

# Measured on one H100 with this model: a 128K prompt is read in 3.46 s, of which attention, which grows with the
# square, takes about 3.1; a step of 128K trains in 4.54 s, 4.03 of it attention; a token of a batch takes 30 ms.
_READ_LINEAR, _READ_SQUARE = 0.36 / 131_072, 3.1 / 131_072**2
_STEP_LINEAR, _STEP_SQUARE = 0.51 / 131_072, 4.03 / 131_072**2
_TOKEN_SECONDS = 0.03
# A text with its eleven questions is made in 4.8 s of two cores at 262,144 tokens.
_MAKING = 4.8 / 262_144
# Keys and values of a token are 23 KB, and a quarter of 72 GB is left to a batch of at most 16.
_BATCH_TOKENS, _BATCH_MOST = 780_000, 16
# Lengths of chats are uniform from an eighth of the longest up to it: their mean square over their mean.
_MIXED_SHARE = 0.676


def read_seconds(tokens: int) -> float:
    """To read a prompt."""
    return _READ_LINEAR * tokens + _READ_SQUARE * tokens**2


def grid_seconds(lengths: list[int], depths: int, samples: int, new_tokens: int) -> tuple[float, float]:
    """Reading, and making and answering of a grid: each text is read once and its depths are answered together."""
    rounds = samples * sum(_rounds(length, depths) for length in lengths)
    made = samples * sum(lengths) * _MAKING
    return samples * sum(
        read_seconds(length) for length in lengths
    ), made + rounds * _TOKEN_SECONDS * new_tokens


def tasks_seconds(tasks: int, samples: int, length: int, new_tokens: int) -> tuple[float, float]:
    """Reading and answering of questions each about a text of its own."""
    asked = tasks * samples
    return asked * read_seconds(length), _rounds(length, asked) * _TOKEN_SECONDS * new_tokens


def _rounds(length: int, questions: int) -> int:
    batch = max(1, min(_BATCH_MOST, _BATCH_TOKENS // length))
    return -(-questions // batch)


def step_seconds(chunk: int, longest_document: int) -> float:
    """A step of one chunk whose documents are uniform up to the longest, or one text as long as the chunk."""
    mean_square = longest_document if longest_document == chunk else _MIXED_SHARE * longest_document
    return _STEP_LINEAR * chunk + _STEP_SQUARE * chunk * mean_square


def training_rows(work: Path, stages: list[str], origin: Row) -> list[Row]:
    """Speed, memory and seconds of each finished stage, and the seconds of all."""
    rows: list[Row] = []
    total = 0.0
    for stage in stages:
        run = work / f"run-{stage}"
        if not (run / "adapter").is_dir():
            return rows
        lines = list(read_lines(run / "metrics.jsonl"))
        steps = [line for line in lines if "tokens_per_second" in line]
        tokens = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["train"]["max_length"]
        seconds = sum(line["seconds"] for line in steps)
        total += seconds
        speed = sum(line["tokens_per_second"] * line["seconds"] for line in steps) / seconds
        common = {"case": CASE, "stack": "longlora", "seq": tokens, **origin}
        rows.append(
            common | {"metric": "train_seconds", "value": round(seconds, 1), "unit": "s", "n": len(steps)}
        )
        rows.append(common | {"metric": "tok_s", "value": round(speed), "unit": "tokens/s"})
        peak = max(line.get("peak_gpu_gib", 0) for line in steps)
        rows.append(common | {"metric": "peak_gib", "value": peak, "unit": "GiB"})
    common = {"case": CASE, "stack": "longlora", "seq": None, "variant": "all stages", **origin}
    return [*rows, common | {"metric": "train_seconds", "value": round(total, 1), "unit": "s"}]


def grid_rows(folder: Path, common: Row) -> list[Row]:
    """Needle accuracy by length, perplexity by position, and what the full context gains over 2K."""
    tasks = results_of(folder)
    rows = [_scored(cell, "needle", "share", common) for cell in tasks["needle"]["lengths"]]
    for bucket in tasks.get("ppl", {}).get("by_position", []):
        figure = {
            "seq": bucket["to"],
            "metric": "ppl",
            "value": round(bucket["perplexity"], 3),
            "unit": "perplexity",
        }
        rows.append(common | figure | {"n": bucket["n"]} | _ends(bucket["ci95"]))
        if bucket.get("gain") is not None and bucket["from"] >= tasks["ppl"]["short_context"]:
            figure = {
                "seq": bucket["to"],
                "metric": "gain",
                "value": round(bucket["gain"], 4),
                "unit": "nats",
            }
            rows.append(common | figure | {"n": bucket["n"]} | _ends(bucket["gain_ci95"]))
    return rows


def task_rows(folders: list[Path], metric: str, common: Row) -> list[Row]:
    """Each synthetic task by length, and the mean over the tasks as the row without a variant."""
    rows: list[Row] = []
    for folder in folders:
        by_length: dict[int, list[Row]] = {}
        for task, summary in results_of(folder).items():
            for cell in summary["lengths"]:
                rows.append(_scored(cell, metric, "share", common | {"variant": task}))
                by_length.setdefault(cell["length"], []).append(cell)
        for length, cells in by_length.items():
            mean = sum(cell["score"] for cell in cells) / len(cells)
            figure = {"seq": length, "metric": metric, "value": round(mean, 4), "unit": "share"}
            rows.append(common | figure | {"n": sum(cell["n"] for cell in cells)})
    return rows


def _scored(cell: Row, metric: str, unit: str, common: Row) -> Row:
    figure = {
        "seq": cell["length"],
        "metric": metric,
        "value": round(cell["score"], 4),
        "unit": unit,
        "n": cell["n"],
    }
    return common | figure | _ends(cell["ci95"])


def _ends(ci95: list[float] | None) -> Row:
    """An interval's fields; none where there is none, as of a single graded answer."""
    return {} if ci95 is None else {"low": round(ci95[0], 4), "high": round(ci95[1], 4)}


def short_rows(work: Path, stack: str, ending: str, common: Row) -> list[Row]:
    """Perplexity of the first 2K of each genre, choices, and QMSum's ROUGE-L, of those that were measured."""
    rows: list[Row] = []
    for genre in GENRES:
        if (folder := work / f"short-{genre}{ending}").is_dir():
            found = results_of(folder)["ppl"]
            figure = {"metric": "short_ppl", "value": round(found["perplexity"], 3), "unit": "perplexity"}
            where = common | {"variant": genre, "seq": found["window"], "n": found["n"]}
            rows.append(where | figure | _ends(found["ci95"]))
    for name, metric, unit in (
        ("choice", "multiple_choice", "share"),
        ("qmsum", "qmsum_rouge_l", "F-measure"),
    ):
        if (folder := work / f"{name}{ending}").is_dir():
            (found,) = results_of(folder).values()
            rows.append(_scored({"length": None, **found}, metric, unit, common))
    return rows


def plain_rows(answers: Path, grid: Path, common: Row) -> list[Row]:
    """The row of plain transformers: share right, and share of answers that are the same text as longlora's.

    Raises:
        ValueError: They were not asked the same questions.
    """
    said = list(read_lines(answers))
    ours = {
        (row["sample_hash"], row["depth"]): row["prediction"].strip()
        for row in read_lines(grid / "samples" / "needle.jsonl")
    }
    missing = [row for row in said if (row["sample_hash"], row["depth"]) not in ours]
    if missing:
        raise ValueError(f"{len(missing)} of {len(said)} questions of {answers} were not asked in {grid}")
    same = sum(ours[row["sample_hash"], row["depth"]] == row["prediction"] for row in said)
    where = common | {
        "variant": "merged, plain transformers",
        "seq": said[0]["length"],
        "unit": "share",
        "n": len(said),
    }
    right = sum(row["right"] for row in said)
    return [
        where | {"metric": "needle", "value": round(right / len(said), 4)},
        where | {"metric": "same_answers", "value": round(same / len(said), 4)},
    ]


def aims(rows: list[Row]) -> list[str]:
    """Each aim of the extension beside what came out, as far as it was measured."""

    def values(stack: str, metric: str, variant: str | None = None) -> dict[int, float]:
        return {
            row["seq"]: row["value"]
            for row in rows
            if (row["stack"], row["metric"], row.get("variant")) == (stack, metric, variant)
        }

    lines = []
    if needle := values("longlora", "needle"):
        worst = min(needle, key=needle.__getitem__)
        lines.append(f"needle: at least {needle[worst]:.1%}, at {worst:,} (aim 99 % at every length)")
    for task in ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"):
        if (found := values("longlora", "ruler", task).get(131_072)) is not None:
            lines.append(f"{task} at 131,072: {found:.1%} (aim 90 %)")
    if curve := values("longlora", "ppl"):
        places = sorted(curve)
        rises = [b for a, b in pairwise(places) if curve[b] > curve[a]]
        shown = ", ".join(f"{place:,}" for place in rises)
        lines.append(
            f"perplexity by position: {f'rises up to {shown}' if rises else 'never rises'} (aim: never)"
        )
    for genre in GENRES:
        after, before = (
            next(iter(values(s, "short_ppl", genre).values()), None) for s in ("longlora", "base")
        )
        if after and before:
            lines.append(
                f"perplexity of the first 2K, {genre}: {100 * (after / before - 1):+.1f} % (aim within 2 %)"
            )
    after_far, before_near = values("longlora", "ruler").get(32_768), values("base", "ruler").get(4096)
    if after_far is not None and before_near is not None:
        lines.append(f"RULER-style at 32K: {after_far:.1%}, base at 4K {before_near:.1%} (aim above)")
    if seconds := values("longlora", "train_seconds", "all stages"):
        lines.append(f"training: {next(iter(seconds.values())) / 60:.1f} minutes (aim at most 25)")
    return lines
