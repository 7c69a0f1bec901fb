"""`longlora eval`: read and check the input, load the model, measure, write one folder, show the numbers."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from longlora_cli import __version__
from longlora_cli.beacon.loading import load_model
from longlora_cli.commands import eval_compare
from longlora_cli.commands.eval_audits import (
    audits_of,
    control_of,
    look,
    look_at_training,
    show_audits,
    show_control,
    warn_beyond,
)
from longlora_cli.commands.eval_files import show_benchmarks
from longlora_cli.commands.eval_pace import paced
from longlora_cli.commands.eval_shards import processes, show_share
from longlora_cli.commands.eval_tasks import show_effective_length, show_tasks
from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.errors import Interrupted
from longlora_cli.evaluation.answerer import SessionAnswerer, choose_batching
from longlora_cli.evaluation.batching import Batching
from longlora_cli.evaluation.file_scores import score_benchmark
from longlora_cli.evaluation.inputs import input_hashes
from longlora_cli.evaluation.journal import Journal, open_journal
from longlora_cli.evaluation.measure import (
    TaskResult,
    measure_generation,
    measure_grid,
    model_identity,
    peak_bytes,
)
from longlora_cli.evaluation.measure_files import measure_file_task
from longlora_cli.evaluation.measure_perplexity import measure_perplexity
from longlora_cli.evaluation.measure_tasks import measure_task
from longlora_cli.evaluation.perplexity_plan import work_tokens
from longlora_cli.evaluation.plan import EvalPlan, make_plan
from longlora_cli.evaluation.report.page import make_page
from longlora_cli.evaluation.report.png import save_heatmap, save_position_curve
from longlora_cli.evaluation.sharding import Shard
from longlora_cli.evaluation.task_scores import score_groups
from longlora_cli.evaluation.tasks.files.registry import FAMILIES
from longlora_cli.evaluation.train_overlap import open_train_data
from longlora_cli.models.loading import LoadedModel
from longlora_cli.models.source import resolve
from longlora_cli.models.tokenizer import load_tokenizer, was_trained_otherwise
from longlora_cli.parallel.mesh import Mesh
from longlora_cli.storage import atomic_folder, refuse_existing, write_json, write_text
from longlora_cli.task_names import expand, is_from_files


def run(config: EvalConfig, console: Console, *, dry_run: bool) -> dict[str, Any]:
    """Measure a model.

    Args:
        config: The settings.
        console: Where progress and tables go.
        dry_run: Load the tokenizer only, check and count; write nothing.

    Returns:
        The content of `results.json`, with `out` and with `comparison` where there is one; for a dry run the counts of
        each task.
    """
    if config.only_compares:
        return eval_compare.run(config, console, dry_run=dry_run)
    with processes(config) as (mesh, shard):
        return _run(config, console, mesh, shard, dry_run=dry_run)


def _run(
    config: EvalConfig, console: Console, mesh: Mesh, shard: Shard | None, *, dry_run: bool
) -> dict[str, Any]:
    refuse_existing(config.out)
    other = eval_compare.read_other(config)
    plan = make_plan(config, _load_tokenizer(config, console))
    training = open_train_data(config.train_data, plan.tokenizer)
    if dry_run:
        return _show_counts(plan, console)
    whole = mesh.is_main and config.shard is None
    overlap = look_at_training(plan, training, console) if whole else []
    loaded = load_model(config, config, adapter=config.adapter, context_length=plan.longest)
    warn_beyond(loaded, plan, console)
    batching = choose_batching(config.batch_size, loaded, plan.past)
    live = look(loaded, plan)
    started = time.perf_counter()
    identity = model_identity(loaded) | plan.past.to_json()
    plan, dropped = paced(loaded, plan, mesh, console, identity)
    try:
        if shard is not None:
            counts = _answer_share(loaded, plan, shard, identity, batching, console)
            mesh.barrier()
            if mesh.world == 1:
                return show_share(config, shard, counts, console)
            if not mesh.is_main:
                return {}
        with open_journal(config.out) as journal:
            if len(journal):
                console.print(f"going on from {len(journal)} finished samples")
            found = _in_order(config, _measure(loaded, plan, journal, identity, batching, console))
            results: dict[str, Any] = {
                "settings": config.model_dump(mode="json"),
                "model": {"name": config.model, **identity},
                "inputs": input_hashes(plan),
                "versions": _versions(),
                "tasks": {task: result.summary for task, result in found.items()},
                "groups": score_groups(
                    config.tasks,
                    {task: result.summary for task, result in found.items()},
                    threshold=config.effective_score / 100,
                ),
                "benchmarks": _benchmarks(plan, found),
                **({"dropped_lengths": dropped} if dropped else {}),
                "audits": [*audits_of(plan, live, found), *overlap],
                "control": control_of(config, found),
                "peak_bytes": peak_bytes(loaded),
                "seconds": round(time.perf_counter() - started, 3),
            }
            _commit(config, results, found)
    except KeyboardInterrupt as error:
        raise Interrupted(
            "interrupted", rule="Finished samples are kept.", hint="The same command goes on from there."
        ) from error
    _show(results, plan, console)
    compared = {} if other is None else {"comparison": eval_compare.compare(config.out, other, console)}
    return {**results, "out": str(config.out), **compared}


def _show(results: dict[str, Any], plan: EvalPlan, console: Console) -> None:
    config = plan.config
    for task, summary in results["tasks"].items():
        if task in _SHOW:
            _SHOW[task](summary, console)
    synthetic = {task: results["tasks"][task] for task in plan.synthetic}
    show_tasks(synthetic, results["groups"], console)
    show_benchmarks(results["benchmarks"], results["tasks"], console)
    means = {f"{name} (mean)": m for name, m in {**results["groups"], **results["benchmarks"]}.items()}
    show_control({**results["tasks"], **means}, results["control"].get("left_out", {}), console)
    show_audits(results["audits"], console)
    console.print(
        f"wrote {config.out} ({results['seconds']:.1f} s, peak {results['peak_bytes'] / 2**20:,.0f} MiB); "
        f"open {config.out / 'report.html'} in a browser"
    )


def _load_tokenizer(config: EvalConfig, console: Console) -> Any:
    source = resolve(config.model, config.adapter)
    own = source.adapter if source.adapter and (source.adapter / "tokenizer.json").is_file() else None
    tokenizer = load_tokenizer(own or source.base, config.chat_template)
    if was_trained_otherwise(source.adapter, tokenizer):
        console.warn(f"{config.model} was trained with another chat template than {config.chat_template}")
    return tokenizer


def _show_counts(plan: EvalPlan, console: Console) -> dict[str, Any]:
    counts = plan.counts()
    console.table(
        "Would be evaluated",
        ["task", "samples", "tokens", "longest"],
        [[task, c["samples"], c["tokens"], c["longest"]] for task, c in counts.items()],
    )
    return {"dry_run": True, "out": str(plan.config.out), "tasks": counts}


def _answer_share(
    loaded: LoadedModel,
    plan: EvalPlan,
    shard: Shard,
    identity: Any,
    batching: Batching | None,
    console: Console,
) -> dict[str, int]:
    """Answer a share's questions; how many, by task."""
    with open_journal(plan.config.out, shard) as journal:
        found = _measure(loaded, plan, journal, identity, batching, console)
    return {task: result.summary["n"] for task, result in found.items()}


