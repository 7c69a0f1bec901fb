"""SmolLM2-135M-Instruct from 8,192 to 262,144 tokens with the shipped recipes alone, measured before and after.

    python benchmarks/smollm2_extension.py MODEL BOOKS WORK ROWS.jsonl --meetings qmsum.jsonl.xz
        --chats conversations.jsonl --commit HASH --machine "1x H100 80GB" [--only PHASE ...] [--minutes 9]

Every phase is a few command lines of longlora; what exists in WORK is not made again, and what was broken off goes on,
so phases can be spread over machines that are lent for a while (`--estimate` prints the seconds of a GPU of each):

    data prepare                    texts of training and of evaluation apart; two folders of chunks for each stage
    base                            the base: needles and perplexity by position; RULER-style tasks; near texts
    train-64k train-128k train-256k each stage goes on from the adapter of the one before
    merge after plain report        the merged folder; the run, as the base; a row of the grid by transformers alone

Asked for by name: `pack` and `unpack` (the last run's adapter in parts of 15 MiB, and back), and parts of `base` and
`after`: base-grid, base-tasks, base-short, grid, tasks, short. `report` makes WORK/report.html of both grids.

`--minutes` ends what runs by SIGTERM, so that it saves, and leaves the rest for the next call. Rows go to ROWS.jsonl.
Three books, the meetings outside the train split, every third conversation and all manuals are held out; evaluation's
sentences, keys, cities and words are in no training data (tests/data/test_synthetic_tasks.py).
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from extension_data import GENRES, pack, split_data, unpack, write_questions
from extension_rows import (
    CASE,
    aims,
    grid_rows,
    grid_seconds,
    plain_rows,
    read_seconds,
    short_rows,
    step_seconds,
    task_rows,
    tasks_seconds,
    training_rows,
)
from results import add_rows
from smollm2_32k import command, phase, say

from longlora_cli.values import parse_length

HERE = Path(__file__).parent
RECIPES = HERE.parent / "longlora_cli" / "recipes"
COMMAND = "python benchmarks/smollm2_extension.py MODEL BOOKS WORK ROWS (docs/extension.md)"
STAGES = ("64k", "128k", "256k")
# Books that a stage learns from; a chunk of a stage is a step of it.
BOOKS_OF = {"64k": "", "128k": "[6]", "256k": "[5]"}
# Of the chats that the recipe of short ones makes, the share that a stage has time for.
SHORT_OF = {"64k": 1.0, "128k": 0.5, "256k": 0.6}
# LENGTHS=QUESTIONS of each task; fewer of what takes longer: reading 256K takes 13 s.
RULER = ("4k,8k,16k,32k=6", "64k=2", "128k=2", "256k=1")
MULTI_KEY = ("128k=7",)
UNSEEN = ("4k,32k=6", "128k=1")
UNSEEN_TASKS = "lines,qa_needle,babi_long,niah_latent,sort,topic,repeat,count"
BASE_RULER, BASE_UNSEEN = ("4k,8k,16k,32k=6",), ("4k,32k=6",)


class Stopped(Exception):
    """The minutes of this call are over; what ran has saved its state."""


def run_all(options: argparse.Namespace, jobs: dict[str, list[str]], most: int = 16) -> None:
    """Run command lines, at most `most` at one time, each with its messages in `WORK/NAME.log`.

    Raises:
        Stopped: `--minutes` are over: what ran got SIGTERM and ended by itself.
        SystemExit: One failed, after all that had begun ended.
    """
    waiting, running, failed, stopped = list(jobs), dict[str, subprocess.Popen[bytes]](), list[str](), False
    while running or (waiting and not failed and not stopped):
        while waiting and len(running) < most and not failed and not stopped:
            name = waiting.pop(0)
            words = jobs[name]
            say(f"+ {' '.join(words[3:] if words[2:3] == ['-m'] else words[1:])} &> {name}.log")
            with (options.work / f"{name}.log").open("ab") as log:
                running[name] = subprocess.Popen(words, stdout=log, stderr=log)
        time.sleep(0.1)
        if time.monotonic() > options.deadline and not stopped:
            stopped = True
            for process in running.values():
                process.send_signal(signal.SIGTERM)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            if running.pop(name).returncode:
                failed.append(name)
    if stopped:
        raise Stopped(f"stopped by --minutes, {', '.join(failed + waiting)} to go on; the same command does")
    for name in failed:
        tail = (options.work / f"{name}.log").read_text(errors="replace")[-2000:]
        print(f"--- {name}\n{tail}", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def recipe(options: argparse.Namespace, stage: str) -> str:
    """A stage's recipe: the shipped one, or one of `--recipes`."""
    return str(options.recipes / f"smollm2-135m-{stage}.yaml")


