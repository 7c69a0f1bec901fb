"""Settings that several commands share, by what they are about."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from longlora_cli.presets import PRESETS
from longlora_cli.section import Section, setting
from longlora_cli.values import CountOrAuto, Length, Names, Paths, Size, parse_length

CHAT_TEMPLATE_HELP = (
    "Chat template: auto (the tokenizer's own; a run's as it was trained), llama-2, llama-3, mistral, qwen or "
    "chatml, gemma, phi, none, or a .jinja file."
)


class ModelSection(Section):
    """Which model, and how its weights and numbers are held."""

    model: str = setting("builtin", "Model folder, run folder, hub name, or 'builtin'.", short="-m")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "Number format of weights and computation; auto: bf16 on a GPU that has it, else fp32."
    )
    quantization: Literal["auto", "none", "nf4", "int8"] = setting(
        "auto",
        "Base weights: NF4 (4-bit), int8 or none; auto: as a run was trained, NF4 to train above 1B parameters.",
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Where to compute; auto: a GPU if there is one.")
    attention: Literal["auto", "fa4", "cudnn", "flash", "efficient", "torch", "math"] = setting(
        "auto",
        "Attention kernel; auto: FlashAttention-4 (extra fa4) or cuDNN on Hopper and newer by document length, "
        "else the GPU's or CPU's best.",
    )
    chat_template: str = setting("auto", CHAT_TEMPLATE_HELP)


class RopeSection(Section):
    """How positions are stretched. Without `rope`, the model's or run's own record is kept."""

    rope: Literal["keep", "theta", "linear", "dynamic", "yarn", "llama3"] = setting(
        "keep", "Position scaling; theta raises the base frequency (NTK)."
    )
    rope_factor: float | None = setting(
        None, "Length ratio; default: the new context length over the model's own.", gt=1
    )
    rope_theta: float | None = setting(
        None, "Base frequency for --rope theta; default: the NTK rule, theta * factor^(d/(d-2)).", gt=0
    )

    @model_validator(mode="after")
    def _rope_settings_have_an_effect(self) -> RopeSection:
        self.needs("rope_factor", self.rope != "keep", "it belongs to a --rope method")
        self.needs("rope_theta", self.rope == "theta", "it belongs to --rope theta")
        if self.rope_factor is not None and self.rope_theta is not None:
            raise ValueError("--rope-factor and --rope-theta both set the base frequency; give one")
        return self


def stretched_tokens(own_tokens: int, factor: float) -> int:
    """Tokens that a model of so many reads once its positions are stretched."""
    return int(own_tokens * factor)


class PaceSection(Section):
    """How much is measured, and how long that may take."""

    preset: Literal["smoke", "quick", "standard", "paper"] | None = setting(
        None, "Tasks, lengths and samples by one name; other settings win (docs/eval.md)."
    )
    beyond: bool = setting(
        False, "Measure lengths beyond what the model was made for too; without it they are refused."
    )
    max_hours: float | None = setting(
        None, "Leave out the longest lengths if the evaluation would take longer than this.", gt=0
    )

    batch_size: CountOrAuto = setting(
        "auto",
        "Most questions answered together; auto: up to 16 of similar length, in all 32,768 tokens, or more on a GPU.",
    )

    def check_pace(self, generates: bool, *, makes: bool, rope: str, shares: bool) -> None:
        """Refuse a batch of what is not generated or has positions of its own, and hours of what is not whole.

        Args:
            generates: Something is answered by a model; perplexity and choices are not.
            makes: Samples are only written.
            rope: How positions are stretched.
            shares: This is one share of several.

        Raises:
            ValueError: One line.
        """
        self.needs("max_hours", not makes, "--make measures no model")
        if self.max_hours is not None and shares:
            raise ValueError("--max-hours beside --shard: shares have to be of the same lengths")
        self.needs("batch_size", generates, "it belongs to answers that are generated")
        if rope == "dynamic" and self.batch_size not in ("auto", 1):
            raise ValueError(
                f"--batch-size {self.batch_size} with --rope dynamic: each prompt has its own positions"
            )

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, values: Any) -> Any:
        return (
            {**PRESETS.get(str(values.get("preset")), {}), **values} if isinstance(values, dict) else values
        )

    def given(self, name: str) -> bool:
        """True when the user gave this setting, rather than leaving its default or the preset's value."""
        preset = PRESETS.get(self.preset or "", {})
        return super().given(name) and not (name in preset and getattr(self, name) == preset[name])


