"""Work and time of an evaluation, by arithmetic that is checked by counting."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from longlora_cli.evaluation.estimate import Pace, Reading, pace_of, reading_flops
from longlora_cli.models.loading import ModelFacts

FACTS = ModelFacts(layers=3, width=8, heads=2, kv_heads=1, head_dim=4, vocabulary=10)
PARAMETERS = 1000


@dataclass(frozen=True)
class Said:
    ids: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float


@pytest.mark.parametrize(("tokens", "reused"), [(1, 0), (9, 0), (9, 4)])
def test_flops_are_those_counted_token_by_token_to_half_a_token(tokens: int, reused: int) -> None:
    counted = 0.0
    for place in range(reused, tokens):
        keys = place + 0.5  # a token sees all before it, and half of itself in the limit of many
        counted += 2 * PARAMETERS + 3 * 2 * (2 * 2 * 4 * keys)
    assert reading_flops(FACTS, PARAMETERS, Reading(tokens, reused)) == pytest.approx(counted, rel=1e-12)


def test_the_prompt_that_gave_the_pace_takes_its_own_time() -> None:
    pace = pace_of(FACTS, PARAMETERS, Said([1] * 5, 100, 2.0, 0.4))
    assert pace.seconds([Reading(100, new_tokens=1)]) == pytest.approx(2.0 + 0.1)


def test_parts_that_one_cache_holds_one_after_another_take_the_time_of_the_whole() -> None:
    pace = Pace(FACTS, PARAMETERS, 1e6, 0.0)
    parts = [Reading(10), Reading(25, 10), Reading(40, 25)]
    assert pace.seconds(parts) == pytest.approx(pace.seconds([Reading(40)]))