def _measure(
    loaded: LoadedModel,
    plan: EvalPlan,
    journal: Journal,
    identity: Any,
    batching: Batching | None,
    console: Console,
) -> dict[str, TaskResult]:
    answerer = SessionAnswerer(
        loaded, prefill_chunk=plan.config.prefill_chunk, past=plan.past, batching=batching
    )
    found: dict[str, TaskResult] = {}
    shares = journal.shard.count if journal.shard is not None else 1

    def bar(title: str, total: int) -> Any:
        return console.progress(title, -(-total // shares))

    if plan.files is not None:
        for opened in plan.files.tasks:
            with bar(f"{opened.name} (questions)", plan.files.counts[opened.name]) as advance:
                found[opened.name] = measure_file_task(
                    opened,
                    answerer,
                    plan.files,
                    journal,
                    identity,
                    advance,
                    control=plan.config.control,
                )
    for task in plan.tasks:
        if is_from_files(task):
            continue
        if task in plan.synthetic:
            with bar(f"{task} (questions)", plan.grid_count()) as advance:
                found[task] = measure_task(task, answerer, plan, journal, identity, advance)
        elif task == "ppl":
            with bar("ppl (tokens)", work_tokens(plan.config, plan.texts)) as advance:
                found[task] = measure_perplexity(loaded, plan, journal, identity, advance)
        elif task == "generate":
            with bar("generate (rows)", len(plan.rows)) as advance:
                found[task] = measure_generation(answerer, plan, journal, identity, advance)
        else:
            with bar(f"{task} (questions)", plan.grid_count()) as advance:
                found[task] = measure_grid(task, answerer, plan, journal, identity, advance)
    return found


def _benchmarks(plan: EvalPlan, found: dict[str, TaskResult]) -> dict[str, Any]:
    """The means of each benchmark that was read from files, over its tasks."""
    tasks: dict[str, dict[str, Any]] = {}
    for opened in plan.files.tasks if plan.files is not None else ():
        tasks.setdefault(opened.family.name, {})[opened.task] = found[opened.name].summary
    return {name: score_benchmark(FAMILIES[name], summaries) for name, summaries in tasks.items()}


def _versions() -> dict[str, str]:
    return {
        "longlora": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "rouge-score")},
    }


def _commit(config: EvalConfig, results: dict[str, Any], found: dict[str, TaskResult]) -> None:
    meta = {"model": config.model, "tasks": list(found)}
    with atomic_folder(config.out, kind="evaluation", meta=meta) as staging:
        # Tasks stay in the order that was asked for, also for a report that is made anew.
        write_json(staging / "results.json", results, sort_keys=False)
        for task, result in found.items():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows]
            write_text(staging / "samples" / f"{task}.jsonl", "".join(lines))
            _save_plot(staging, task, result.summary, Path(config.model).name)
            if result.nll:
                np.save(staging / "nll.npy", np.concatenate(result.nll))
                offsets = np.cumsum([0, *map(len, result.nll)], dtype=np.int64)
                np.save(staging / "nll_offsets.npy", offsets)
        page, _ = make_page(results, {task: result.rows for task, result in found.items()})
        write_text(staging / "report.html", page)


