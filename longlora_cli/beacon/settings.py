"""Settings of Activation Beacon as the core reads them: plain values, checked by one method, imported without torch.

Activation Beacon: Zhang et al. 2024, "Long Context Compression with Activation Beacon" (arXiv:2401.03462). A window
of raw tokens is followed or interleaved by beacons, whose keys and values stay as memory; those of raw tokens go.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

ATTENTIONS = ("full-coverage", "step-expansion", "segmentation")
POSITIONS = ("interleave", "append")
PROJECTIONS = ("q", "k", "v", "o")
EMBED_INITS = ("eos", "bos")
RATIO_MIXES = ("step-random", "instance-random", "sequence")
_ADAPTIVE = re.compile(r"adapt-(\d+)")


@dataclass(frozen=True)
class BeaconSettings:
    """How the past is compressed.

    Args:
        window: Raw tokens of a window, all of which attend to each other and to the memory.
        stride: Raw tokens that a closed window turns into memory; the last `window - stride` stay raw. None: `window`.
        ratios: Raw tokens per beacon to choose from; 0 keeps a window's raw keys and values as memory.
        ratio_mix: How one is chosen: `step-random` (for each window), `instance-random` (for each sequence),
            `sequence` (in turn), `adapt-N` (the smallest with room for N more tokens). A single ratio needs no choice.
        attention: What a beacon sees of its window: `full-coverage` (all before it), `step-expansion` (the raw tokens
            up to the end of its own unit), `segmentation` (its own unit). All see the memory.
        position: Beacons stand after each unit (`interleave`) or at the window's end (`append`).
        attend_prev: A beacon sees the earlier beacons of its window.
        projections: Linear layers of which beacons have a copy of their own, of `q`, `k`, `v`, `o`.
        sink: First tokens of a sequence whose keys and values always stay (attention sink: Xiao et al. 2023,
            arXiv:2309.17453).
        embed_init: Token whose embedding beacons start from: `eos` or `bos`.
        parallel: Windows in one forward pass; the result is the same for any number.
    """

    window: int = 1024
    stride: int | None = None
    ratios: tuple[int, ...] = (2, 4, 8, 16, 32)
    ratio_mix: str = "step-random"
    attention: str = "full-coverage"
    position: str = "interleave"
    attend_prev: bool = True
    projections: tuple[str, ...] = ("q", "k", "v")
    sink: int = 0
    embed_init: str = "eos"
    parallel: int = 1

    @property
    def hop(self) -> int:
        """Raw tokens that a closed window turns into memory: the stride, by default the window."""
        return self.window if self.stride is None else self.stride

    @property
    def reserve(self) -> int | None:
        """N of `adapt-N`, or None for another mix."""
        found = _ADAPTIVE.fullmatch(self.ratio_mix)
        return int(found[1]) if found else None

    @property
    def masked(self) -> bool:
        """True when a window needs more than a causal mask, because beacons do not see all that is before them.

        Raw tokens then never see beacons of their own window, so that interleaved and appended beacons differ only in
        when they are computed.
        """
        return self.attention != "full-coverage" or not self.attend_prev

    def with_ratios(self, *ratios: int) -> BeaconSettings:
        """The same with other ratios."""
        return replace(self, ratios=tuple(ratios))

    def validate(self) -> None:
        """Refuse values that cannot be used, or would have no effect, together.

        Raises:
            ValueError: One line, with the values.
        """
        if self.window < 1:
            raise ValueError(f"a beacon window of {self.window} tokens: it has one or more")
        if not 1 <= self.hop <= self.window:
            raise ValueError(
                f"a beacon stride of {self.hop} in a window of {self.window}: 1 to {self.window}"
            )
        if self.hop < self.window and self.position == "interleave":
            raise ValueError(
                f"a beacon stride of {self.hop} below the window of {self.window} needs appended beacons"
            )
        self._check_choices()
        self._check_ratios()
        if not 0 <= self.sink <= self.hop:
            raise ValueError(f"a beacon sink of {self.sink} tokens: 0 to {self.hop}, the stride")
        if not self.attend_prev and self.attention == "full-coverage" and self.position == "interleave":
            raise ValueError(
                "interleaved beacons with full coverage see what is before them, so also earlier beacons"
            )
        if self.parallel < 1:
            raise ValueError(f"{self.parallel} beacon windows in parallel: one or more")
        if self.parallel > 1 and self.hop < self.window:
            raise ValueError(f"parallel windows cannot overlap: stride {self.hop}, window {self.window}")

    def _check_choices(self) -> None:
        choices = {
            "attention": (self.attention, ATTENTIONS),
            "position": (self.position, POSITIONS),
            "embedding init": (self.embed_init, EMBED_INITS),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"beacon {name} {value!r}: {', '.join(known)}")
        if self.ratio_mix not in RATIO_MIXES and self.reserve is None:
            raise ValueError(f"beacon ratio mix {self.ratio_mix!r}: {', '.join(RATIO_MIXES)} or adapt-N")
        unknown = [name for name in self.projections if name not in PROJECTIONS]
        if unknown or len(set(self.projections)) < len(self.projections):
            raise ValueError(f"beacon projections {','.join(self.projections)}: each of q, k, v, o once")

    def _check_ratios(self) -> None:
        if not self.ratios:
            raise ValueError("there is no beacon ratio: give one or more")
        for ratio in self.ratios:
            if ratio < 0 or (ratio and self.hop % ratio):
                rule = "the window" if self.hop == self.window else "the stride"
                raise ValueError(f"beacon ratio {ratio} does not divide {rule} of {self.hop} tokens")

    def to_json(self) -> dict[str, Any]:
        """As stored beside weights and sessions."""
        return asdict(self) | {"ratios": list(self.ratios), "projections": list(self.projections)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> BeaconSettings:
        """The inverse of `to_json`."""
        lists = {name: tuple(content[name]) for name in ("ratios", "projections")}
        return cls(**{**content, **lists})