def make_data(options: argparse.Namespace) -> None:
    """Texts apart; nothing where they are."""
    if not (options.work / "held" / "choices.jsonl").exists():
        split_data(options.books, options.meetings, options.chats, options.manuals, options.work)


def prepare(options: argparse.Namespace) -> None:
    """Two folders a stage: `data-STAGE`, and `data-STAGE-short` of chats of at most 16K, meetings and short chats."""
    work, train = options.work, options.work / "train"
    jobs = {}
    for number, stage in enumerate(STAGES):
        length = str(settings(options, stage, "prepare")["max_length"])
        model = ["--model", options.model]
        if not (work / f"data-{stage}").exists():
            words = [
                "prepare",
                f"{train / 'books'}{BOOKS_OF[stage]}",
                "--recipe",
                recipe(options, stage),
                *model,
            ]
            jobs[f"prepare-{stage}"] = command(*words, "--out", str(work / f"data-{stage}"))
        if not (work / f"data-{stage}-short").exists():
            asked = settings(options, "short", "prepare")["synthetic"]
            chats = [
                f"{t}={max(1, round(int(n) * SHORT_OF[stage]))}"
                for t, n in (item.split("=") for item in asked)
            ]
            sources = [str(train / name) for name in ("books", "meetings.jsonl", "chats.jsonl")]
            words = [
                "prepare",
                *sources,
                "--recipe",
                recipe(options, "short"),
                *model,
                "--max-length",
                length,
            ]
            words += ["--synthetic", ",".join(chats), "--seed", str(number + 1)]
            jobs[f"prepare-{stage}-short"] = command(*words, "--out", str(work / f"data-{stage}-short"))
    run_all(options, jobs)


def settings(options: argparse.Namespace, stage: str, section: str) -> dict[str, Any]:
    """A section of a stage's recipe as it stands in the file."""
    found: dict[str, Any] = yaml.safe_load(Path(recipe(options, stage)).read_text(encoding="utf-8"))[section]
    return found


def train(options: argparse.Namespace, stage: str) -> None:
    """A stage from the run of the stage before; finished ones are left alone, broken-off ones go on."""
    work, number = options.work, STAGES.index(stage)
    if (work / f"run-{stage}" / "adapter").exists():
        return
    model = str(work / f"run-{STAGES[number - 1]}") if number else options.model
    data = [word for name in (stage, f"{stage}-short") for word in ("--data", str(work / f"data-{name}"))]
    words = [
        "train",
        "--recipe",
        recipe(options, stage),
        "--model",
        model,
        *data,
        "--out",
        str(work / f"run-{stage}"),
    ]
    run_all(options, {f"train-{stage}": command(*words)})


def last_run(options: argparse.Namespace) -> str:
    """What was trained to the greatest length, or the adapter that `unpack` left of it."""
    unpacked = options.work / "adapter"
    return str(unpacked if unpacked.is_dir() else options.work / f"run-{STAGES[-1]}")


def held_texts(options: argparse.Namespace, genre: str = "books") -> list[str]:
    """The held-out texts of a genre, in order."""
    return [str(path) for path in sorted((options.work / "held" / genre).glob("*.txt"))]


