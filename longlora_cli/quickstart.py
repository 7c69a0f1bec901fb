"""`python -m longlora_cli.quickstart FOLDER`: the embedded model reads eight times further, and shows it.

Prepares the embedded book, measures the model as shipped, trains, measures again. Two thirds of the book are for
training, the last third is what both measurements read. Nothing here is special: each part is one of the five
commands with the shipped recipe `quickstart.yaml`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from longlora_cli.console import Console, quiet_libraries
from longlora_cli.errors import LongLoRAError, SettingsError
from longlora_cli.options import resolve

_RECIPE = Path("quickstart.yaml")
_TRAINING_SHARE = 2 / 3


def main() -> None:
    """Run it all and print the two tables."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m longlora_cli.quickstart FOLDER\n")
        sys.exit(2)
    console = Console()
    try:
        run(Path(sys.argv[1]), console)
    except LongLoRAError as error:
        console.error(error.lines(), error.exit_code)
        sys.exit(error.exit_code)


def run(out: Path, console: Console) -> None:
    """Prepare, evaluate, train, evaluate into `out`.

    Raises:
        SettingsError: `out` has files in it.
    """
    if out.is_dir() and any(out.iterdir()):
        raise SettingsError(f"{out} is not empty", hint="Choose another folder, or remove it.")
    quiet_libraries()  # what libraries say while they are imported
    from longlora_cli.commands import eval as eval_command
    from longlora_cli.commands import prepare, train

    quiet_libraries()  # what needs them imported to be turned off
    begin = time.monotonic()
    training, held_out = _split_book(out)
    flags: dict[str, Any] = {"inputs": [str(training)], "out": out / "data"}
    prepare.run(resolve("prepare", flags, _RECIPE), console, dry_run=False)
    measure = {"data": [held_out], "haystack": [held_out]}
    flags = measure | {"model": "builtin", "out": out / "before"}
    eval_command.run(resolve("eval", flags, _RECIPE), console, dry_run=False)
    train.run(resolve("train", {"data": [out / "data"], "out": out / "run"}, _RECIPE), console, dry_run=False)
    flags = measure | {"model": str(out / "run"), "out": out / "after"}
    eval_command.run(resolve("eval", flags, _RECIPE), console, dry_run=False)
    _compare(out, console)
    console.print(f"{time.monotonic() - begin:.0f} seconds. Try: longlora chat --model {out / 'run'}")


def _split_book(out: Path) -> tuple[Path, Path]:
    """Cut the embedded book at a paragraph; returns the files of both parts."""
    from longlora_cli.models.source import BUILTIN, base_folder

    text = (base_folder(BUILTIN) / "book.txt").read_text(encoding="utf-8")
    cut = text.index("\n\n", int(len(text) * _TRAINING_SHARE))
    folder = out / "texts"
    folder.mkdir(parents=True)
    training, held_out = folder / "training.txt", folder / "held-out.txt"
    training.write_text(text[:cut], encoding="utf-8")
    held_out.write_text(text[cut:].lstrip(), encoding="utf-8")
    return training, held_out


def _compare(out: Path, console: Console) -> None:
    before, after = (
        json.loads((out / name / "results.json").read_text(encoding="utf-8")) for name in ("before", "after")
    )
    console.print()
    positions = zip(before["tasks"]["ppl"]["by_position"], after["tasks"]["ppl"]["by_position"], strict=True)
    rows = [(f"{a['from']:,}-{a['to']:,}", a["perplexity"], b["perplexity"]) for a, b in positions]
    console.table("perplexity by position in the context", ["tokens", "before", "after"], rows)
    lengths = zip(before["tasks"]["needle"]["lengths"], after["tasks"]["needle"]["lengths"], strict=True)
    shares = [(a["length"], f"{a['score']:.0%}", f"{b['score']:.0%}", a["n"]) for a, b in lengths]
    console.table("hidden facts found", ["context", "before", "after", "asked"], shares)
    console.print(f"Reports: {out / 'before' / 'report.html'} and {out / 'after' / 'report.html'}")


if __name__ == "__main__":
    main()