class BenchmarkSection(Section):
    """How the rows of benchmarks read from files are asked."""

    max_samples: int | None = setting(
        None, "At most this many rows of generate, and of each task of a benchmark.", ge=1
    )
    truncate: Literal["middle", "left", "error", "skip"] = setting(
        "middle", "Benchmarks: what becomes of prompts that are too long; middle keeps both ends."
    )
    max_prompt: Length | None = setting(
        None,
        "Benchmarks: most tokens of a prompt without its template; default: what the model has room for.",
        ge=16,
    )
    prompts: Path | None = setting(
        None,
        "Benchmarks: prompts by task, as LongBench's dataset2prompt.json; used unasked where it lies in --data.",
    )

    def check_benchmarks(
        self, asked: Sequence[str], others: Sequence[str], data: Sequence[Path], rope: str
    ) -> None:
        """Refuse benchmarks without data, or whose data or length would mean two things.

        Args:
            asked: The benchmarks among the tasks.
            others: The tasks that read `data` otherwise.
            data: Where everything is read.
            rope: How positions are stretched.

        Raises:
            ValueError: One line.
        """
        for name in ("truncate", "max_prompt", "prompts"):
            self.needs(name, bool(asked), "it belongs to benchmarks")
        if asked and not data:
            raise ValueError(f"--tasks {asked[0]} needs --data FOLDER")
        if asked and others:
            raise ValueError(
                f"--tasks {others[0]} and {asked[0]} read --data in different ways; ask for them separately"
            )
        if asked and rope != "keep" and self.max_prompt is None:
            raise ValueError("--rope changes how long a prompt may be; say it with --max-prompt")


class ExportSection(Section):
    """As what a finished evaluation is written again."""

    export: Literal["lm-eval", "longbench"] | None = setting(
        None, "With --report: write its results and answers as files of lm-evaluation-harness or LongBench."
    )


class ControlSection(Section):
    """What is measured beside the scores, so that they can be trusted."""

    control: Literal["none", "no-context"] = setting(
        "none", "Ask every question again without its context: what is known or guessed anyway."
    )
    train_data: Paths = setting(
        [], "Training data (prepared, or texts and rows): how much of what is asked they hold."
    )

    def check_control(self, *, asks: bool, makes: bool) -> None:
        """Refuse a control of what has no question.

        Args:
            asks: Something besides perplexity is measured.
            makes: Samples are only written.

        Raises:
            ValueError: One line.
        """
        self.needs("control", asks and not makes, "it belongs to questions that a model answers")
        self.needs("train_data", not makes, "no model is measured")


class AdapterSection(Section):
    """What is trained."""

    adapter: Literal["lora", "rslora", "dora", "pissa", "none"] = setting(
        "lora", "Kind of low-rank adapter; none trains beacons alone."
    )
    lora_rank: int = setting(16, "Rank of the adapter.", ge=1)
    lora_alpha: float | None = setting(None, "Scale of the adapter; default: twice the rank.", gt=0)
    lora_dropout: float = setting(0.0, "Dropout on the adapter's input.", ge=0, lt=1)
    lora_targets: Names = setting(
        ["all"], "Linear layers that get an adapter: all, or names such as q_proj,v_proj."
    )
    also_train: Literal["none", "norms", "all"] = setting(
        "none", "Also train the norms, or norms and embeddings (all), as LongLoRA does."
    )

    @model_validator(mode="after")
    def _adapter_settings_have_an_effect(self) -> AdapterSection:
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "also_train"):
            self.needs(name, self.adapter != "none", "--adapter none adds no adapter")
        return self


