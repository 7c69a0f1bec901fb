"""`longlora eval --make`: write the samples of synthetic tasks and nothing else; no model is loaded."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.evaluation.plan import make_plan
from longlora_cli.evaluation.sample_files import ruler_lines
from longlora_cli.models.source import resolve
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.storage import atomic_folder, refuse_existing, write_text


def run(config: EvalConfig, console: Console, *, dry_run: bool) -> dict[str, Any]:
    """Write `LENGTH/TASK/validation.jsonl` for each length and task, as RULER lays out its folders.

    Args:
        config: With `make`, tasks and lengths; the model's tokenizer and chat template decide how much fits.
        console: Where progress and the table go.
        dry_run: Make and count everything, write nothing.

    Returns:
        `{"out", "tasks": {task: {"samples", "tokens", "longest"}}}`, with `dry_run` for a dry run.
    """
    refuse_existing(config.out)
    source = resolve(config.model, config.adapter)
    own = source.adapter if source.adapter and (source.adapter / "tokenizer.json").is_file() else None
    plan = make_plan(config, load_tokenizer(own or source.base, config.chat_template))
    counts = {}
    if dry_run:
        counts = plan.counts()
    else:
        with atomic_folder(config.out, kind="samples", meta={"tasks": plan.tasks}) as staging:
            for task in plan.tasks:
                sizes = []
                for length, samples in groupby(plan.samples(task), key=lambda sample: sample.facts["length"]):
                    made = list(samples)
                    path = staging / str(length) / task / "validation.jsonl"
                    write_text(path, ruler_lines(plan.tokenizer, made))
                    sizes += [sample.facts["tokens"] for sample in made]
                counts[task] = {"samples": len(sizes), "tokens": sum(sizes), "longest": max(sizes)}
    console.table(
        "Would be written" if dry_run else f"Wrote {config.out}",
        ["task", "samples", "tokens", "longest"],
        [[task, c["samples"], c["tokens"], c["longest"]] for task, c in counts.items()],
    )
    result: dict[str, Any] = {"out": str(config.out), "tasks": counts}
    return {"dry_run": True, **result} if dry_run else result