def evaluations(options: argparse.Namespace, kind: str, *, base: bool) -> dict[str, list[str]]:
    """Folder -> flags of `longlora eval` for `grid`, `tasks` or `short`."""
    ending = "-base" if base else ""
    books = held_texts(options)
    found: dict[str, list[str]] = {}
    if kind == "grid":
        words = ["--recipe", recipe(options, STAGES[-1]), "--data", *books, "--haystack", *books]
        found[f"grid{ending}"] = words
    elif kind == "tasks":
        plans = [("ruler", "ruler", options.base_ruler if base else options.ruler)]
        plans += [("unseen", options.unseen_tasks, options.base_unseen if base else options.unseen)]
        if not base:
            plans.append(("multikey", "niah_multikey_1,niah_multikey_2,niah_multikey_3", options.multi_key))
        for name, tasks, plan in plans:
            for place, (lengths, number) in enumerate(item.split("=") for item in plan):
                words = ["--tasks", tasks, "--lengths", lengths, "--depths", number, "--samples", "1"]
                found[f"{name}-{place}{ending}"] = [*words, "--haystack", *books, "--beyond"]
    else:
        for genre in GENRES:
            words = [
                "--tasks",
                "ppl",
                "--data",
                *held_texts(options, genre),
                "--window",
                options.near,
                "--stride",
                options.near,
            ]
            found[f"short-{genre}{ending}"] = [*words, "--max-tokens", "64k"]
        held = options.work / "held"
        found[f"choice{ending}"] = ["--tasks", "multiple_choice_cloze", "--data", str(held / "choices.jsonl")]
        words = ["--tasks", "qmsum", "--data", str(held / "meetings.jsonl"), "--split", "val"]
        found[f"qmsum{ending}"] = [
            *words,
            "--max-samples",
            str(options.qmsum_rows),
            "--max-new-tokens",
            "128",
        ]
    return found


def evaluate(options: argparse.Namespace, *kinds: str, base: bool) -> None:
    """What is missing of these kinds, at most `--together` at one time: reading fills a GPU, answering waits for it."""
    model = options.model if base else last_run(options)
    jobs = {
        name: command("eval", "--model", model, *words, "--out", str(options.work / name))
        for kind in kinds
        for name, words in evaluations(options, kind, base=base).items()
        if not (options.work / name).exists()
    }
    run_all(options, jobs, most=options.together)


def merge(options: argparse.Namespace) -> None:
    """The last run as one plain model folder."""
    if not (options.work / "merged").exists():
        words = ["merge", last_run(options), "--model", options.model, "--out", str(options.work / "merged")]
        run_all(options, {"merge": command(*words)})


def plain(options: argparse.Namespace) -> None:
    """One row of the grid with the merged folder and transformers alone."""
    work = options.work
    if (work / "plain.jsonl").exists():
        return
    asked = settings(options, STAGES[-1], "eval") | {"samples": options.plain_samples, "seed": 0}
    length = options.plain_length
    count = write_questions(
        work / "merged", held_texts(options), asked, length, work / "plain-questions.jsonl"
    )
    say(f"{count} questions of {length:,} tokens for transformers alone")
    words = [sys.executable, "-u", str(HERE / "plain_answers.py"), str(work / "merged")]
    words += [str(work / "plain-questions.jsonl"), str(work / "plain.jsonl"), "--dtype", options.dtype]
    run_all(options, {"plain": [*words, "--new-tokens", str(asked["max_new_tokens"])]})


def report(options: argparse.Namespace) -> None:
    """`WORK/report.html`: the grid and the curve before and after, of what is finished; anew each time."""
    work = options.work
    if (work / "grid").is_dir():
        (work / "report.html").unlink(missing_ok=True)
        compare = ["--compare", str(work / "grid-base")] if (work / "grid-base").is_dir() else []
        words = ["eval", "--report", str(work / "grid"), *compare, "--out", str(work / "report.html")]
        run_all(options, {"report": command(*words)})


