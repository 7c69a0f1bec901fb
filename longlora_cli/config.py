"""Every setting, declared once: its type, default, help and checks.

A command's config is made of sections (`ModelSection`, `RopeSection`, ...) that core functions take as arguments;
`sections.py` has those that commands share. A field is a flag (`max_length` -> `--max-length`), a recipe key and an
environment variable (`LONGLORA_MAX_LENGTH`); `options.py` makes them from these declarations. A section refuses values
that cannot be used and combinations in which a setting would have no effect. Nothing here imports torch, looks at a GPU
or opens a network connection.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from longlora_cli.section import Section, setting
from longlora_cli.sections import (
    CHAT_TEMPLATE_HELP,
    PLANNED_BY,
    AdapterSection,
    BenchmarkSection,
    ControlSection,
    EngineSection,
    ExportSection,
    ModelSection,
    OptimSection,
    PaceSection,
    RopeSection,
)
from longlora_cli.sections_beacon import BeaconSection
from longlora_cli.sections_past import PastSection
from longlora_cli.task_names import BUILT_IN, expand, is_from_files, is_only_weighed, unknown_task
from longlora_cli.values import Length, LengthOrAuto, Lengths, Names, Numbers, Paths, Share


class PrepareConfig(Section):
    """Turn documents and chats into chunked, packed training data."""

    inputs: list[str] = setting(
        ...,
        "Files (text, JSON, tables, HTML, EPUB, PDF), folders, globs, saved datasets, hub datasets (hf:NAME); "
        "path[N] samples, path=W mixes.",
        positional=True,
    )
    out: Path = setting(..., "Folder to make.", short="-o")
    model: str = setting("builtin", "Model whose tokenizer and chat template are used.", short="-m")
    chat_template: str = setting("auto", CHAT_TEMPLATE_HELP)
    max_length: Length = setting(4096, "Tokens per chunk, such as 4096 or 32k.", ge=8)
    min_length: Length = setting(0, "Leave out documents and pieces with fewer tokens.", ge=0)
    on_long: Literal["split", "truncate", "truncate-left", "truncate-middle", "drop", "error"] = setting(
        "split",
        "Documents longer than a chunk: split them, keep the beginning (truncate), the end (truncate-left), both "
        "without the middle (truncate-middle), drop them, or stop; chats are never split.",
    )
    split_at: Literal["token", "sentence", "paragraph", "chapter"] = setting(
        "token", "Pieces end at the last of these that fits; where there is none, at the next weaker one."
    )
    overlap: Length = setting(0, "Tokens that consecutive pieces of a split document share.", ge=0)
    stride: Length | None = setting(
        None, "A piece begins every so many tokens: another way to write the overlap.", ge=1
    )
    learn_overlap: bool = setting(
        False, "Learn the tokens of an overlap in each piece, not only in the first."
    )
    pack: bool = setting(True, "Put several short documents into one chunk, isolated from each other.")
    labels: Literal["assistant", "last", "all"] = setting(
        "assistant",
        "Which tokens of chats are learnt: all answers, the last answer, or everything; texts: all.",
    )
    synthetic: Names = setting(
        [],
        "Chats on lines hidden in texts, TASK=COUNT; tasks: needle, multi-key, multi-value, multi-query, variables, "
        "key-value, topic, multi-hop, ordered-events, count, repeat-paragraph, common-words, register, or all.",
    )
    synthetic_length: Length | None = setting(
        None, "Longest synthetic chat; lengths vary below it. Default: --max-length.", ge=64
    )
    synthetic_facts: int = setting(8, "Lines hidden in one synthetic chat.", ge=1, le=64)
    synthetic_questions: int = setting(
        4, "Questions in one synthetic chat, at most; one a line or fewer.", ge=1, le=64
    )
    overlap_check: Names = setting(
        [], "Evaluation data, as INPUTS: documents that share 13 words in a row with them are told."
    )
    on_overlap: Literal["report", "drop", "error"] = setting(
        "report", "What to do with documents that overlap with --overlap-check."
    )
    dedup: Literal["none", "exact", "near"] = setting(
        "none", "Leave out documents that an earlier one is equal to, but for white space, or nearly equal."
    )
    dedup_threshold: float = setting(
        0.8, "Share of 5-word runs that near duplicates have in common, of all that either has.", ge=0.5, le=1
    )
    format: Literal[
        "auto", "messages", "sharegpt", "prompt", "outputs", "alpaca", "longbench", "questions", "text"
    ] = setting("auto", "What rows of JSON, tables and datasets are; auto finds it by their keys.")
    split: str = setting("train", "Split of a hub or saved dataset.")
    stream: bool = setting(False, "Read hub datasets as they are needed, without a copy on disk.")
    show: int = setting(0, "Print so many chunks, learnt tokens set off from masked ones.", ge=0)
    seed: int = setting(0, "Seed of sampling, mixing, packing, synthetic chats and --show.", ge=0)

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> PrepareConfig:
        if self.overlap >= self.max_length:
            raise ValueError(f"--overlap {self.overlap} is not below --max-length {self.max_length}")
        if self.min_length > self.max_length:
            raise ValueError(f"--min-length {self.min_length} is above --max-length {self.max_length}")
        if self.stride is not None and self.stride > self.max_length:
            raise ValueError(
                f"--stride {self.stride} is above --max-length {self.max_length}: tokens would be skipped"
            )
        if self.stride is not None and self.given("overlap"):
            raise ValueError("--stride and --overlap say the same: --stride is --max-length less --overlap")
        self.needs("overlap", self.overlap == 0 or self.on_long == "split", "only --on-long split overlaps")
        self.needs("on_overlap", bool(self.overlap_check), "no --overlap-check is asked for")
        self.needs("dedup_threshold", self.dedup == "near", "only --dedup near compares by degree")
        for name in ("stride", "split_at"):
            self.needs(name, self.on_long == "split", "only --on-long split makes several pieces")
        self.needs(
            "stride", self.split_at == "token", "pieces that end at boundaries begin there; use --overlap"
        )
        self.needs(
            "learn_overlap", self.shared_tokens > 0, "pieces share no tokens; use --overlap or --stride"
        )
        for name in ("synthetic_length", "synthetic_facts", "synthetic_questions"):
            self.needs(name, bool(self.synthetic), "no --synthetic chats are asked for")
        if self.synthetic_questions > self.synthetic_facts:
            raise ValueError("--synthetic-questions cannot be above --synthetic-facts")
        if self.synthetic_length is not None and self.synthetic_length > self.max_length:
            raise ValueError("--synthetic-length cannot be above --max-length")
        return self

    @property
    def rows_format(self) -> str | None:
        """The format of rows; None where it is to be found."""
        return None if self.format == "auto" else self.format

    @property
    def shared_tokens(self) -> int:
        """Tokens that consecutive pieces of a split document share, from `overlap` or `stride`."""
        return self.overlap if self.stride is None else self.max_length - self.stride


class TrainConfig(EngineSection, OptimSection, BeaconSection, AdapterSection, RopeSection, ModelSection):
    """Train an adapter that reads longer contexts."""

    data: Paths = setting(..., "Prepared data, one or more folders.", short="-d")
    out: Path = setting(..., "Run folder; an unfinished run in it is resumed.", short="-o")
    max_length: LengthOrAuto | None = setting(
        None,
        "Context length to train for, or auto: the longest that fits; default: the data's longest chunk.",
    )
    log_every: int = setting(1, "Steps between log lines.", ge=1)
    save_every: int = setting(100, "Steps between checkpoints.", ge=1)
    keep_checkpoints: int = setting(2, "Newest checkpoints kept.", ge=1)
    eval_data: Path | None = setting(None, "Held-out prepared data (perplexity) or .jsonl (generation).")
    eval_every: int = setting(0, "Steps between evaluations; 0: only at the end.", ge=0)
    eval_method: Literal["perplexity", "generation"] = setting(
        "perplexity", "How to evaluate during training."
    )
    eval_samples: int | None = setting(None, "Evaluate at most this many chunks or rows.", ge=1)
    eval_new_tokens: int = setting(64, "Longest answer in evaluation by generation.", ge=1)
    report_to: Names = setting([], "Loggers of transformers.Trainer: tensorboard, wandb, ...")

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> TrainConfig:
        method = self.eval_method if self.eval_data is not None else None
        self.check_training(PLANNED_BY, self.max_length, self.rope, self.adapter, evaluates=method)
        if isinstance(self.max_length, int) and self.max_length < 8:
            raise ValueError(f"--max-length {self.max_length} is below 8")
        for name in ("eval_every", "eval_method", "eval_samples"):
            self.needs(name, self.eval_data is not None, "there is no --eval-data")
        self.needs(
            "eval_new_tokens", self.eval_method == "generation", "it belongs to --eval-method generation"
        )
        return self


class EvalConfig(ExportSection, PaceSection, ControlSection, BenchmarkSection, PastSection, ModelSection):
    """Measure a base model or a run: perplexity, retrieval, generation."""

    adapter: Path | None = setting(None, "Adapter folder to put on the model.")
    tasks: Names = setting(
        ["ppl", "needle"],
        "What to measure: ppl, passkey, needle, generate, synthetic tasks or groups of them, and benchmarks in "
        "--data: longbench, infinitebench, ... (docs/eval.md).",
    )
    make: bool = setting(
        False, "Only write the samples of synthetic tasks, as .jsonl with RULER's fields; no model is loaded."
    )
    # None only where finished results are read; else the checks below refuse it.
    out: Path = setting(None, "Folder to make; with --report and no --export the .html file.", short="-o")
    report: Path | None = setting(
        None, "Finished evaluation whose report is made anew from its results and samples; no model is read."
    )
    data: Paths = setting(
        [],
        "ppl: texts; generate: .jsonl with input and outputs; benchmarks: their files or folders.",
        short="-d",
    )
    split: str = setting("test", "Split of a hub or saved dataset, or of QMSum.")
    haystack: Paths = setting([], "Texts to hide keys and needles in, or noise; default: the embedded book.")
    lengths: Lengths = setting([1024, 2048, 4096], "Context lengths of passkey, needle and synthetic tasks.")
    depths: int = setting(5, "Depths from start to end, per length.", ge=1, le=101)
    samples: int = setting(
        4, "Samples per length and depth; without depth, per length as many as with.", ge=1
    )
    needle_facts: int = setting(8, "Facts hidden in one needle sample.", ge=1, le=64)
    needle_wording: Literal["train", "eval"] = setting(
        "train", "Needle sentences: the forms that --synthetic data has, or forms it never shows."
    )
    window: Length = setting(4096, "Perplexity: tokens of one window.", ge=2)
    stride: Length | None = setting(None, "Perplexity: tokens between windows; default: half a window.", ge=1)
    bos: Literal["auto", "each", "first", "none"] = setting(
        "auto",
        "Perplexity: BOS in front of each window, of each text (first), or none; auto: as the tokenizer.",
    )
    docs: Literal["separate", "concat"] = setting(
        "separate", "Perplexity: each text by itself, or all as one with an empty line between two."
    )
    short_context: Length | None = setting(
        None, "Perplexity: score the curve's tokens with this context too; what the longer one gains.", ge=2
    )
    compat: Names = setting(
        [], "Perplexity: beside the exact one those by the rules of longlora, hf-docs, lm-eval."
    )
    max_tokens: Length | None = setting(None, "Perplexity: read at most this much of each text.", ge=2)
    metrics: Names = setting(["rouge", "f1", "exact_match", "accuracy"], "Scores of generate.")
    max_new_tokens: int = setting(
        64, "Longest answer; of benchmarks only where given: each has its own.", ge=1
    )
    seed: int = setting(0, "Seed of needles, keys and haystack positions.", ge=0)
    effective_score: float = setting(
        85.6, "Per cent that a length must score to count as effective; default: RULER's.", gt=0, le=100
    )
    shard: Share | None = setting(
        None, "Only answer this share of the texts, as 2/4; the same command without it puts shares together."
    )
    compare: Path | None = setting(
        None, "Finished evaluation to compare with, by paired tests; without --model, --out is finished too."
    )
    rescore: Path | None = setting(
        None, "Score the finished predictions of this .jsonl or .csv instead; needs neither model nor --out."
    )
    scorer: str | None = setting(
        None, "How to score --rescore: a name such as longbench.qa_f1, a version after @ (docs/eval.md)."
    )

    @property
    def only_compares(self) -> bool:
        """`out` and `compare` are two finished folders: nothing is measured or written."""
        return self.compare is not None and not (self.given("model") or self.given("adapter"))

    def module(self, command: str) -> str:
        """Settings that measure no model have modules of their own; they start without torch."""
        if self.rescore is not None:
            return "eval_rescore"
        if self.report is not None:
            return "eval_report" if self.export is None else "eval_export"
        if self.only_compares:
            return "eval_compare"
        return "eval_make" if self.make else command

    @property
    def measures(self) -> bool:
        """A model is measured, or samples are made for one; else finished results are read."""
        return self.rescore is None and self.report is None and not self.only_compares

    @model_validator(mode="after")
    def _finished_results_are_read_alone(self) -> EvalConfig:
        if self.rescore is not None:
            self.allows_only("rescore", "scorer")
            if self.scorer is None:
                raise ValueError("--rescore needs --scorer NAME, such as longbench.qa_f1")
            return self
        self.needs("scorer", False, "it belongs to --rescore")
        self.needs("export", self.report is not None, "it belongs to --report FOLDER")
        if self.out is None:
            raise ValueError("--out is missing (Folder to make.)")
        if self.report is not None:
            self.allows_only("report", "out", "export" if self.export else "compare")
        elif self.only_compares:
            for name in sorted(self.model_fields_set - {"out", "compare"}):
                self.needs(name, False, "without --model, --out and --compare are two finished folders")
        return self

    @property
    def file_tasks(self) -> list[str]:
        """The benchmarks that are read from files, or tasks of them, in the order asked for."""
        return [task for task in dict.fromkeys(self.tasks) if is_from_files(task)]

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> EvalConfig:
        if not self.measures:
            return self
        if fault := unknown_task(self.tasks):
            raise ValueError(fault)
        tasks = set(expand(self.tasks))
        others = [task for task in self.tasks if task in BUILT_IN or is_from_files(task)]
        if self.make and others:
            raise ValueError(f"--make writes samples of synthetic tasks, not of {', '.join(others)}")
        self.check_control(asks=bool(tasks - {"ppl"}), makes=self.make)
        self.check_benchmarks(self.file_tasks, sorted(tasks & {"ppl", "generate"}), self.data, self.rope)
        grid = bool(tasks - {"ppl", "generate", *self.file_tasks})
        for name in ("haystack", "lengths", "depths", "samples", "seed"):
            self.needs(name, grid, "it belongs to passkey, needle and synthetic tasks")
        self.needs("effective_score", grid and not self.make, "it belongs to measured lengths")
        for name in ("needle_facts", "needle_wording"):
            self.needs(name, "needle" in tasks, "it belongs to needle")
        if "needle" in tasks and self.needle_facts < self.depths:
            raise ValueError(
                f"--needle-facts {self.needle_facts} is below --depths {self.depths}: each depth asks one"
            )
        self.needs("split", bool(self.data or self.haystack), "no dataset is read")
        fits = self.rope != "keep" and self.rope_factor is None  # the factor is taken from the lengths
        self.needs("beyond", not (self.make or fits), "no length is refused there")
        generates = any(not is_only_weighed(task) for task in tasks) and not self.make
        self.check_pace(generates, makes=self.make, rope=self.rope, shares=self.shard is not None)
        self.check_past(makes=self.make, scores_texts="ppl" in tasks)
        return self

    @model_validator(mode="after")
    def _data_is_read_as_asked(self) -> EvalConfig:
        if not self.measures:
            return self
        tasks = set(expand(self.tasks))
        from_files = bool(self.file_tasks)
        asks = from_files or bool(tasks & {"passkey", "needle", "generate"})
        self.needs("max_new_tokens", asks, "it belongs to passkey, needle, generate and benchmarks")
        for name in ("window", "stride", "max_tokens", "bos", "docs", "short_context", "compat"):
            self.needs(name, "ppl" in tasks, "it belongs to ppl")
        self.needs("metrics", "generate" in tasks, "it belongs to generate")
        rows = from_files or "generate" in tasks
        self.needs("max_samples", rows, "it belongs to generate and benchmarks")
        self.needs("data", rows or "ppl" in tasks, "it belongs to ppl, generate and benchmarks")
        if "generate" in tasks and not self.data:
            raise ValueError("--tasks generate needs --data FILE.jsonl")
        if self.stride is not None and self.stride > self.window:
            raise ValueError(
                f"--stride {self.stride} is above --window {self.window}: tokens would be skipped"
            )
        if self.short_context is not None and self.short_context >= self.window:
            raise ValueError(
                f"--short-context {self.short_context} is not below --window {self.window}: nothing is longer"
            )
        if unknown := set(self.compat) - {"longlora", "hf-docs", "lm-eval"}:
            raise ValueError(f"--compat knows longlora, hf-docs, lm-eval; not {', '.join(sorted(unknown))}")
        return self


class ChatConfig(PastSection, ModelSection):
    """Talk with a base model or a run about long documents."""

    adapter: Path | None = setting(None, "Adapter folder to put on the model.")
    file: Paths = setting([], "Text to read before the conversation.", short="-f")
    prompt: str | None = setting(None, "Ask once and exit; '-' reads standard input.", short="-p")
    system: str | None = setting(None, "System message.")
    max_length: Length | None = setting(
        None, "Most tokens of conversation; default: what the model or run was made for.", ge=8
    )
    max_new_tokens: int = setting(512, "Longest answer.", ge=1)
    temperature: float = setting(0.0, "0 takes the likeliest token; higher is more varied.", ge=0)
    top_p: float = setting(1.0, "Sample from the likeliest tokens of this total probability.", gt=0, le=1)
    seed: int = setting(0, "Seed of sampling.", ge=0)

    @model_validator(mode="after")
    def _sampling_has_an_effect(self) -> ChatConfig:
        for name in ("top_p", "seed"):
            self.needs(name, self.temperature > 0, "with --temperature 0 nothing is sampled")
        return self


class MergeConfig(Section):
    """Put adapters into their base, or mix checkpoints of one architecture."""

    sources: list[str] = setting(..., "Runs, adapter folders, checkpoints or model folders.", positional=True)
    out: Path = setting(..., "Folder to make.", short="-o")
    weights: Numbers = setting([], "One weight per source; default: equal shares.")
    model: str | None = setting(
        None, "Base model of the adapters; default: the one they were trained on.", short="-m"
    )
    base_weights: Literal["auto", "original", "dequantized"] = setting(
        "auto",
        "Add an adapter to the original base, or to the dequantized one it was trained on; auto: as it was trained.",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "Number format; auto: the base's.")
    keep_adapter: bool = setting(False, "Mixing adapters: write an adapter instead of a whole model.")

    @model_validator(mode="after")
    def _weights_match_sources(self) -> MergeConfig:
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(f"{len(self.weights)} --weights for {len(self.sources)} sources; give one each")
        self.needs("weights", len(self.sources) > 1, "one source is not mixed")
        self.needs("keep_adapter", len(self.sources) > 1 or not self.keep_adapter, "one source is not mixed")
        self.needs("base_weights", not self.keep_adapter, "a mixed adapter holds no base weights")
        if any(not math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"--weights {self.weights}: not all are finite numbers")
        return self