class OptimSection(Section):
    """How long, how fast, in which order."""

    steps: int | None = setting(None, "Optimizer steps; default: --epochs over the data.", ge=1)
    epochs: float = setting(1.0, "Passes over the data.", gt=0)
    batch_size: int = setting(1, "Chunks per micro-batch and process.", ge=1)
    accumulate: int = setting(1, "Micro-batches per optimizer step.", ge=1)
    learning_rate: float = setting(2e-4, "Peak learning rate.", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = setting("cosine", "Learning rate after warm-up.")
    warmup: int = setting(0, "Steps of linear warm-up.", ge=0)
    weight_decay: float = setting(0.0, "AdamW's weight decay.", ge=0)
    max_grad_norm: float = setting(1.0, "Clip gradients to this norm.", gt=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = setting("adamw", "Optimizer.")
    seed: int = setting(0, "Seed of data order, adapter and dropout.", ge=0)

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> OptimSection:
        self.needs("epochs", self.steps is None, "--steps already says how long to train")
        return self


PLAN_KEYS = (
    "group",
    "offload",
    "keep_attention",
    "keep_qkv",
    "keep_gate_up",
    "tile_tokens",
    "kv_heads_per_call",
    "embedding",
)
PLANNED_BY = ("engine", "plan", "s2_group", "gpu_memory", "host_memory", "disk_offload", "probe")
"""Settings of the memory plan."""
# Parts whose value is a place; the others' are numbers.
_PLAN_PLACES = {"offload": ("gpu", "host", "disk"), "embedding": ("gpu", "host")}


class EngineSection(Section):
    """Where activations wait between forward and backward, and how much memory there is for them."""

    engine: Literal["auto", "fused", "generic", "none"] = setting(
        "auto", "How layers train: fused (Llama family), generic (any decoder), none (the model's own code)."
    )
    plan: Names = setting(
        ["auto"], f"Memory plan: auto, or fixed parts of it as KEY=VALUE of {', '.join(PLAN_KEYS)}."
    )
    s2_group: Length | None = setting(
        None, "Train with shifted sparse attention (S2-Attn) in groups of this many tokens.", ge=2
    )
    gpu_memory: Size | None = setting(None, "Use at most this much GPU memory, such as 24GB.", gt=0)
    host_memory: Size | None = setting(None, "Use at most this much host memory for activations.", gt=0)
    disk_offload: Path | None = setting(None, "Folder on a fast disk for activations that fit nowhere else.")
    loss_tile: Length = setting(
        4096, "Tokens whose logits exist at one time; when it is not given, a memory plan chooses.", ge=1
    )
    probe: bool = setting(False, "With --dry-run: run one longest step and compare it with the plan.")

    def fixed_plan(self) -> dict[str, str | int]:
        """The parts of the plan that the user fixed; numbers are tokens, layers or heads."""
        fixed: dict[str, str | int] = {}
        for item in self.plan:
            if item != "auto":
                key, _, value = item.partition("=")
                fixed[key] = value if key in _PLAN_PLACES else parse_length(value)
        return fixed

    @model_validator(mode="after")
    def _plan_is_known(self) -> EngineSection:
        for item in self.plan:
            key, equals, value = item.partition("=")
            if item == "auto":
                continue
            if key not in PLAN_KEYS or not equals:
                raise ValueError(
                    f"--plan {item}: write auto or KEY=VALUE, with KEY of {', '.join(PLAN_KEYS)}"
                )
            places = _PLAN_PLACES.get(key)
            if places is not None and value not in places:
                raise ValueError(f"--plan {item}: {', '.join(places[:-1])} or {places[-1]}")
            if places is None:
                try:
                    parse_length(value)
                except ValueError as error:
                    raise ValueError(f"--plan {item}: {error}") from None
        for name in ("plan", "gpu_memory", "host_memory", "disk_offload", "s2_group"):
            self.needs(name, self.engine != "none", "--engine none keeps what the model's own code keeps")
        self.needs("s2_group", self.engine != "generic", "it belongs to --engine fused")
        if self.s2_group is not None and self.s2_group % 2:
            raise ValueError(f"--s2-group {self.s2_group} is odd: groups are shifted by half of their tokens")
        return self
