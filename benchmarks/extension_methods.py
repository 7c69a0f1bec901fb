"""Ways to a longer context, trained for equal seconds at one length on the same data, and asked the same.

    python benchmarks/extension_methods.py MODEL BOOKS WORK ROWS.jsonl --seconds 60 --commit HASH
        --machine "1x H100 80GB"

Positions by theta, YaRN, linear and dynamic; LoRA alone, with norms, with norms and embeddings; full attention, S2-Attn
and Activation Beacon. All differ in one thing from `theta`: LoRA of rank 64 with norms, full attention. A method's step
is timed first (`WORK/NAME-probe`), and it gets the steps that fit the seconds; compiling and loading are not counted.
Then hidden facts in sentences that no training data has, and perplexity of held-out books by position. What exists in
WORK is not made again; `--only NAME ...` does some methods.

On a CPU, with a model and recipe that suit it: `... builtin BOOKS WORK ROWS --recipe tiny.yaml --theta 400000
--s2-group 256 --beacon-window 64 --lengths 512,1k --window 1k`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml
from extension_data import read_lines
from results import add_rows
from smollm2_32k import longlora, phase, results_of, say, split_books, together

CASE = "extension-methods"
RECIPE = "smollm2-135m-32k.yaml"
RECIPES = Path(__file__).parent.parent / "longlora_cli" / "recipes"
COMMAND = "python benchmarks/extension_methods.py MODEL BOOKS WORK ROWS"
# Steps of the first run whose seconds do not count: they compile and allocate.
_WARM, _PROBED = 3, 10
_FIXED = ("max_length", "learning_rate", "lora_rank")


def methods(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name of each method -> its flags of `longlora train`."""
    theta = ["--rope", "theta", "--rope-theta", str(options.theta)]
    norms = ["--also-train", "norms"]
    beacon = ["--beacon-ratio", str(options.ratio), "--beacon-window", str(options.beacon_window)]
    beacon += ["--beacon-position", "append", "--beacon-attention", "step-expansion", "--beacon-sink", "4"]
    return {
        "theta": [*theta, *norms],
        "theta by the NTK rule": ["--rope", "theta", *norms],
        "yarn": ["--rope", "yarn", *norms],
        "linear": ["--rope", "linear", *norms],
        "dynamic": ["--rope", "dynamic", *norms],
        "LoRA alone": theta,
        "norms and embeddings": [*theta, "--also-train", "all"],
        "S2-Attn": [*theta, *norms, "--s2-group", str(options.s2_group)],
        "beacon": [*beacon, *norms],
    }


def folder_name(method: str) -> str:
    """A method's folder: letters, digits and dashes."""
    return "-".join("".join(c if c.isalnum() else " " for c in method).split())


def train_flags(options: argparse.Namespace, method: str) -> list[str]:
    """What all methods share, from the recipe, and the method's own."""
    path = Path(options.recipe) if Path(options.recipe).is_file() else RECIPES / options.recipe
    shared = yaml.safe_load(path.read_text(encoding="utf-8"))["train"]
    words = ["--model", options.model, "--data", str(options.work / "data")]
    for name in _FIXED:
        words += [f"--{name.replace('_', '-')}", str(shared[name])]
    return words + methods(options)[method]


def step_rows(run: Path) -> list[dict[str, Any]]:
    """The log rows of a run that tell a step."""
    return [row for row in read_lines(run / "metrics.jsonl") if "tokens_per_second" in row]


def affordable_steps(probe: Path, seconds: float) -> int:
    """How many steps of a mean length take so many seconds, at least one."""
    warm = step_rows(probe)[_WARM:]
    return max(1, int(seconds * len(warm) / sum(row["seconds"] for row in warm)))


