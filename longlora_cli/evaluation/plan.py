"""What an evaluation will ask, made and checked with a tokenizer before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longlora_cli.config import EvalConfig
from longlora_cli.data.haystack import Haystack
from longlora_cli.data.readers import kind_of
from longlora_cli.errors import DataError, SettingsError
from longlora_cli.evaluation.file_plan import FilePlan, plan_files
from longlora_cli.evaluation.generation import Question
from longlora_cli.evaluation.perplexity_plan import check_texts
from longlora_cli.evaluation.scorers import check_metrics
from longlora_cli.evaluation.tasks import needle, passkey, registry, rows
from longlora_cli.evaluation.tasks.prompts import question_of
from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.request import Request
from longlora_cli.evaluation.texts import Text, read_haystack, read_texts
from longlora_cli.generation.past import PLAIN, Past, past_of
from longlora_cli.models.rope import RopeRecord
from longlora_cli.models.source import own_length, resolve
from longlora_cli.sections import stretched_tokens
from longlora_cli.task_names import SYNTHETIC, expand, is_from_files

# Answers of passkey and needle are a number or a word; with a sentence around it 24 tokens do, and a
# model that never stops should not cost more.
_GRID_ANSWER_TOKENS = 24


@dataclass(frozen=True)
class EvalPlan:
    """Everything to be measured.

    Args:
        config: The settings.
        tokenizer: Of the model to be measured.
        texts: What perplexity reads.
        rows: Questions of `generate`.
        haystack: Of passkey, needle and synthetic tasks.
        files: Tasks that are read from files; None without them.
        past: How the model keeps what it has read.
    """

    config: EvalConfig
    tokenizer: Any
    texts: list[Text] = field(default_factory=list)
    rows: list[Question] = field(default_factory=list)
    haystack: Haystack | None = None
    files: FilePlan | None = None
    past: Past = PLAIN

    @property
    def tasks(self) -> list[str]:
        """What is measured, groups taken apart, in the order asked for."""
        return expand(self.config.tasks)

    @property
    def synthetic(self) -> list[str]:
        """The synthetic tasks among them."""
        return [task for task in self.tasks if task in SYNTHETIC]

    def samples(self, task: str) -> Iterator[Sample]:
        """The samples of a synthetic task, shortest length first."""
        return map(registry.make_sample, self._requests(task, self.config.lengths))

    def sample_questions(self, task: str) -> Iterator[Question]:
        """The same as questions."""
        return (question_of(self.tokenizer, sample) for sample in self.samples(task))

    def _requests(self, task: str, lengths: Sequence[int]) -> Iterator[Request]:
        assert self.haystack is not None  # make_plan reads it for these tasks
        c = self.config
        shared = {"depths": c.depths, "samples": c.samples, "seed": c.seed}
        return registry.requests(task, self.haystack, self.tokenizer, lengths=lengths, **shared)

    @property
    def grid_answer_tokens(self) -> int:
        """Longest answer of passkey and needle."""
        return min(self.config.max_new_tokens, _GRID_ANSWER_TOKENS)

    def grid_questions(self, task: str) -> Iterator[Question]:
        """The questions of `passkey` or `needle`, shortest length first."""
        for length in self._lengths:
            yield from self._questions_of(task, length, self.config.samples)

    def grid_count(self) -> int:
        """How many questions a grid or a synthetic task has."""
        return len(set(self.config.lengths)) * self.config.depths * self.config.samples

    def _questions_of(self, task: str, length: int, samples: int) -> Iterator[Question]:
        assert self.haystack is not None  # make_plan reads it for these tasks
        c = self.config
        shared: dict[str, Any] = {
            "length": length,
            "depths": c.depths,
            "samples": samples,
            "seed": c.seed,
            "answer_tokens": self.grid_answer_tokens,
        }
        if task == passkey.TASK:
            return passkey.passkey_questions(self.haystack, self.tokenizer, **shared)
        return needle.needle_questions(
            self.haystack, self.tokenizer, facts=c.needle_facts, wording=c.needle_wording, **shared
        )

    def check_lengths(self) -> None:
        """Make the first sample of each grid and length, and the shortest of each synthetic task.

        Raises:
            SettingsError: A length does not hold a sample.
            DataError: The tokenizer has no chat template, which needles need.
        """
        for task in self.grids:
            for length in self._lengths:
                next(iter(self._questions_of(task, length, 1)))
        for task in self.synthetic:
            registry.make_sample(next(self._requests(task, [min(self.config.lengths)])))

    @property
    def grids(self) -> list[str]:
        """The retrieval tasks that were asked for."""
        return [task for task in self.tasks if task in (passkey.TASK, needle.TASK)]

    @property
    def longest(self) -> int:
        """Tokens of the longest thing that will be read, its answer included."""
        config = self.config
        needs = [len(question.prompt) + config.max_new_tokens for question in self.rows]
        needs += [min(config.window, len(text.ids)) for text in self.texts]
        if self.grids or self.synthetic:
            needs += config.lengths
        if self.files is not None:
            needs.append(self.files.longest)
        return max(needs)

    @property
    def _lengths(self) -> list[int]:
        return sorted(set(self.config.lengths))

    def _fitted_sizes(self, task: str) -> list[int]:
        """Tokens of prompts that are fitted to a length together with their answer."""
        most = registry.TASKS[task].max_new_tokens if task in SYNTHETIC else self.grid_answer_tokens
        each = [length - min(most, length // 4) for length in self._lengths]
        return each * (self.config.depths * self.config.samples)

    def counts(self) -> dict[str, dict[str, int]]:
        """For each task `samples`, `tokens` of all its prompts, and `longest`.

        What is made on the spot is not made for it (a paper's 500 of 128K tokens take hours): it is as long as it may
        be, to 5 %.
        """
        found: dict[str, dict[str, int]] = {}
        if self.files is not None:
            for opened in self.files.tasks:
                found[opened.name] = _sizes(self.files.sizes(opened))
        for task in self.tasks:
            if is_from_files(task):
                continue
            if task == "ppl":
                sizes = [len(text.ids) for text in self.texts]
            elif task == rows.TASK:
                sizes = [len(question.prompt) for question in self.rows]
            else:
                sizes = self._fitted_sizes(task)
            found[task] = _sizes(sizes)
        return found


def _sizes(sizes: Sequence[int]) -> dict[str, int]:
    return {"samples": len(sizes), "tokens": sum(sizes), "longest": max(sizes, default=0)}


def make_plan(config: EvalConfig, tokenizer: Any) -> EvalPlan:
    """Read and check all input.

    With both `ppl` and `generate`, .jsonl files of `data` are rows and everything else is text.

    Raises:
        SettingsError: A metric that does not exist, a length that does not hold its sample, lengths beyond the model.
        DataError: Input that cannot be used.
        NotFoundError: The embedded book is needed and not there.
    """
    tasks = set(expand(config.tasks))
    row_paths = [path for path in config.data if kind_of(path) == ".jsonl"] if "generate" in tasks else []
    text_paths = [path for path in config.data if path not in row_paths]
    questions: list[Question] = []
    if "generate" in tasks:
        check_metrics(config.metrics)
        questions = _read_rows(row_paths, config.max_samples, tokenizer)
    if text_paths and "ppl" not in tasks and not config.file_tasks:
        raise DataError(f"{text_paths[0]}: --tasks generate reads .jsonl files only")
    texts = (
        read_texts(
            text_paths,
            tokenizer,
            split=config.split,
            max_tokens=config.max_tokens,
            bos=config.bos,
            docs=config.docs,
        )
        if "ppl" in tasks
        else []
    )
    check_texts(config, texts)
    hides = bool(tasks & {passkey.TASK, needle.TASK, *SYNTHETIC})
    haystack = read_haystack(config.haystack, split=config.split) if hides else None
    past = PLAIN if config.make else past_of(config, resolve(config.model, config.adapter))
    files = plan_files(config, tokenizer, _readable(config, past)) if config.file_tasks else None
    plan = EvalPlan(config, tokenizer, texts, questions, haystack, files, past)
    plan.check_lengths()
    _refuse_beyond(plan)
    return plan


def _refuse_beyond(plan: EvalPlan) -> None:
    """Nobody should take what a model does outside its positions for what it can do; `--rope` gives it others."""
    config = plan.config
    if config.make or config.beyond or (config.rope != "keep" and config.rope_factor is None):
        return
    readable = _readable(config, plan.past)
    if config.rope_factor is not None and resolve(config.model, config.adapter).record is None:
        needed = plan.longest / readable
        if config.rope_factor < needed:
            reached = stretched_tokens(readable, config.rope_factor)
            raise SettingsError(
                f"up to {plan.longest:,} tokens would be read, --rope-factor {config.rope_factor:g} takes "
                f"{config.model} from {readable:,} to {reached:,}",
                rule="--lengths and --window stay within the positions that --rope gives.",
                hint=f"Leave --rope-factor out for one of {needed:.4g}, use shorter ones, or add --beyond.",
            )
        return
    if plan.longest > readable:
        raise SettingsError(
            f"up to {plan.longest:,} tokens would be read, {config.model} is made for {readable:,}",
            rule="--lengths and --window stay within a model's positions, unless --rope changes them.",
            hint="Use shorter ones, or add --beyond to see what happens there.",
        )


def _readable(config: EvalConfig, past: Past) -> int:
    """Tokens of prompt and answer: what a run was trained for, else the base's own length, as much as beacons hold."""
    source = resolve(config.model, config.adapter)
    if source.record is None:
        own = own_length(source.base)
        return past.readable(own, own)
    positions = RopeRecord.from_json(source.record.rope).max_position_embeddings
    return past.readable(source.record.context_length, positions)


def _read_rows(paths: list[Path], max_samples: int | None, tokenizer: Any) -> list[Question]:
    if not paths:
        raise DataError("--tasks generate needs a .jsonl file", hint="Give it with --data FILE.jsonl.")
    questions: list[Question] = []
    for path in paths:
        left = None if max_samples is None else max_samples - len(questions)
        if left == 0:
            break
        questions += rows.read_questions(path, tokenizer, max_samples=left)
    return questions
