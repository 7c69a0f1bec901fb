"""The audits of an evaluation and its control, put together and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.evaluation.audits import Audit, audit_rows, longest_read
from longlora_cli.evaluation.control import left_out
from longlora_cli.evaluation.live_checks import Live, look_at, readable_tokens
from longlora_cli.evaluation.measure import TaskResult
from longlora_cli.evaluation.plan import EvalPlan
from longlora_cli.evaluation.report.numbers import interval, percent
from longlora_cli.evaluation.report.parts import value_text
from longlora_cli.evaluation.train_overlap import TrainData, overlap_audit
from longlora_cli.models.loading import LoadedModel


def look_at_training(plan: EvalPlan, training: Sequence[TrainData], console: Console) -> list[Audit]:
    """The audit of what training data hold of what is asked; none without such data."""
    if not training:
        return []
    with console.progress("training data", sum(data.size for data in training)) as advance:
        return [overlap_audit(plan, training, advance)]


def audits_of(plan: EvalPlan, live: Live, found: Mapping[str, TaskResult]) -> list[Audit]:
    """All other audits, from the rows of all tasks and what was seen of the model."""
    rows = {task: result.rows for task, result in found.items()}
    summaries = {task: result.summary for task, result in found.items()}
    bos = plan.tokenizer.bos_token_id
    return [
        *audit_rows(rows, summaries, bos=bos, begins_with_bos=bos in safe_encoder(plan.tokenizer).begin),
        live.position_audit(longest_read(rows, summaries)),
        *live.audits,
    ]


def control_of(config: EvalConfig, found: Mapping[str, TaskResult]) -> dict[str, Any]:
    """Which control was asked for, and what has none; empty without one."""
    if config.control == "none":
        return {}
    return {"name": config.control, "left_out": left_out({task: r.summary for task, r in found.items()})}


def show_audits(audits: Sequence[dict[str, Any]], console: Console) -> None:
    """Print what is not as it should be, and how many checks there were."""
    bad = [one for one in audits if one["ok"] is False]
    if bad:
        console.table(
            "Look at this before the scores",
            ["check", "value", "note"],
            [[one["name"], value_text(one["value"]), one["note"]] for one in bad],
        )
    console.print(f"{len(audits)} audits, {len(bad)} to look at; all of them are in report.html")


def show_control(tasks: Mapping[str, dict[str, Any]], missing: Mapping[str, str], console: Console) -> None:
    """Print the scores of whole questions beside those of the same questions without their context.

    Args:
        tasks: Summaries, some with a `control`.
        missing: Why tasks have none, or not of all questions.
        console: Prints.
    """
    rows = []
    for task, summary in tasks.items():
        control = summary.get("control", {})
        if "scores" in control:
            for name, part in control["scores"].items():
                rows.append([f"{task}: {name}", *_both(summary["scores"][name], part, control["n"])])
        elif "score" in control:
            rows.append([task, *_both(summary, control, control["n"])])
    if rows:
        console.table(
            "Known or guessed: the same questions without their context, in per cent with 95 % intervals",
            ["task", "score", "without context", "n"],
            rows,
        )
    for task, why in missing.items():
        console.print(f"no control of {task}: {why}")


def _both(whole: Mapping[str, Any], bare: Mapping[str, Any], n: int) -> list[Any]:
    return [
        *(f"{percent(part['score'])} {interval(part.get('ci95'), is_share=True)}" for part in (whole, bare)),
        n,
    ]


def look(loaded: LoadedModel, plan: EvalPlan) -> Live:
    """What is seen of the model before it is asked anything."""
    config = plan.config
    return look_at(
        loaded,
        plan.past,
        rope=config.rope,
        chat_template=config.chat_template,
        rope_factor=config.rope_factor,
    )


def warn_beyond(loaded: LoadedModel, plan: EvalPlan, console: Console) -> None:
    """Say when longer texts are read than the model is made for."""
    own = readable_tokens(loaded, plan.config.rope, plan.config.rope_factor)
    readable = plan.past.readable(own, loaded.positions)
    if plan.longest > readable:
        console.warn(
            f"up to {plan.longest:,} tokens are read, the model is made for {readable:,}: "
            "positions beyond that are new to it"
        )
