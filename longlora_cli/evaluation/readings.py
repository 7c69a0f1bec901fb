"""What a plan reads and answers, task by task: the work that an estimate counts. Nothing is tokenized for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longlora_cli.evaluation.estimate import Reading
from longlora_cli.evaluation.perplexity_plan import peer_reading, reading_of
from longlora_cli.evaluation.plan import EvalPlan
from longlora_cli.evaluation.remaining import Finished
from longlora_cli.evaluation.tasks import needle, passkey, rows
from longlora_cli.evaluation.tasks.registry import TASKS
from longlora_cli.evaluation.windows import Window
from longlora_cli.task_names import is_from_files

# A question about a text that was read before it; with the template around it.
_QUESTION_TOKENS = 64


def readings(
    plan: EvalPlan, lengths: Sequence[int], finished: Finished | None = None
) -> dict[str, list[Reading]]:
    """The prompts of each task, were these its context lengths.

    Benchmarks from files count as if each prompt were as long as the model reads.

    Args:
        plan: What is to be measured.
        lengths: Of grids and synthetic tasks.
        finished: What is left out, because a killed run has it; the first ones of each task, as they are asked.
    """
    found: dict[str, list[Reading]] = {}
    if (files := plan.files) is not None:
        for opened in files.tasks:
            found[opened.name] = [Reading(files.needs[opened.name])] * files.counts[opened.name]
    for task in plan.tasks:
        if not is_from_files(task):
            found[task] = list(_of_task(plan, task, sorted(set(lengths)), finished))
    if plan.config.control == "no-context":
        for task, work in found.items():
            bare = [Reading(_QUESTION_TOKENS, 0, one.new_tokens) for one in work if one.new_tokens]
            found[task] = work + bare
    if finished is not None:
        found = {task: work[finished.questions.get(task, 0) :] for task, work in found.items()}
    return found


def _of_task(
    plan: EvalPlan, task: str, lengths: Sequence[int], finished: Finished | None
) -> Iterator[Reading]:
    if task == "ppl":
        yield from _of_texts(plan, finished)
    elif task == rows.TASK:
        for question in plan.rows:
            yield Reading(len(question.prompt), new_tokens=plan.config.max_new_tokens)
    elif task == passkey.TASK:
        for length in lengths:
            # Deepest first: the text before the next key is in the cache.
            shares = sorted(passkey.depth_shares(plan.config.depths), reverse=True)
            kept = [0, *(int(share * length) for share in shares[1:])]
            for reused in kept * plan.config.samples:
                yield Reading(length, reused, plan.grid_answer_tokens)
    elif task == needle.TASK:
        for length in lengths:
            later = max(0, length - _QUESTION_TOKENS)
            for reused in [0, *[later] * (plan.config.depths - 1)] * plan.config.samples:
                yield Reading(length, reused, plan.grid_answer_tokens)
    else:
        for length in lengths:
            new = min(TASKS[task].max_new_tokens, length // 4)
            yield from [Reading(length, 0, new)] * (plan.config.depths * plan.config.samples)


def _of_texts(plan: EvalPlan, finished: Finished | None) -> Iterator[Reading]:
    reading = reading_of(plan.config, plan.texts)
    for text in plan.texts:
        whole: list[Window] = list(reading.windows(len(text.ids)))
        windows = whole if finished is None else finished.windows_left(text, reading)
        if reading.short is not None:
            left = set(windows)
            curve = [one for one in reading.curve(whole) if one in left]
            windows = windows + [w for one in curve for w in reading.short_windows(one)]
        for peer in dict.fromkeys(plan.config.compat):
            peers = peer_reading(peer, text, plan.config)
            windows = windows + ([] if peers.known else [one.window for one in peers.windows])
        yield from (Reading(window.stop - window.start) for window in windows)
