"""The whole path on a real model: prepare, eval, train, eval, merge, eval, with the shipped recipe alone.

    python benchmarks/smollm2_32k.py MODEL_DIR BOOKS_DIR WORK_DIR ROWS.jsonl --commit HASH --machine "1x H100 80GB"

MODEL_DIR is SmolLM2-135M-Instruct, BOOKS_DIR plain-text books; three are held out. Each part is one command line and
what exists in WORK_DIR is not made again, so a broken-off call goes on where it was. Rows for
`benchmarks/results.jsonl` are written to ROWS.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from results import add_rows

HELD_OUT = ("moby-dick", "jane-eyre", "the-wealth-of-nations")
RECIPE = "smollm2-135m-32k.yaml"
COMMAND = (
    "longlora prepare BOOKS --recipe smollm2-135m-32k.yaml; longlora train --recipe smollm2-135m-32k.yaml; "
    "longlora eval --recipe smollm2-135m-32k.yaml; longlora merge RUN (benchmarks/smollm2_32k.py)"
)


def longlora(*words: str) -> float:
    """Run one command; returns its seconds."""
    begin = time.monotonic()
    sys.stdout.write(f"+ longlora {' '.join(words)}\n")
    sys.stdout.flush()
    subprocess.run([sys.executable, "-m", "longlora_cli", *words], check=True)
    return time.monotonic() - begin


def split_books(books: Path, work: Path) -> tuple[Path, list[Path]]:
    """A folder of the books to train on, and the held-out files."""
    folder = work / "books"
    folder.mkdir(parents=True, exist_ok=True)
    for path in books.glob("*.txt"):
        if path.stem not in HELD_OUT and not (folder / path.name).exists():
            os.link(path, folder / path.name)
    return folder, [books / f"{name}.txt" for name in HELD_OUT]


def results_of(folder: Path) -> dict[str, Any]:
    """The tasks of an evaluation folder."""
    tasks: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))["tasks"]
    return tasks


def rows_of(
    folder: Path, stack: str, origin: dict[str, Any], variant: str | None = None
) -> list[dict[str, Any]]:
    """Needle accuracy per length and perplexity per position bucket."""
    tasks = results_of(folder)
    more = {"variant": variant} if variant else {}
    common = {"case": "smollm2-32k", "stack": stack, **more, **origin}
    rows = []
    for cell in tasks["needle"]["lengths"]:
        low, high = cell["ci95"]
        figure = {
            "seq": cell["length"],
            "metric": "needle",
            "value": round(cell["score"], 4),
            "unit": "share",
        }
        rows.append(common | figure | {"n": cell["n"], "low": round(low, 4), "high": round(high, 4)})
    for bucket in tasks.get("ppl", {}).get("by_position", []):
        figure = {
            "seq": bucket["to"],
            "metric": "ppl",
            "value": round(bucket["perplexity"], 3),
            "unit": "perplexity",
        }
        rows.append(common | figure | {"n": bucket["n"]})
    return rows


def same_answers(first: Path, second: Path) -> tuple[int, int]:
    """How many needle answers of two evaluations are the same text, and of how many."""
    texts = [
        {row["key"]: row["prediction"] for row in map(json.loads, (f / "samples" / "needle.jsonl").open())}
        for f in (first, second)
    ]
    by_place = [list(t.values()) for t in texts]
    return sum(a == b for a, b in zip(*by_place, strict=True)), len(by_place[0])


def training_rows(run: Path, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed, memory and time of the training."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    steps = [line for line in lines if "tokens_per_second" in line][5:]
    common = {"case": "smollm2-32k", "stack": "longlora", "seq": 32768, **origin}
    seconds = sum(line["seconds"] for line in lines if "tokens_per_second" in line)
    middle = sorted(line["tokens_per_second"] for line in steps)[len(steps) // 2]
    return [
        common | {"metric": "tok_s", "value": middle, "unit": "tokens/s"},
        common | {"metric": "train_seconds", "value": round(seconds, 1), "unit": "s"},
        common | {"metric": "peak_gib", "value": max(s.get("peak_gpu_gib", 0) for s in steps), "unit": "GiB"},
    ]


def main() -> None:
    """Run what is missing, then write the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "books", "work", "rows"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--machine", required=True)
    options = parser.parse_args()
    work, model = options.work, str(options.model)
    texts, held_out = split_books(options.books, work)
    held = [str(path) for path in held_out]
    evaluate = ["eval", "--recipe", RECIPE, "--data", *held, "--haystack", *held]
    data, run, merged = work / "data", work / "run", work / "merged"
    origin = {"machine": options.machine, "commit": options.commit, "command": COMMAND}
    rows: list[dict[str, Any]] = []
    if not data.exists():
        longlora("prepare", str(texts), "--recipe", RECIPE, "--model", model, "--out", str(data))
    longlora("train", "--recipe", RECIPE, "--model", model, "--data", str(data), "--out", str(run))
    rows += training_rows(run, origin)
    for name, source, more in (
        ("longlora", str(run), []),
        ("base", model, ["--samples", "6"]),
    ):
        if not (work / name).exists():
            longlora(*evaluate, "--model", source, "--out", str(work / name), *more)
        rows += rows_of(work / name, name, origin)
        options.rows.unlink(missing_ok=True)
        add_rows(rows, options.rows)
    if not merged.exists():
        longlora("merge", str(run), "--out", str(merged))
    after = work / "longlora-merged"
    if not after.exists():
        grid = ["eval", "--tasks", "needle", "--haystack", *held, "--depths", "4", "--samples", "12"]
        longlora(*grid, "--lengths", "8k", "16k", "32k", "64k", "--model", str(merged), "--out", str(after))
    rows += rows_of(after, "longlora", origin, variant="merged")
    same, total = same_answers(work / "longlora", after)
    common = {"case": "smollm2-32k", "stack": "longlora", "variant": "merged", "seq": None, **origin}
    rows.append(
        common | {"metric": "same_answers", "value": round(same / total, 4), "unit": "share", "n": total}
    )
    options.rows.unlink(missing_ok=True)
    add_rows(rows, options.rows)
    question = "What is this text about? Answer in one sentence."
    longlora("chat", "--model", str(run), "--file", held[0], "-p", question, "--json", "--dry-run")


if __name__ == "__main__":
    main()
