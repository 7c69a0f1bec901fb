"""The whole path on a real model: prepare, train, merge, eval, chat, with the shipped recipe alone.

    python benchmarks/smollm2_32k.py MODEL_DIR BOOKS_DIR WORK_DIR ROWS.jsonl --commit HASH --machine "1x H100 80GB"

MODEL_DIR is SmolLM2-135M-Instruct, BOOKS_DIR plain-text books; three are held out. Each part is one command line and
what exists in WORK_DIR is not made again, so a broken-off call goes on where it was. What does not wait for each other
runs at one time: run, merged folder and base are evaluated by a process each (a 64K context takes 1.5 GB of cache),
with their output in WORK_DIR/NAME.log. Rows for `benchmarks/results.jsonl` are written to ROWS.jsonl.

On a CPU, with a model and a recipe that suit it: `... builtin BOOKS WORK ROWS --recipe tiny.yaml --excerpt-tokens 300`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from results import add_rows

HELD_OUT = ("moby-dick", "jane-eyre", "the-wealth-of-nations")
RECIPE = "smollm2-135m-32k.yaml"
QUESTION = "What is this text about? Answer in one sentence."
COMMAND = (
    "longlora prepare BOOKS --recipe smollm2-135m-32k.yaml; longlora train --recipe smollm2-135m-32k.yaml; "
    "longlora merge RUN; longlora eval --recipe smollm2-135m-32k.yaml (benchmarks/smollm2_32k.py)"
)
# What makes two questions the same one. Keys of rows also hash the model, which differs.
SAME_QUESTION = ("length", "depth", "actual_depth", "sample", "references", "prompt_tokens")
_BEGIN = time.monotonic()


def say(text: str) -> None:
    """One line with the seconds since the start, at once."""
    print(f"[{time.monotonic() - _BEGIN:7.1f} s] {text}", flush=True)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say when a part begins and ends, and its seconds."""
    begin = time.monotonic()
    say(f"{name} ...")
    yield
    say(f"{name}: {time.monotonic() - begin:.1f} s")


def command(*words: str) -> list[str]:
    """A longlora command line for this interpreter."""
    return [sys.executable, "-u", "-m", "longlora_cli", *words]


def longlora(*words: str) -> None:
    """Run one command, its output in ours."""
    say(f"+ longlora {' '.join(words)}")
    subprocess.run(command(*words), check=True)


