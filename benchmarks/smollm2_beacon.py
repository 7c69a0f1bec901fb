"""Activation Beacon on a real model, end to end: full attention, x2, x4, x8, and x8 with retrieval by BM25.

    python benchmarks/smollm2_beacon.py MODEL_DIR BOOKS_DIR WORK_DIR ROWS.jsonl --commit HASH --machine "1x H100 80GB"

MODEL_DIR is SmolLM2-135M-Instruct, BOOKS_DIR plain-text books; three are held out. First the base is made by
`smollm2-135m-32k.yaml` and merged (or given by --base FOLDER, as `benchmarks/smollm2_32k.py` leaves it in WORK/merged),
then beacons are trained on it by `smollm2-135m-beacon.yaml`, and then all are measured: perplexity on held-out books by
position, hidden facts by length, and at 64K seconds to read, tokens per second to go on, and bytes of keys and values.
Each part is one command line, and what exists in WORK_DIR is not made again. Evaluations run at one time, with their
output in WORK_DIR/NAME.log; speed is measured when nothing else runs. Rows for `benchmarks/results.jsonl` go to
ROWS.jsonl.

On a CPU, with a model and recipes that suit it: `... builtin BOOKS WORK ROWS --base builtin --recipe tiny.yaml
--speed-tokens 1024 --parallel 2`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from results import add_rows
from smollm2_32k import longlora, phase, results_of, say, split_books, together

CASE = "smollm2-beacon"
BASE_RECIPE, RECIPE = "smollm2-135m-32k.yaml", "smollm2-135m-beacon.yaml"
COMMAND = (
    "longlora prepare BOOKS --recipe smollm2-135m-beacon.yaml; longlora train --recipe smollm2-135m-beacon.yaml; "
    "longlora eval --recipe smollm2-135m-beacon.yaml --model RUN --beacon-ratio 8 (benchmarks/smollm2_beacon.py)"
)
FULL = "full attention"
RECIPES = Path(__file__).parent.parent / "longlora_cli" / "recipes"


def stacks(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name of each way to read -> its flags of `longlora eval`."""
    parallel = ["--beacon-parallel-window", str(options.parallel)]
    run = ["--model", str(options.work / "beacon-run")]
    found = {FULL: ["--model", str(options.base)]}
    for ratio in options.ratios:
        found[f"x{ratio}"] = [*run, "--beacon-ratio", str(ratio), *parallel]
    if not options.skip_retrieval:
        largest = max(options.ratios)
        found[f"x{largest} + BM25"] = [*run, "--beacon-ratio", str(largest), "--retrieval-method", "bm25"]
    return found


def folder_name(stack: str) -> str:
    """A stack's folder and log: letters, digits and dashes."""
    return "eval-" + "-".join("".join(c if c.isalnum() else " " for c in stack).split())


def make_base(options: argparse.Namespace, texts: Path) -> Path:
    """The merged model that beacons are trained on."""
    if options.base is not None:
        return Path(options.base)
    work, merged = options.work, options.work / "base"
    data, run = work / "base-data", work / "base-run"
    with phase("base"):
        if not data.exists():
            recipe = ["--recipe", options.base_recipe, "--model", options.model]
            longlora("prepare", str(texts), *recipe, "--out", str(data))
        if not (run / "adapter").exists():
            recipe = ["--recipe", options.base_recipe, "--model", options.model]
            longlora("train", *recipe, "--data", str(data), "--out", str(run))
        if not merged.exists():
            longlora("merge", str(run), "--out", str(merged))
    return merged


def train(options: argparse.Namespace, texts: Path) -> None:
    """Prepare and train, where that is not done."""
    work = options.work
    data, run = work / "beacon-data", work / "beacon-run"
    recipe = ["--recipe", options.recipe, "--model", str(options.base)]
    if not data.exists():
        with phase("prepare"):
            longlora("prepare", str(texts), *recipe, "--out", str(data))
    if not (run / "adapter").exists():
        with phase("train"):
            longlora("train", *recipe, "--data", str(data), "--out", str(run))


def needle_flags(recipe: str) -> list[str]:
    """The recipe's evaluation by hidden facts alone; its settings of perplexity would have no effect."""
    path = Path(recipe) if Path(recipe).is_file() else RECIPES / recipe
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))["eval"] | {"tasks": ["needle"]}
    flags = []
    for name, value in settings.items():
        if name not in ("window", "stride", "max_tokens"):
            shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [shown])]
    return flags


def evaluate(options: argparse.Namespace, held: list[str]) -> None:
    """All ways to read, those that are missing at one time; with retrieval only what has a question."""
    jobs = {}
    for name, flags in stacks(options).items():
        out = options.work / folder_name(name)
        if out.exists():
            continue
        asked = (
            needle_flags(options.recipe) if "BM25" in name else ["--recipe", options.recipe, "--data", *held]
        )
        jobs[folder_name(name)] = ["eval", *asked, "--haystack", *held, *flags, "--out", str(out)]
    with phase(f"eval of {', '.join(jobs) or 'nothing more'}"):
        together(jobs, options.work)


