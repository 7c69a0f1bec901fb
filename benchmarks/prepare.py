"""How fast are books prepared? The whole of `longlora prepare` beside its tokenizer alone and `datasets.map`.

    python benchmarks/prepare.py BOOKS --model FOLDER --rounds 3
    python benchmarks/prepare.py BOOKS --model FOLDER --megabytes 100      # and one file of this size

Three stacks take turns, each in a process of its own, so that what else the machine does falls on all of them:

- `longlora`: `prepare` from the first look at the inputs to the folder on disk, with reading, cutting, packing,
  checksums and loading the tokenizer; once with the books as they are and once as one file;
- `longlora-command`: the same as a user types it, from the start of Python to its end, with all imports;
- `tokenizers-raw`: `encode_batch_fast` of the model's own tokenizer as it is loaded, on the same pieces in memory,
  nothing done with the result;
- `datasets-map`: `datasets.map` over the same pieces, batched, returning Python lists, with as many processes.

But for `longlora-command`, what is imported or is warmed up only once is left out. A figure is the median over the
rounds. CPU seconds are printed beside the others: on a machine with other work they are the steadier measure.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from results import add_rows

CASE = "prepare-books"
GIB = 1 << 30
MAX_LENGTH = 32_768
FILES, ONE_FILE = "files", "one file"
# Pieces of one raw call: 8M characters, whose tokens take about 0.4 GiB.
_RAW_PIECES = 256


def say(text: str) -> None:
    """A line at once, also into a file."""
    print(text, flush=True)


def usage(processes: int) -> tuple[float, int]:
    """CPU seconds of this process and its children, and the peak of their memory in bytes.

    Of several children only the largest one's peak is known; it stands for each of `processes`.
    """
    mine, theirs = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = mine.ru_utime + mine.ru_stime + theirs.ru_utime + theirs.ru_stime
    return cpu, (mine.ru_maxrss + processes * theirs.ru_maxrss) * 1024


def timed(work: Callable[[], int], *, processes: int = 2) -> dict[str, float]:
    """What `work` takes, which returns its tokens and has so many children at once."""
    cpu, started = usage(processes)[0], time.perf_counter()
    tokens = work()
    seconds = time.perf_counter() - started
    cpu_after, peak_bytes = usage(processes)
    return {"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu_after - cpu, "peak_bytes": peak_bytes}


def run_longlora(inputs: Path, model: str, folder: Path) -> dict[str, float]:
    """The whole of prepare."""
    from longlora_cli.commands import prepare
    from longlora_cli.config import PrepareConfig
    from longlora_cli.console import Console

    def work(source: Path, out: str) -> int:
        config = PrepareConfig(inputs=[str(source)], out=folder / out, model=model, max_length=MAX_LENGTH)
        summary = prepare.run(config, Console(json_mode=True), dry_run=False)
        return int(summary["tokens_read"])

    (folder / "warm.txt").write_text("A first text imports what is imported when it is needed.")
    work(folder / "warm.txt", "warm")
    return timed(lambda: work(inputs, "data"))


def run_command(inputs: Path, model: str, folder: Path) -> dict[str, float]:
    """`longlora prepare` as it is typed."""
    out, length = str(folder / "data"), str(MAX_LENGTH)
    words = ["prepare", str(inputs), "--model", model, "--max-length", length, "--out", out, "--json"]

    def work() -> int:
        done = subprocess.run(
            [sys.executable, "-m", "longlora_cli", *words], check=True, capture_output=True, text=True
        )
        return int(json.loads(done.stdout)["tokens_read"])

    return timed(work, processes=1)


def pieces_of(inputs: Path, model: str) -> tuple[Any, Any, list[str]]:
    """The tokenizer, its encoder, and the pieces that prepare makes of the texts."""
    from longlora_cli.data import tokenizing
    from longlora_cli.data.documents import find_sources, read_documents
    from longlora_cli.data.encoding import safe_encoder
    from longlora_cli.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    encoder = safe_encoder(tokenizer)
    documents = read_documents(find_sources([str(inputs)], split="train"), seed=0)
    return tokenizer, encoder, list(tokenizing.pieces_of(encoder, documents))


def run_raw(inputs: Path, model: str, folder: Path) -> dict[str, float]:
    """The tokenizer alone."""
    tokenizer, _, pieces = pieces_of(inputs, model)
    backend = tokenizer.backend_tokenizer
    backend.encode_batch_fast(["A first text."], add_special_tokens=False)

    def work() -> int:
        tokens = 0
        for start in range(0, len(pieces), _RAW_PIECES):
            some = pieces[start : start + _RAW_PIECES]
            tokens += sum(map(len, backend.encode_batch_fast(some, add_special_tokens=False)))
        return tokens

    return timed(work)


def run_map(inputs: Path, model: str, folder: Path) -> dict[str, float]:
    """What most training scripts do."""
    import datasets

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer, _, pieces = pieces_of(inputs, model)
    texts = datasets.Dataset.from_dict({"text": pieces})

    def work() -> int:
        mapped = texts.map(
            lambda rows: {"input_ids": tokenizer(rows["text"], add_special_tokens=False)["input_ids"]},
            batched=True,
            batch_size=_RAW_PIECES,
            num_proc=2,
            remove_columns=["text"],
        )
        columns = [chunk.values for chunk in mapped.data.column("input_ids").chunks]
        return sum(len(values) for values in columns)

    return timed(work)


STACKS: dict[str, Callable[[Path, str, Path], dict[str, float]]] = {
    "tokenizers-raw": run_raw,
    "longlora": run_longlora,
    "longlora-command": run_command,
    "datasets-map": run_map,
}


def one_file(books: Path, target: Path, megabytes: int = 0) -> Path:
    """All books as one text, or again and again up to a size."""
    texts = [path.read_bytes() for path in sorted(books.glob("*.txt"))]
    if not texts:
        raise SystemExit(f"{books} holds no .txt file")
    with target.open("wb") as file:
        while True:
            for text in texts:
                file.write(text + b"\n\n")
                if megabytes and file.tell() >= megabytes * 1_000_000:
                    return target
            if not megabytes:
                return target


def cases(options: argparse.Namespace, folder: Path) -> list[tuple[str, str, Path]]:
    """Stack, variant and input of every measurement of a round."""
    single = one_file(options.books, folder / "one.txt")
    found = [
        ("tokenizers-raw", FILES, options.books),
        ("longlora", FILES, options.books),
        ("longlora", ONE_FILE, single),
        ("longlora-command", FILES, options.books),
        ("datasets-map", FILES, options.books),
    ]
    if options.megabytes:
        large = one_file(options.books, folder / "large.txt", options.megabytes)
        found.append(("longlora", f"one file of {options.megabytes} MB", large))
    return found


def in_a_process(stack: str, inputs: Path, model: str) -> dict[str, float]:
    """One measurement; two threads or processes."""
    words = [sys.executable, __file__, str(inputs), "--model", model, "--one", stack]
    environment = os.environ | {"RAYON_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{stack} failed:\n{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(options: argparse.Namespace, folder: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Medians of every case over the rounds, which are interleaved."""
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for stack, variant, inputs in cases(options, folder):
            figures = in_a_process(stack, inputs, options.model)
            runs.setdefault((stack, variant), []).append(figures)
            say(f"round {number + 1}  {_line(stack, variant, figures)}")
    return {
        case: {name: statistics.median(run[name] for run in found) for name in found[0]}
        for case, found in runs.items()
    }