def _in_order(config: EvalConfig, found: dict[str, TaskResult]) -> dict[str, TaskResult]:
    """Tasks as they were asked for; benchmarks are measured before the others."""
    place = {name: number for number, name in enumerate(expand(config.tasks))}
    order = sorted(found, key=lambda task: place.get(task, place.get(task.partition(".")[0], len(place))))
    return {task: found[task] for task in order}


def _save_plot(staging: Path, task: str, summary: dict[str, Any], model: str) -> None:
    if task == "ppl":
        save_position_curve(staging / "plots" / "ppl.png", summary, title=f"perplexity by position, {model}")
    elif "cells" in summary:
        save_heatmap(staging / "plots" / f"{task}.png", summary, title=f"{task}, {model}")


def _show_perplexity(summary: dict[str, Any], console: Console) -> None:
    short = summary.get("short_context")
    console.table(
        f"Perplexity by tokens of context ({summary['curve_windows']} {summary['curve_source']})",
        ["context", "tokens", "perplexity", "95 %"] + ([f"at {short:,}", "gain", "95 %"] if short else []),
        [
            [f"{b['from']:,} to {b['to']:,}", b["n"], b["perplexity"], _interval(b["ci95"], "{:.4g}")]
            + (
                [b["short_perplexity"], f"{b['gain']:.4f}", _interval(b["gain_ci95"], "{:.4f}")]
                if short
                else []
            )
            for b in summary["by_position"]
        ],
    )
    if short:
        _show_gain(summary["gain"], short, console)
    if "compat" in summary:
        _show_peers(summary, console)
    interval = _interval(summary["ci95"], "{:.4g}")
    console.print(
        f"perplexity {_number(summary['perplexity'])}{interval and ' ' + interval}, n={summary['n']:,} tokens, "
        f"{summary['texts']} texts; mean of texts {_number(summary['perplexity_macro'])}; per word "
        f"{_number(summary['word_perplexity'])}; {summary['bits_per_byte']:.4f} bits per byte"
    )


def _show_gain(gain: dict[str, Any], short: int, console: Console) -> None:
    parts = [("all", gain), (f"with {short:,} tokens of context and more", gain["beyond"])]
    for name, part in parts:
        if part["gain"] is not None:
            interval = _interval(part["gain_ci95"], "{:.4f}")
            console.print(f"gain of tokens {name}: {part['gain']:.4f} nats {interval}, n={part['n']:,}")


def _show_peers(summary: dict[str, Any], console: Console) -> None:
    rows = [("exact", summary), *summary["compat"].items()]
    console.table(
        "Perplexity by other programs' rules, for comparison with their numbers",
        ["rule", "perplexity", "per word", "per byte", "bits per byte", "losses"],
        [
            [
                name,
                *(
                    _number(found[key]) if key in found else ""
                    for key in ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
                ),
                found["n"],
            ]
            for name, found in rows
        ],
    )


def _number(value: float | None) -> str:
    return "above 1e307" if value is None else f"{value:.4g}"


def _show_grid(summary: dict[str, Any], console: Console) -> None:
    lengths = summary["lengths"]
    shares = {(c["depth"], c["length"]): f"{100 * c['score']:.0f}" for c in summary["cells"]}
    rows = [
        [f"{100 * depth:.0f} %", *(shares[depth, length["length"]] for length in lengths)]
        for depth in sorted({depth for depth, _ in shares})
    ]
    rows.append(["all", *(f"{100 * length['score']:.0f}" for length in lengths)])
    rows.append(["95 %", *(_interval([100 * v for v in length["ci95"]], "{:.0f}") for length in lengths)])
    console.table(
        f"Right answers in per cent, n={summary['cells'][0]['n']} a cell",
        ["depth", *(f"{length['length']:,}" for length in lengths)],
        rows,
    )
    console.print(
        f"{100 * summary['score']:.0f} % right {_interval([100 * v for v in summary['ci95']], '{:.0f}')}, "
        f"{100 * summary['contains']:.0f} % contain the answer, n={summary['n']} in {summary['samples']} texts"
    )
    show_effective_length(summary, console)


def _show_generation(summary: dict[str, Any], console: Console) -> None:
    console.table(
        f"Generation over {summary['n']} rows",
        ["metric", "mean", "95 %"],
        [[key, f"{s['score']:.4f}", _interval(s["ci95"], "{:.4f}")] for key, s in summary["scores"].items()],
    )
    console.print(f"{100 * summary['cut']:.0f} % of the answers ended at --max-new-tokens")


def _interval(interval: list[float] | None, form: str) -> str:
    return "" if interval is None else f"[{form.format(interval[0])}, {form.format(interval[1])}]"


_SHOW = {
    "ppl": _show_perplexity,
    "passkey": _show_grid,
    "needle": _show_grid,
    "generate": _show_generation,
}
