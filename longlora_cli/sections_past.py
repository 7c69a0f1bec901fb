"""How what was read is kept for answers: in what numbers, or compressed by beacons."""

from __future__ import annotations

from pydantic import model_validator

from longlora_cli.section import setting
from longlora_cli.sections import RopeSection
from longlora_cli.sections_beacon import BeaconUseSection
from longlora_cli.values import KvBits, Length


class PastSection(BeaconUseSection, RopeSection):
    """How what was read is kept for answers."""

    kv_bits: KvBits = setting(
        16, "Bits of a number in keys and values: 16 (the model's own format), or 8 or 4 from 256 tokens on."
    )
    prefill_chunk: Length = setting(4096, "Most tokens read at one time before answering.", ge=1)

    @model_validator(mode="after")
    def _past_can_be_kept_so(self) -> PastSection:
        if self.asks_for_beacons:
            self.needs("kv_bits", self.kv_bits == 16, "keys and values of beacons are kept whole")
            self.needs("prefill_chunk", False, "beacons read window by window")
            if self.rope == "dynamic":
                raise ValueError(
                    "--rope dynamic moves what beacons keep: their keys cannot follow the length"
                )
        if self.kv_bits != 16:
            if self.rope == "dynamic":
                raise ValueError(
                    f"--kv-bits {self.kv_bits} and --rope dynamic, which reads each text at once"
                )
            self.needs("prefill_chunk", self.prefill_chunk < 256, "--kv-bits reads in blocks of 256 tokens")
        return self

    def check_past(self, *, makes: bool, scores_texts: bool) -> None:
        """Refuse what an evaluation leaves without effect, or cannot have.

        Args:
            makes: Samples are only written.
            scores_texts: Perplexity is measured.

        Raises:
            ValueError: One line.
        """
        for name in ("kv_bits", *BeaconUseSection.model_fields):
            self.needs(name, not makes, "--make measures no model")
        if scores_texts and self.retrieval_method != "none":
            raise ValueError("--retrieval-method needs a question to search by: --tasks ppl asks none")

    @property
    def asks_for_beacons(self) -> bool:
        """A setting was given that belongs to beacons."""
        return any(self.given(name) for name in BeaconUseSection.model_fields)