def _line(stack: str, variant: str, figures: dict[str, float]) -> str:
    speed = figures["tokens"] / figures["seconds"]
    return (
        f"{stack:16} {variant:20} {figures['tokens']:>12,.0f} tokens {figures['seconds']:8.2f} s "
        f"{speed:>10,.0f} tokens/s {figures['cpu_seconds']:8.2f} CPU s {figures['peak_bytes'] / GIB:6.2f} GiB"
    )


def ratios(found: dict[tuple[str, str], dict[str, float]]) -> Iterator[tuple[str, float, float]]:
    """Name, ratio of speeds, and ratio of tokens by CPU time."""
    pairs = {
        "longlora / tokenizers-raw": (("longlora", FILES), ("tokenizers-raw", FILES)),
        "longlora-command / tokenizers-raw": (("longlora-command", FILES), ("tokenizers-raw", FILES)),
        "longlora / datasets-map": (("longlora", FILES), ("datasets-map", FILES)),
        "one file / files": (("longlora", ONE_FILE), ("longlora", FILES)),
    }
    for name, (ours, theirs) in pairs.items():
        a, b = found[ours], found[theirs]
        by_cpu = a["tokens"] / a["cpu_seconds"] / (b["tokens"] / b["cpu_seconds"])
        yield name, a["tokens"] / a["seconds"] / (b["tokens"] / b["seconds"]), by_cpu


def rows_of(
    options: argparse.Namespace, found: dict[tuple[str, str], dict[str, float]]
) -> list[dict[str, Any]]:
    """Rows of `results.jsonl`."""
    origin = {"machine": options.machine, "commit": options.commit, "command": own_command()}
    note = "Median of interleaved rounds; datasets-map: memory of the parent and twice its largest worker's."
    rows = []
    for (stack, variant), figures in found.items():
        common = {
            "case": CASE,
            "stack": stack,
            "variant": variant,
            "seq": None,
            "n": options.rounds,
            **origin,
        }
        for metric, value, unit in (
            ("tok_s", round(figures["tokens"] / figures["seconds"]), "tokens/s"),
            ("seconds", round(figures["seconds"], 2), "s"),
            ("peak_host_gib", round(figures["peak_bytes"] / GIB, 2), "GiB"),
        ):
            rows.append(common | {"metric": metric, "value": value, "unit": unit, "note": note})
    return rows


def own_command() -> str:
    """This command line without the names of one machine's files."""
    words = sys.argv[1:]
    for flag in ("--rows", "--commit", "--machine", "--model"):
        if flag in words:
            place = words.index(flag)
            del words[place : place + 2]
    return shlex.join(["python", "benchmarks/prepare.py", "BOOKS", "--model", "FOLDER", *words[1:]])


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("books", type=Path, help="a folder of .txt files")
    add("--model", default="builtin", help="whose tokenizer")
    add("--rounds", type=int, default=3)
    add("--megabytes", type=int, default=0, help="also one file of this size")
    add("--one", choices=tuple(STACKS), help=argparse.SUPPRESS)
    add("--rows", type=Path)
    add("--commit", default="")
    add("--machine", default="")
    options = parser.parse_args(words)
    if options.rows and not (options.commit and options.machine):
        parser.error("--rows needs --commit and --machine")
    return options


def main(words: list[str] | None = None) -> None:
    """Measure in turns, print, write."""
    options = parse(words)
    folder = Path(tempfile.mkdtemp(prefix="prepare-"))
    try:
        if options.one:
            say(json.dumps(STACKS[options.one](options.books, options.model, folder)))
            return
        found = measure(options, folder)
    finally:
        shutil.rmtree(folder)
    for (stack, variant), figures in found.items():
        say(f"median   {_line(stack, variant, figures)}")
    for name, ratio, by_cpu in ratios(found):
        say(f"{name:34} {ratio:5.2f} by time, {by_cpu:5.2f} by CPU time")
    if options.rows:
        add_rows(rows_of(options, found), options.rows)


if __name__ == "__main__":
    main()
