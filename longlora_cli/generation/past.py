"""How what a model has read is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longlora_cli.sections import CacheSection

FULL_BITS = 16
"""The value of `--kv-bits` that keeps keys and values in the model's own number format."""


@dataclass(frozen=True)
class Past:
    """How what was read is kept.

    Args:
        kv_bits: Bits of a key's or value's number: 16 (the model's own format), 8 or 4.
    """

    kv_bits: int = FULL_BITS

    def to_json(self) -> dict[str, Any]:
        """What decides an answer besides the model; empty for a plain cache."""
        return {} if self.kv_bits == FULL_BITS else {"kv_bits": self.kv_bits}


def past_of(section: CacheSection) -> Past:
    """How the settings of a command want it."""
    return Past(kv_bits=section.kv_bits)


PLAIN = Past()
"""Keys and values of every token as the model makes them."""