def measure_speed(options: argparse.Namespace, book: str) -> dict[str, dict[str, Any]]:
    """Speed of each way to read, one after the other; kept in WORK/speed.json."""
    path = options.work / "speed.json"
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    script = str(Path(__file__).with_name("beacon_speed.py"))
    for name, flags in stacks(options).items():
        if name in found or "BM25" in name:  # the same memory; what retrieval adds depends on the question
            continue
        words = [script, flags[1], book, "--tokens", str(options.speed_tokens)]
        if name != FULL:
            words += ["--ratio", flags[3], "--parallel", str(options.parallel)]
        with phase(f"speed of {name}"):
            out = subprocess.run(
                [sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
        found[name] = json.loads(out.splitlines()[-1])
        path.write_text(json.dumps(found, indent=1))
    return found


def training_rows(run: Path, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed, memory and time of the training."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    steps = [line for line in lines if "tokens_per_second" in line]
    tokens = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["train"]["max_length"]
    seconds = sum(line["seconds"] for line in steps)
    figures = {
        "tok_s": (sum(s["tokens_per_second"] * s["seconds"] for s in steps) / seconds, "tokens/s"),
        "train_seconds": (round(seconds, 1), "s"),
        "peak_gib": (max(s.get("peak_gpu_gib", 0) for s in steps), "GiB"),
    }
    common = {"case": CASE, "stack": "training", "seq": tokens, **origin}
    return [
        common | {"metric": name, "value": round(value, 3), "unit": unit}
        for name, (value, unit) in figures.items()
    ]


def rows_of(folder: Path, stack: str, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """Needle accuracy per length, and perplexity per position bucket where it was measured."""
    tasks, common = results_of(folder), {"case": CASE, "stack": stack, **origin}
    rows = []
    for cell in tasks["needle"]["lengths"]:
        low, high = cell["ci95"]
        figure = {"metric": "needle", "value": round(cell["score"], 4), "unit": "share", "n": cell["n"]}
        rows.append(
            common | {"seq": cell["length"]} | figure | {"low": round(low, 4), "high": round(high, 4)}
        )
    for bucket in tasks.get("ppl", {}).get("by_position", []):
        figure = {"metric": "ppl", "value": round(bucket["perplexity"], 3), "unit": "perplexity"}
        rows.append(common | {"seq": bucket["to"]} | figure | {"n": bucket["n"]})
    return rows


def speed_rows(found: dict[str, dict[str, Any]], origin: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes, seconds and tokens per second of each way to read."""
    units = {
        "prefill_seconds": "s",
        "decode_tok_s": "tokens/s",
        "kv_bytes_per_token": "bytes",
        "planned_kv_bytes_per_token": "bytes",
    }
    return [
        {"case": CASE, "stack": stack, "seq": speed["tokens"], **origin}
        | {"metric": name, "value": speed[name], "unit": unit}
        for stack, speed in found.items()
        for name, unit in units.items()
    ]


def aims(rows: list[dict[str, Any]], *, trained: int, farthest: int) -> list[str]:
    """Each aim with what came out."""

    def value(stack: str, metric: str, seq: int) -> float | None:
        found = [r["value"] for r in rows if (r["stack"], r["metric"], r["seq"]) == (stack, metric, seq)]
        return found[0] if found else None

    lines = []
    buckets = [r["seq"] for r in rows if r["stack"] == FULL and r["metric"] == "ppl"]
    if buckets and (four := value("x4", "ppl", max(buckets))) is not None:
        full = value(FULL, "ppl", max(buckets)) or 1.0
        lines.append(
            f"x4 perplexity up to {max(buckets):,}: {100 * (four / full - 1):+.1f} % of full (aim 5 %)"
        )
    for row in rows:
        if row["metric"] == "needle" and row["stack"] == "x4" and row["seq"] <= trained:
            lines.append(f"x4 needle at {row['seq']:,}: {100 * row['value']:.0f} % (aim 90 %)")
        if row["metric"] == "needle" and "BM25" in row["stack"]:
            lines.append(f"{row['stack']} needle at {row['seq']:,}: {100 * row['value']:.0f} % (aim 99 %)")
        if row["metric"] == "kv_bytes_per_token":
            planned = value(row["stack"], "planned_kv_bytes_per_token", row["seq"]) or 1.0
            lines.append(
                f"{row['stack']} keys: {100 * (row['value'] / planned - 1):+.2f} % of the plan (aim 2 %)"
            )
        if row["metric"] == "prefill_seconds" and row["stack"] != FULL:
            full = value(FULL, "prefill_seconds", farthest) or 0.0
            lines.append(f"{row['stack']} reads {farthest:,} in {row['value']:.2f} s, full in {full:.2f} s")
    return lines


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    for name in ("books", "work", "rows"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--base", help="the merged model, if there is one")
    parser.add_argument("--base-recipe", default=BASE_RECIPE)
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--ratios", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--parallel", type=int, default=8, help="windows in one pass when reading")
    parser.add_argument("--speed-tokens", type=int, default=65536)
    parser.add_argument("--skip-retrieval", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then write the rows and say how they compare with the aims."""
    options = read_options()
    texts, held_out = split_books(options.books, options.work)
    held = [str(path) for path in held_out]
    origin = {"machine": options.machine, "commit": options.commit, "command": COMMAND}
    options.base = make_base(options, texts)
    train(options, texts)
    run = options.work / "beacon-run"
    rows = training_rows(run, origin)
    add_rows(rows, options.rows)
    speed = measure_speed(options, held[0])
    evaluate(options, held)
    for name in stacks(options):
        rows += rows_of(options.work / folder_name(name), name, origin)
    rows += speed_rows(speed, origin)
    add_rows(rows, options.rows)
    for line in aims(rows, trained=rows[0]["seq"], farthest=options.speed_tokens):
        say(line)
    say("done")


if __name__ == "__main__":
    main()
