"""Questions of file-based tasks that fit into the model, with counts of what did not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from longlora_cli.config import EvalConfig
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.errors import DataError
from longlora_cli.evaluation.generation import Question
from longlora_cli.evaluation.scorers import UnscorableError, find_scorer
from longlora_cli.evaluation.tasks.files.cutting import Fitted, Limits, fit, needed_tokens
from longlora_cli.evaluation.tasks.files.opening import FileTask, open_tasks
from longlora_cli.evaluation.tasks.prompts import bare_of, follow_up_of
from longlora_cli.evaluation.tasks.sample import Sample

_SOMETHING = "x"  # not empty: rules give an empty answer its 0 before they look at the reference


@dataclass
class CutCounts:
    """What a task's prompts lost.

    Args:
        samples: That the files have.
        skipped: Too long, so not asked.
        truncated: Asked with less text.
        lost_tokens: Of all the truncated ones.
    """

    samples: int = 0
    skipped: int = 0
    truncated: int = 0
    lost_tokens: int = 0


@dataclass(frozen=True)
class FilePlan:
    """The file-based tasks of an evaluation.

    Args:
        tasks: What is asked.
        tokenizer: Of the model to be measured.
        limits: How much it reads.
        max_new_tokens: No answer may be longer; None: as each task has it.
        counts: Samples of each task, by its name; filled by `check`.
        needs: Most tokens that each task may read, its answer included; filled by `check`.
    """

    tasks: tuple[FileTask, ...]
    tokenizer: Any
    limits: Limits
    max_new_tokens: int | None
    counts: dict[str, int] = field(default_factory=dict)
    needs: dict[str, int] = field(default_factory=dict)

    def samples(self, task: FileTask) -> Iterator[Sample]:
        """A task's samples before anything is cut."""
        encoder = safe_encoder(self.tokenizer)
        for sample in task.samples():
            if task.family.is_choice:
                choices = encoder.encode_batch([f" {choice}" for choice in sample.extra["choices"]])
                yield replace(sample, max_new_tokens=max(map(len, choices)))
            elif self.max_new_tokens is not None and sample.max_new_tokens > self.max_new_tokens:
                then = sample.then and replace(
                    sample.then, max_new_tokens=min(sample.then.max_new_tokens, self.max_new_tokens)
                )
                yield replace(sample, max_new_tokens=self.max_new_tokens, then=then)
            else:
                yield sample

    def fitted(self, task: FileTask, counts: CutCounts) -> Iterator[Fitted]:
        """The samples that are asked; `counts` grows as they come."""
        for sample in self.samples(task):
            found = fit(self.tokenizer, sample, self.limits)
            counts.samples += 1
            if found is None:
                counts.skipped += 1
                continue
            counts.truncated += found.lost_tokens > 0
            counts.lost_tokens += found.lost_tokens
            bare = bare_of(sample)
            yield replace(found, bare=None if bare is None else fit(self.tokenizer, bare, self.limits))

    def questions(self, task: FileTask, counts: CutCounts) -> Iterator[Question]:
        """The same as questions; their rows tell what was cut (`n_truncated`, in tokens, and `truncation`)."""
        for found in self.fitted(task, counts):
            yield question_of(self.tokenizer, found, self.limits)

    @property
    def longest(self) -> int:
        """Most tokens that may be read, answers included."""
        return max(self.needs.values())

    def check(self) -> None:
        """Read and judge every row, and where nothing may be cut measure its length: no fault waits for an answer.

        Raises:
            DataError: A row cannot be used or judged, or is too long; a task has nothing to ask.
            SettingsError: An answer leaves no room for its question; a scorer's package is not installed.
        """
        for task in self.tasks:
            number = 0
            for number, sample in enumerate(self.samples(task), start=1):
                _judge_something(task, sample)
                if number == 1 or self.limits.truncate == "error" or len(sample.messages) > 1:
                    fit(self.tokenizer, sample, self.limits)
                if number == 1:
                    self.needs[task.name] = needed_tokens(self.tokenizer, sample, self.limits)
            if not number:
                raise _nothing_to_ask(task)
            self.counts[task.name] = number

    def sizes(self, task: FileTask) -> list[int]:
        """Tokens of each prompt that is asked."""
        return [len(found.ids) for found in self.fitted(task, CutCounts())]


def _judge_something(task: FileTask, sample: Sample) -> None:
    """Let each of its rules judge an answer, so that a reference that cannot be used is told now."""
    for name in (sample.scorer, *task.family.columns(task.task)):
        try:
            find_scorer(name).score(_SOMETHING, sample.outputs, sample.extra)
        except UnscorableError as error:
            message = f"{sample.facts['row']} ({sample.task}): {error.message}"
            raise DataError(message, rule=error.rule, hint=error.hint) from error


def _nothing_to_ask(task: FileTask) -> DataError:
    labels = ", ".join(file.label for file in task.files)
    rule = (
        f"Rows of another split than {task.split} are left out."
        if task.family.name in ("qmsum", "squality")
        else None
    )
    hint = "Give --split train, val or test." if rule else None
    return DataError(f"{labels}: nothing to ask for {task.name}", rule=rule, hint=hint)


def question_of(tokenizer: Any, found: Fitted, limits: Limits) -> Question:
    """A fitted sample as a question."""
    sample = found.sample
    facts = {"id": sample.id, **sample.facts, "n_truncated": found.lost_tokens}
    if found.lost_tokens:
        facts["truncation"] = limits.truncate
    return Question(
        sample.task,
        found.ids,
        sample.outputs,
        facts,
        found.sample_hash,
        max_new_tokens=sample.max_new_tokens,
        stop=sample.stop,
        scorer=sample.scorer,
        extra=sample.extra,
        without_context=None if found.bare is None else found.bare.ids,
        follow_up=follow_up_of(tokenizer, sample),
    )


def plan_files(config: EvalConfig, tokenizer: Any, readable: int) -> FilePlan:
    """Find and check the file-based tasks of the settings.

    Args:
        config: With `tasks` and `data`.
        tokenizer: Of the model to be measured.
        readable: Tokens that the model reads.

    Raises:
        DataError, SettingsError: See `open_tasks` and `FilePlan.check`.
    """
    tasks = open_tasks(
        config.file_tasks,
        config.data,
        as_chat=bool(tokenizer.chat_template),
        prompts=config.prompts,
        split=config.split,
        max_samples=config.max_samples,
    )
    most = config.max_new_tokens if config.given("max_new_tokens") else None
    limits = Limits(readable, config.max_prompt, config.truncate)
    plan = FilePlan(tuple(tasks), tokenizer, limits, most)
    plan.check()
    return plan