def train(options: argparse.Namespace, method: str) -> None:
    """Time a step of the method, then train it for the seconds."""
    run, probe = options.work / folder_name(method), options.work / f"{folder_name(method)}-probe"
    if (run / "adapter").exists():
        return
    flags = train_flags(options, method)
    if not (probe / "adapter").exists():
        longlora("train", *flags, "--steps", str(_PROBED), "--save-every", str(_PROBED), "--out", str(probe))
    steps = affordable_steps(probe, options.seconds)
    say(f"{method}: {steps} steps in {options.seconds:g} s")
    more = ["--steps", str(steps), "--warmup", str(steps // 20), "--save-every", str(steps)]
    longlora("train", *flags, *more, "--out", str(run))


def evaluation(options: argparse.Namespace, method: str, held: list[str]) -> list[str]:
    """The same questions and texts for every method."""
    words = ["eval", "--model", str(options.work / folder_name(method)), "--tasks", "ppl,needle", "--beyond"]
    words += ["--data", *held, "--haystack", *held, "--window", options.window, "--stride", options.window]
    words += ["--max-tokens", options.tokens, "--lengths", options.lengths, "--depths", "4"]
    words += ["--samples", str(options.samples), "--needle-wording", "eval", "--max-new-tokens", "24"]
    words += ["--beacon-ratio", str(options.ratio)] if method == "beacon" else []
    return [*words, "--out", str(options.work / f"{folder_name(method)}-eval")]


def rows_of(work: Path, method: str, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """Steps and seconds, facts found by length, perplexity by position."""
    common = {"case": CASE, "stack": method, **origin}
    steps = step_rows(work / folder_name(method))
    tasks = results_of(work / f"{folder_name(method)}-eval")
    seconds = sum(row["seconds"] for row in steps)
    rows = [
        common
        | {"seq": None, "metric": "train_seconds", "value": round(seconds, 1), "unit": "s", "n": len(steps)}
    ]
    for cell in tasks["needle"]["lengths"]:
        low, high = cell["ci95"]
        figure = {
            "seq": cell["length"],
            "metric": "needle",
            "value": round(cell["score"], 4),
            "unit": "share",
        }
        rows.append(common | figure | {"n": cell["n"], "low": round(low, 4), "high": round(high, 4)})
    for bucket in tasks["ppl"]["by_position"]:
        figure = {
            "seq": bucket["to"],
            "metric": "ppl",
            "value": round(bucket["perplexity"], 3),
            "unit": "perplexity",
        }
        rows.append(common | figure | {"n": bucket["n"]})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line a method: steps, facts found at each length, perplexity of the last bucket."""
    lengths = sorted({row["seq"] for row in rows if row["metric"] == "needle"})
    lines = [f"| method | steps | {' | '.join(f'{n:,}' for n in lengths)} | perplexity at the end |"]
    lines.append(f"| --- | ---: |{' ---: |' * len(lengths)} ---: |")
    for method in dict.fromkeys(row["stack"] for row in rows):
        own = [row for row in rows if row["stack"] == method]
        found = {row["seq"]: f"{row['value']:.0%}" for row in own if row["metric"] == "needle"}
        steps = next(row["n"] for row in own if row["metric"] == "train_seconds")
        last = max((row for row in own if row["metric"] == "ppl"), key=lambda row: row["seq"])
        lines.append(
            f"| {method} | {steps} | {' | '.join(found[n] for n in lengths)} | {last['value']:.2f} |"
        )
    return lines


def read_options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    for name in ("books", "work", "rows"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--machine", required=True)
    parser.add_argument(
        "--recipe", default=RECIPE, help="its data, length, rank and learning rate are everyone's"
    )
    parser.add_argument("--seconds", type=float, default=60, help="of training, for each method")
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--theta", type=float, default=6_000_000)
    parser.add_argument("--s2-group", default="8k")
    parser.add_argument("--ratio", type=int, default=4)
    parser.add_argument("--beacon-window", default="1024")
    parser.add_argument("--lengths", default="8k,16k,32k,64k")
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--window", default="32k")
    parser.add_argument("--tokens", default="128k", help="of each held-out book")
    parser.add_argument("--together", type=int, default=3, help="evaluations at one time")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Train and ask what is missing, then write the rows and the table."""
    options = read_options(words)
    known = list(methods(options))
    if unknown := sorted(set(options.only or []) - set(known)):
        raise SystemExit(f"--only {unknown[0]}: known are {', '.join(known)}")
    chosen = [name for name in known if not options.only or name in options.only]
    texts, held_out = split_books(options.books, options.work)
    held = [str(path) for path in held_out]
    if not (options.work / "data").exists():
        with phase("prepare"):
            recipe = ["--recipe", options.recipe, "--model", options.model]
            longlora("prepare", str(texts), *recipe, "--out", str(options.work / "data"))
    for method in chosen:
        with phase(method):
            train(options, method)
    missing = [m for m in chosen if not (options.work / f"{folder_name(m)}-eval").exists()]
    for start in range(0, len(missing), options.together):
        some = missing[start : start + options.together]
        together({f"{folder_name(m)}-eval": evaluation(options, m, held) for m in some}, options.work)
    origin = {"machine": options.machine, "commit": options.commit, "command": COMMAND}
    rows = [row for method in chosen for row in rows_of(options.work, method, origin)]
    add_rows(rows, options.rows)
    sys.stdout.write("\n".join(table(rows)) + "\n")


if __name__ == "__main__":
    main()