def pack_adapter(options: argparse.Namespace) -> None:
    """`WORK/packed`: the adapter, whose record names the base it belongs to."""
    parts = pack([options.work / f"run-{STAGES[-1]}" / "adapter"], options.work / "packed")
    say(f"packed {len(parts)} parts of {sum(path.stat().st_size for path in parts):,} bytes")


KINDS = ("grid", "tasks", "short")
PHASES: dict[str, Callable[[argparse.Namespace], None]] = {
    "data": make_data,
    "prepare": prepare,
    "base": lambda options: evaluate(options, *KINDS, base=True),
    **{f"train-{stage}": partial(train, stage=stage) for stage in STAGES},
    "merge": merge,
    "after": lambda options: evaluate(options, *KINDS, base=False),
    "plain": plain,
    "report": report,
}
ON_REQUEST: dict[str, Callable[[argparse.Namespace], None]] = {
    "pack": pack_adapter,
    "unpack": lambda options: unpack(options.work / "packed", options.work),
    **{f"base-{kind}": lambda options, kind=kind: evaluate(options, kind, base=True) for kind in KINDS},
    **{kind: lambda options, kind=kind: evaluate(options, kind, base=False) for kind in KINDS},
}


def collect(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of all that is there."""
    work = options.work
    origin = {"machine": options.machine, "commit": options.commit, "command": COMMAND}
    rows = training_rows(work, list(STAGES), origin)
    for stack, ending in (("base", "-base"), ("longlora", "")):
        common = {"case": CASE, "stack": stack, **origin}
        if (work / f"grid{ending}").is_dir():
            rows += grid_rows(work / f"grid{ending}", common)
        for metric in ("ruler", "unseen"):
            folders = [
                f for f in sorted(work.glob(f"{metric}-[0-9]*")) if f.name.endswith("-base") == bool(ending)
            ]
            rows += task_rows([folder for folder in folders if folder.is_dir()], metric, common)
        # Three times as many questions of some tasks of RULER; theirs replace the few of `ruler`.
        folders = [f for f in work.glob("multikey-[0-9]*") if f.is_dir() and not ending]
        more = [row for row in task_rows(folders, "ruler", common) if "variant" in row]
        places = {(row["variant"], row["seq"]) for row in more}
        same = [r for r in rows if r["metric"] == "ruler" and (r.get("variant"), r["seq"]) in places]
        rows = [row for row in rows if row not in same or row["stack"] != stack] + more
        rows += short_rows(work, stack, ending, common)
    if (work / "plain.jsonl").exists() and (work / "grid").is_dir():
        rows += plain_rows(work / "plain.jsonl", work / "grid", {"case": CASE, "stack": "longlora", **origin})
    return rows


def estimate(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Seconds of one H100 of each phase by the measured figures: of reading or training, and of making and answering.

    Texts are made by processors, and answering waits for kernels to be launched: beside the reading of another process
    both cost less than that.
    """
    grid = settings(options, STAGES[-1], "eval")
    lengths = [parse_length(str(length)) for length in grid["lengths"]]
    read, answer = grid_seconds(lengths, grid["depths"], grid["samples"], 10)
    # An answer of the base has no end, and so 24 tokens.
    endless = grid_seconds(lengths, grid["depths"], grid["samples"], 24)[1]
    read += (
        3 * 1.3 * read_seconds(parse_length(str(grid["window"])))
    )  # three books, and the short context again

    def tasks(*plans: tuple[list[str], int, int]) -> tuple[float, float]:
        parts = [
            tasks_seconds(count, int(number), parse_length(length), new_tokens)
            for plan, count, new_tokens in plans
            for item in plan
            for shown, _, number in [item.partition("=")]
            for length in shown.split(",")
        ]
        return sum(part[0] for part in parts), sum(part[1] for part in parts)

    unseen = len(options.unseen_tasks.split(","))
    after = ((options.ruler, 11, 90), (options.multi_key, 3, 90), (options.unseen, unseen, 50))
    meetings = tasks_seconds(1, options.qmsum_rows, 17_000, 128)
    found = {
        "base-grid": (read, endless),
        "base-tasks": tasks((options.base_ruler, 11, 128), (options.base_unseen, unseen, 64)),
        "grid": (read, answer),
        "tasks": tasks(*after),
        "short": (10 + meetings[0], meetings[1]),
    }
    shares = {"64k": (0.36, 0.3), "128k": (0.24, 0.38), "256k": (0.21, 0.41)}  # of text, of short chats
    for stage in STAGES:
        chunk = parse_length(str(settings(options, stage, "prepare")["max_length"]))
        text, short = shares[stage]
        mean = text * step_seconds(chunk, chunk) + short * step_seconds(chunk, min(16_384, chunk - 1))
        mean += (1 - text - short) * step_seconds(chunk, chunk - 1)
        found[f"train-{stage}"] = settings(options, stage, "train")["steps"] * mean, 0.0
    return found


def show_estimate(found: dict[str, tuple[float, float]]) -> None:
    """A line a phase, and the minutes of training and of evaluation after it."""
    for name, (read, answer) in found.items():
        print(f"{name:12} {read:6.0f} s, making questions and answering {answer:4.0f} s")
    for title, names in (
        ("training", [f"train-{stage}" for stage in STAGES]),
        ("evaluation after", list(KINDS)),
    ):
        read, answer = (sum(found[name][part] for name in names) / 60 for part in (0, 1))
        print(f"{title}: {read:.1f} minutes, and {answer:.1f} of making questions and answering")


def read_options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    for name in ("books", "work", "rows"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--meetings", type=Path, required=True, help="QMSum's rows, .jsonl or .jsonl.xz")
    parser.add_argument("--chats", type=Path, required=True, help="LongChat's conversations.jsonl")
    parser.add_argument("--manuals", type=Path, default=HERE.parent / "docs", help="folder of .md files")
    parser.add_argument("--commit", required=True)
    parser.add_argument("--machine", required=True)
    parser.add_argument(
        "--only", nargs="+", choices=[*PHASES, *ON_REQUEST], help="default: all but pack, unpack"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="of this call; then it saves and ends"
    )
    parser.add_argument("--together", type=int, default=3, help="evaluations at one time")
    parser.add_argument(
        "--recipes", type=Path, default=RECIPES, help="folder of other recipes of the same names"
    )
    parser.add_argument("--estimate", action="store_true", help="print the seconds of each phase and end")
    for name, plan in (
        ("ruler", RULER),
        ("multi-key", MULTI_KEY),
        ("unseen", UNSEEN),
        ("base-ruler", BASE_RULER),
        ("base-unseen", BASE_UNSEEN),
    ):
        parser.add_argument(f"--{name}", nargs="*", default=list(plan), help="LENGTHS=QUESTIONS a task")
    parser.add_argument("--unseen-tasks", default=UNSEEN_TASKS)
    parser.add_argument("--near", default="2k", help="window of the perplexity of each genre")
    parser.add_argument("--qmsum-rows", type=int, default=64)
    parser.add_argument("--plain-length", type=int, default=65_536)
    parser.add_argument("--plain-samples", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", help="of plain transformers")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Run what is missing of the phases, then write the rows and say how they stand to the aims."""
    options = read_options(words)
    options.deadline = time.monotonic() + 60 * options.minutes
    options.work.mkdir(parents=True, exist_ok=True)
    if options.estimate:
        show_estimate(estimate(options))
        return
    try:
        for name in options.only or list(PHASES):
            with phase(name):
                (PHASES | ON_REQUEST)[name](options)
    except Stopped as stopped:
        say(str(stopped))
    rows = collect(options)
    add_rows(rows, options.rows)
    for line in aims(rows):
        say(line)
    (options.work / "phases.json").write_text(json.dumps({"rows": len(rows)}))
    say("done")


if __name__ == "__main__":
    main()
