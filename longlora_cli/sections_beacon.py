"""Settings of Activation Beacon: how the past is compressed, in training and in use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator

from longlora_cli.section import Section, setting
from longlora_cli.values import Length, Names, Ratios

TRAINING_RATIOS = (2, 4, 8, 16, 32)
"""What `--beacon` trains without `--beacon-ratio`, as the paper does (arXiv:2401.03462, 4.1)."""
_ADAPTIVE = re.compile(r"adapt-\d+")
_PROJECTIONS = ("q", "k", "v", "o")


def _known_mix(value: str) -> str:
    if value in ("step-random", "instance-random", "sequence") or _ADAPTIVE.fullmatch(value):
        return value
    raise ValueError(
        "one of step-random, instance-random, sequence or adapt-N, with N tokens left for the answer"
    )


Mix = Annotated[str, AfterValidator(_known_mix)]


class BeaconUseSection(Section):
    """How a run with beacons reads; its window, positions and attention are those it was trained with."""

    beacon_ratio: Ratios = setting(
        [], "Run with beacons: tokens for one beacon, 0 keeps them all; default: the run's largest ratio."
    )
    beacon_ratio_mix: Mix = setting(
        "step-random", "How several ratios are chosen: step-random, instance-random, sequence or adapt-N."
    )
    beacon_parallel_window: int = setting(1, "Windows that are read in one pass.", ge=1)
    retrieval_method: str = setting(
        "none", "Bring back the past that belongs to the question: none, bm25, or a dense encoder's folder."
    )
    retrieval_topk: int = setting(3, "Spans of the past that are brought back.", ge=1)
    retrieval_key_length: Length = setting(128, "Tokens of one span.", ge=1)

    @model_validator(mode="after")
    def _beacon_settings_have_an_effect(self) -> BeaconUseSection:
        self.needs("beacon_ratio_mix", len(self.beacon_ratio) > 1, "it chooses among several --beacon-ratio")
        retrieves = self.retrieval_method != "none"
        for name in ("retrieval_topk", "retrieval_key_length"):
            self.needs(name, retrieves, "it belongs to --retrieval-method")
        if retrieves and len(self.beacon_ratio) > 2:
            raise ValueError(
                "--retrieval-method takes at most two --beacon-ratio: one for the past, a finer one for what is found"
            )
        return self


class BeaconSection(Section):
    """Beacons in training. They are trained when `--beacon` or `--beacon-ratio` is given."""

    beacon: bool = setting(False, "Train beacons, which compress the past, with the default ratios.")
    beacon_ratio: Ratios = setting(
        [], "Train beacons, one for this many tokens; several ratios are mixed, 0 keeps a window whole."
    )
    beacon_ratio_mix: Mix = setting(
        "step-random",
        "A ratio is drawn for each window (step-random) or text (instance-random), or sequence, adapt-N.",
    )
    beacon_window: Length = setting(1024, "Tokens read at one time, before they are compressed.", ge=2)
    beacon_stride: Length | None = setting(
        None, "Tokens after which the next window begins; default: the window.", ge=1
    )
    beacon_position: Literal["interleave", "append"] = setting(
        "interleave", "Beacons among the tokens they stand for, or all at the window's end."
    )
    beacon_attention: Literal["full-coverage", "step-expansion", "segmentation"] = setting(
        "full-coverage",
        "What beacons see: all before them, tokens up to their own, or their own tokens only.",
    )
    beacon_attend_prev: bool = setting(True, "Let beacons see earlier ones of their window.")
    beacon_param: Names = setting(["q", "k", "v"], "Projections with a copy for beacons, of q, k, v and o.")
    beacon_sink: Length = setting(0, "First tokens of a text that are never compressed.", ge=0)
    beacon_embed_init: Literal["eos", "bos"] = setting("eos", "Token whose embedding beacons start from.")
    beacon_parallel_window: int = setting(1, "Windows that are read in one pass.", ge=1)
    eval_beacon_ratio: int | None = setting(
        None, "Ratio of evaluations during training; default: the largest of --beacon-ratio.", ge=1
    )

    @property
    def trains_beacons(self) -> bool:
        """Beacons are part of this training."""
        return self.beacon or bool(self.beacon_ratio)

    @property
    def ratios(self) -> tuple[int, ...]:
        """The ratios that are mixed in training."""
        return tuple(self.beacon_ratio) or TRAINING_RATIOS

    @property
    def stride(self) -> int:
        """Tokens from one window's first to the next one's."""
        return self.beacon_window if self.beacon_stride is None else self.beacon_stride

    @model_validator(mode="after")
    def _beacons_fit_the_window(self) -> BeaconSection:
        for name in BeaconSection.model_fields:
            if name not in ("beacon", "beacon_ratio"):
                self.needs(name, self.trains_beacons, "it belongs to --beacon or --beacon-ratio")
        if not self.trains_beacons:
            return self
        self.needs("beacon", not self.beacon_ratio, "--beacon-ratio says it already")
        self.needs("beacon_ratio_mix", len(self.ratios) > 1, "there is one ratio")
        self.needs(
            "beacon_attend_prev",
            self.beacon_attention != "full-coverage" or self.beacon_position == "append",
            "interleaved beacons with full coverage see all that is before them",
        )
        if unknown := [name for name in self.beacon_param if name not in _PROJECTIONS]:
            raise ValueError(f"--beacon-param {unknown[0]}: of {', '.join(_PROJECTIONS)}")
        self._check_windows()
        return self

    def _check_windows(self) -> None:
        """Refuse windows, strides and ratios that do not go together."""
        window, stride = self.beacon_window, self.stride
        if stride > window:
            raise ValueError(
                f"--beacon-stride {stride} is above --beacon-window {window}: tokens would be skipped"
            )
        if stride < window and self.beacon_position == "interleave":
            raise ValueError(
                f"--beacon-stride {stride} is below --beacon-window {window}: that needs --beacon-position append"
            )
        name = "--beacon-window" if stride == window else "--beacon-stride"
        for flag, ratio in [
            *(("--beacon-ratio", ratio) for ratio in self.ratios),
            ("--eval-beacon-ratio", self.eval_beacon_ratio or 0),
        ]:
            if ratio and stride % ratio:
                raise ValueError(f"{flag} {ratio} does not divide {name} {stride}")
        if set(self.ratios) == {0}:
            raise ValueError("--beacon-ratio 0 alone compresses nothing: there would be nothing to train")
        if self.beacon_sink > stride:
            raise ValueError(f"--beacon-sink {self.beacon_sink} is above {name} {stride}")
        if self.beacon_parallel_window > 1 and stride != window:
            raise ValueError(
                "--beacon-parallel-window has no effect here: windows with a --beacon-stride overlap"
            )

    def check_training(
        self, inert: Sequence[str], max_length: object, rope: str, adapter: str, *, evaluates: str | None
    ) -> None:
        """Refuse what belongs to a training without beacons, or has no effect with them.

        Args:
            inert: Settings of the memory engine, which windows do not pass through.
            max_length: Tokens, `auto` or None.
            rope: How positions are stretched.
            adapter: What else is trained.
            evaluates: The evaluation's method; None without evaluation data.

        Raises:
            ValueError: One line.
        """
        if not self.trains_beacons:
            if adapter == "none":
                raise ValueError("--adapter none leaves nothing to train; it belongs to --beacon-ratio")
            return
        for name in inert:
            self.needs(name, False, "beacons are trained window by window, without a memory plan")
        if max_length == "auto":
            raise ValueError(
                "--max-length auto has no effect here: beacons are trained without a memory plan"
            )
        if rope == "dynamic":
            raise ValueError(
                "--rope dynamic changes positions with the length, which stored keys cannot follow"
            )
        self.needs("eval_beacon_ratio", evaluates is not None, "there is no --eval-data")
        if evaluates == "generation":
            raise ValueError("--eval-method generation reads without beacons; evaluate them by perplexity")