def together(jobs: dict[str, Sequence[str]], work: Path) -> dict[str, str]:
    """Run commands at one time, each with its messages in `work/NAME.log`; all end before a failure is raised.

    Returns:
        The standard output of each.
    """
    running = {}
    for name, words in jobs.items():
        say(f"+ longlora {' '.join(words)} &> {name}.log")
        with (work / f"{name}.out").open("w") as out, (work / f"{name}.log").open("a") as log:
            running[name] = (
                subprocess.Popen(command(*words), stdout=out, stderr=log),
                time.monotonic(),
            )
    failed = []
    while running:
        time.sleep(0.2)
        for name, (process, begin) in list(running.items()):
            if (code := process.poll()) is not None:
                say(f"{name}: {time.monotonic() - begin:.1f} s, exit {code}")
                del running[name]
                if code:
                    failed.append(name)
    for name in failed:
        for ending in ("out", "log"):
            print((work / f"{name}.{ending}").read_text(errors="replace")[-3000:], flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the same command goes on from what is finished")
    return {name: (work / f"{name}.out").read_text() for name in jobs}


def split_books(books: Path, work: Path) -> tuple[Path, list[Path]]:
    """A folder of the books to train on, and the held-out files."""
    folder = work / "books"
    folder.mkdir(parents=True, exist_ok=True)
    for path in books.glob("*.txt"):
        if path.stem not in HELD_OUT and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
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
    """How many needle answers of two evaluations are the same text, and of how many.

    Raises:
        ValueError: They were not asked the same questions in the same order.
    """
    ours, theirs = (
        [json.loads(line) for line in (folder / "samples" / "needle.jsonl").open(encoding="utf-8")]
        for folder in (first, second)
    )
    asked = [[[row[name] for name in SAME_QUESTION] for row in rows] for rows in (ours, theirs)]
    if asked[0] != asked[1]:
        place = next(
            (n for n, (a, b) in enumerate(zip(*asked, strict=False)) if a != b), min(map(len, asked))
        )
        raise ValueError(
            f"{first} and {second} differ from question {place} on: {len(ours)} and {len(theirs)}"
        )
    return sum(a["prediction"] == b["prediction"] for a, b in zip(ours, theirs, strict=True)), len(ours)


def training_rows(run: Path, origin: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed, memory and time of the training."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    steps = [line for line in lines if "tokens_per_second" in line]
    warm = steps[5:] or steps  # the first steps compile and allocate
    tokens = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["train"]["max_length"]
    common = {"case": "smollm2-32k", "stack": "longlora", "seq": tokens, **origin}
    seconds = sum(line["seconds"] for line in steps)
    middle = sorted(line["tokens_per_second"] for line in warm)[len(warm) // 2]
    return [
        common | {"metric": "tok_s", "value": middle, "unit": "tokens/s"},
        common | {"metric": "train_seconds", "value": round(seconds, 1), "unit": "s"},
        common | {"metric": "peak_gib", "value": max(s.get("peak_gpu_gib", 0) for s in warm), "unit": "GiB"},
    ]


def write_excerpt(book: Path, tokenizer_folder: Path, tokens: int, path: Path) -> None:
    """The first `tokens` tokens of a book's first chapter, up to the end of a sentence."""
    from longlora_cli.models.tokenizer import load_tokenizer

    text = book.read_text(encoding="utf-8")
    begin = max(
        text.rfind("CHAPTER 1. "), text.rfind("CHAPTER I\n"), 0
    )  # the last one: a contents page has it too
    text = text[begin : begin + 10 * tokens]
    offsets = (
        load_tokenizer(tokenizer_folder).backend_tokenizer.encode(text, add_special_tokens=False).offsets
    )
    text = text[: offsets[min(tokens, len(offsets)) - 1][1]]
    end = max(text.rfind(". "), text.rfind(".\n")) + 1
    path.write_text(text[:end] if end else text, encoding="utf-8")


def evaluate(options: argparse.Namespace, held: list[str]) -> None:
    """Run, merged folder and base, those that are missing at one time."""
    work = options.work
    ask = ["eval", "--recipe", options.recipe, "--data", *held, "--haystack", *held]
    sources = {"longlora": [str(work / "run")], "longlora-merged": [str(work / "merged")]}
    if not options.skip_base:
        sources["base"] = [options.model, "--samples", "6"]
    jobs = {
        name: [*ask, "--out", str(work / name), "--model", *more]
        for name, more in sources.items()
        if not (work / name).exists()
    }
    with phase(f"eval of {', '.join(jobs) or 'nothing more'}"):
        together(jobs, work)


def chat(options: argparse.Namespace, book: Path) -> None:
    """Ask run and merged folder about an excerpt; their JSON goes to chat.json and chat-merged.json."""
    work = options.work
    excerpt = work / "excerpt.txt"
    if not excerpt.exists():
        write_excerpt(book, work / "run" / "adapter", options.excerpt_tokens, excerpt)
    ask = ["chat", "--file", str(excerpt), "-p", QUESTION, "--max-new-tokens", "64", "--json", "--model"]
    places = {"chat": work / "run", "chat-merged": work / "merged"}
    jobs = {n: [*ask, str(model)] for n, model in places.items() if not (work / f"{n}.json").exists()}
    with phase("chat"):
        for name, out in together(jobs, work).items():
            (work / f"{name}.json").write_text(out, encoding="utf-8")
    texts = [json.loads((work / f"{name}.json").read_text(encoding="utf-8"))["text"] for name in places]
    say(
        f"chat: {texts[0]!r}; the merged folder says {'the same' if texts[0] == texts[1] else repr(texts[1])}"
    )


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
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--skip-base", action="store_true", help="the base was measured before")
    parser.add_argument("--excerpt-tokens", type=int, default=12_000, help="of the text that chat reads")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then write the rows."""
    options = read_options()
    work, recipe, model = options.work, options.recipe, options.model
    texts, held_out = split_books(options.books, work)
    data, run, merged = work / "data", work / "run", work / "merged"
    origin = {"machine": options.machine, "commit": options.commit, "command": COMMAND}
    if not data.exists():
        with phase("prepare"):
            longlora("prepare", str(texts), "--recipe", recipe, "--model", model, "--out", str(data))
    if not (run / "adapter").exists():
        with phase("train"):
            longlora("train", "--recipe", recipe, "--model", model, "--data", str(data), "--out", str(run))
    rows = training_rows(run, origin)
    add_rows(rows, options.rows)  # those that stay the same are replaced
    if not merged.exists():
        with phase("merge"):
            longlora("merge", str(run), "--out", str(merged))
    evaluate(options, [str(path) for path in held_out])
    rows += rows_of(work / "longlora", "longlora", origin)
    rows += rows_of(work / "longlora-merged", "longlora", origin, variant="merged")
    if (work / "base").exists():
        rows += rows_of(work / "base", "base", origin)
    same, total = same_answers(work / "longlora", work / "longlora-merged")
    common = {"case": "smollm2-32k", "stack": "longlora", "variant": "merged", "seq": None, **origin}
    share = {"metric": "same_answers", "value": round(same / total, 4), "unit": "share", "n": total}
    rows.append(common | share)
    add_rows(rows, options.rows)
    for row in rows:
        if row["metric"] in ("needle", "same_answers", "train_seconds"):
            say(f"{row['stack']} {row.get('variant', '')} {row['metric']} {row['seq']}: {row['value']}")
    chat(options, held_out[0])
    say("done")


if __name__ == "__main__":
    main()
