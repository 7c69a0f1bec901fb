"""How what a model has read is kept: every token's keys and values, fewer bits of them, or beacons in their place."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.windows import capacity
from longlora_cli.errors import SettingsError
from longlora_cli.models.source import ModelSource
from longlora_cli.sections_past import PastSection

if TYPE_CHECKING:  # it imports torch, and finished evaluations are read without
    from longlora_cli.beacon.retrieval import RetrievalSettings

FULL_BITS = 16
"""The value of `--kv-bits` that keeps keys and values in the model's own number format."""


@dataclass(frozen=True)
class Past:
    """How what was read is kept.

    Args:
        kv_bits: Bits of a key's or value's number: 16 (the model's own format), 8 or 4.
        beacon: How windows are compressed; None: they are not.
        retrieval: How spans of the past are found for a question; None: they are not.
        fine_ratio: Tokens for one beacon in those spans; 0 keeps them all.
    """

    kv_bits: int = FULL_BITS
    beacon: BeaconSettings | None = None
    retrieval: RetrievalSettings | None = None
    fine_ratio: int = 0

    def to_json(self) -> dict[str, Any]:
        """What decides an answer besides the model; empty for a plain cache."""
        found: dict[str, Any] = {} if self.kv_bits == FULL_BITS else {"kv_bits": self.kv_bits}
        if self.beacon is not None:
            found["beacon"] = self.beacon.to_json()
        if self.retrieval is not None:
            found["retrieval"] = asdict(self.retrieval) | {"fine_ratio": self.fine_ratio}
        return found

    def describe(self) -> str:
        """A few words for people."""
        if self.beacon is None:
            own = "the model's number format" if self.kv_bits == FULL_BITS else f"{self.kv_bits} bits"
            return f"keys and values of every token in {own}"
        ratios = ", ".join(f"x{ratio}" if ratio else "none (x0)" for ratio in self.beacon.ratios)
        mix = "" if len(self.beacon.ratios) == 1 else f" ({self.beacon.ratio_mix})"
        found = f"beacons {ratios}{mix} of windows of {self.beacon.window:,} tokens"
        if self.retrieval is None:
            return found
        fine = f"at x{self.fine_ratio}" if self.fine_ratio else "in full"
        name = Path(self.retrieval.method).name
        return f"{found}, {self.retrieval.topk} spans of {self.retrieval.key_length:,} found by {name} {fine}"

    @property
    def fine_rows(self) -> int:
        """Most rows of memory that retrieved spans take: each is widened to whole beacons at both ends."""
        if self.retrieval is None or self.beacon is None:
            return 0
        unit = lcm(*(max(ratio, 1) for ratio in (*self.beacon.ratios, self.fine_ratio)))
        return self.retrieval.topk * (self.retrieval.key_length + 2 * unit) // max(self.fine_ratio, 1)

    def readable(self, own: int, positions: int) -> int:
        """Tokens of prompt and answer that can be read.

        Args:
            own: Tokens that the model or run was made for.
            positions: Positions that it was built with: beacons are as many tokens as these can hold, however long the
                texts were that trained them.
        """
        if self.beacon is None:
            return own
        positions -= self.fine_rows
        sizes = [capacity(ratio, self.beacon, positions) for ratio in self.beacon.ratios]
        return max(sizes) if self.beacon.reserve is not None else min(sizes)


PLAIN = Past()
"""Keys and values of every token as the model makes them."""


def past_of(section: PastSection, source: ModelSource) -> Past:
    """How the settings of a command want it, for a model that was found and not loaded yet.

    A run with beacons reads with them, at its largest ratio unless another is asked for.

    Raises:
        SettingsError: Beacons are asked of a model without them, or something that they cannot be had with.
        IntegrityError: The run's record of its beacons is damaged.
    """
    trained = _trained(source)
    if trained is None and not section.asks_for_beacons:
        return Past(kv_bits=section.kv_bits)
    asked = tuple(section.beacon_ratio)
    if trained is None and set(asked) != {0}:
        raise SettingsError(
            f"{source.base if source.adapter is None else source.adapter} has no beacons",
            rule="They are trained: only --beacon-ratio 0, which keeps every token, needs none.",
            hint="Train some with longlora train --beacon, or leave the beacon settings out.",
        )
    base = trained or BeaconSettings()
    settings = replace(
        base,
        ratios=asked or (max(base.ratios),),
        ratio_mix=section.beacon_ratio_mix,
        parallel=section.beacon_parallel_window,
    )
    try:
        settings.validate()
    except ValueError as error:
        raise SettingsError(str(error)) from None
    _refuse_beside(section)
    return _with_retrieval(section, settings)


def _with_retrieval(section: PastSection, settings: BeaconSettings) -> Past:
    if section.retrieval_method == "none":
        return Past(beacon=settings)
    from longlora_cli.beacon.retrieval import RetrievalSettings
    from longlora_cli.beacon.retrieval_session import split_levels

    retrieval = RetrievalSettings(
        section.retrieval_method, section.retrieval_topk, section.retrieval_key_length
    )
    retrieval.validate()
    coarse, fine = split_levels(settings.ratios)
    return Past(beacon=settings.with_ratios(coarse), retrieval=retrieval, fine_ratio=fine)


def _trained(source: ModelSource) -> BeaconSettings | None:
    if source.beacons is None:
        return None
    from longlora_cli.beacon.weights import read_record

    return read_record(source.beacons)[0]


def _refuse_beside(section: PastSection) -> None:
    """What a run's own beacons leave without effect; where beacons are asked for the settings refuse it."""
    if section.kv_bits != FULL_BITS:
        raise SettingsError(
            f"--kv-bits {section.kv_bits} has no effect here: keys and values of beacons are kept whole"
        )
    if section.given("prefill_chunk"):
        raise SettingsError("--prefill-chunk has no effect here: beacons read window by window")
