"""How long an evaluation will take, said before it begins.

Reading a prompt costs 2 FLOPs a linear parameter and token, and attention in proportion to the square of its length;
one measured prompt says how many of them the machine does in a second, and how long a new token takes. Answers are
counted at their longest, so the estimate is an upper one where a model ends its answers itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from longlora_cli.models.loading import ModelFacts

# Short prompts run far below a GPU's rate, and a longer one than this costs more time than the estimate is worth.
PROBE_TOKENS = 4096
PROBE_NEW_TOKENS = 8


@dataclass(frozen=True)
class Reading:
    """Something a model reads and answers.

    Args:
        tokens: Length of the prompt.
        reused: How many of them a cache holds already.
        new_tokens: Longest answer.
    """

    tokens: int
    reused: int = 0
    new_tokens: int = 0


@dataclass(frozen=True)
class Pace:
    """What a machine does with a model.

    Args:
        facts: Sizes of the model.
        linear_parameters: Parameters of its linear layers; the head counts for one token a prompt, and is left out.
        flops_per_second: Of reading.
        new_token_seconds: Time of a new token.
    """

    facts: ModelFacts
    linear_parameters: int
    flops_per_second: float
    new_token_seconds: float

    def seconds(self, readings: Iterable[Reading]) -> float:
        """Time for all of them."""
        return sum(
            reading_flops(self.facts, self.linear_parameters, reading) / self.flops_per_second
            + self.new_token_seconds * reading.new_tokens
            for reading in readings
        )


def reading_flops(facts: ModelFacts, linear_parameters: int, reading: Reading) -> float:
    """FLOPs of reading the tokens that no cache holds: each attends to itself and all before it."""
    fresh = reading.tokens - reading.reused
    pairs = (reading.tokens**2 - reading.reused**2) / 2
    return 2.0 * linear_parameters * fresh + 4.0 * pairs * facts.heads * facts.head_dim * facts.layers


class Timed(Protocol):
    """What one prompt and its answer cost, as `generation.session.Answer` says it."""

    @property
    def ids(self) -> Sequence[int]:
        """The new tokens."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""

    @property
    def prefill_seconds(self) -> float:
        """Until the first new token."""

    @property
    def decode_seconds(self) -> float:
        """From then on."""


def pace_of(facts: ModelFacts, linear_parameters: int, said: Timed) -> Pace:
    """The pace that one prompt showed; it should have about `PROBE_TOKENS`, and a few new tokens."""
    flops = reading_flops(facts, linear_parameters, Reading(said.prompt_tokens))
    return Pace(
        facts,
        linear_parameters,
        flops / max(said.prefill_seconds, 1e-9),
        said.decode_seconds / max(len(said.ids) - 1, 1),
    )
