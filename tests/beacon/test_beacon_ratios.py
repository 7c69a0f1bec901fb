"""Which ratio a window gets, in each mix."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.beacon.ratios import RatioSource, adapted
from longlora_cli.beacon.settings import BeaconSettings


def source(mix: str, ratios: tuple[int, ...] = (2, 4, 8), *, seed: int = 0, **options: object) -> RatioSource:
    settings = BeaconSettings(window=8, ratios=ratios, ratio_mix=mix)
    return RatioSource(settings, generator=Random(seed), **options)  # type: ignore[arg-type]


def first(ratios: RatioSource, count: int = 60) -> list[int]:
    return [ratios.of_window(number) for number in range(count)]


def test_step_random_draws_each_window_anew() -> None:
    drawn = first(source("step-random"))
    assert set(drawn) == {2, 4, 8}
    assert drawn == first(source("step-random"))
    assert drawn != first(source("step-random", seed=1))


def test_instance_random_draws_once_for_a_sequence() -> None:
    found = {tuple(set(first(source("instance-random", seed=seed)))) for seed in range(20)}
    assert found == {(2,), (4,), (8,)}


def test_sequence_takes_ratios_in_turn() -> None:
    assert first(source("sequence", (8, 0, 2)), 7) == [8, 0, 2, 8, 0, 2, 8]


def test_a_single_ratio_needs_no_mix_and_no_draw() -> None:
    generator = Random(0)
    state = generator.getstate()
    ratios = RatioSource(BeaconSettings(window=8, ratios=(4,)), generator=generator)
    assert first(ratios) == [4] * 60
    assert generator.getstate() == state


def test_a_window_has_one_ratio_however_often_and_in_which_order_it_is_asked() -> None:
    forward, backward = source("step-random"), source("step-random")
    expected = first(forward)
    assert [backward.of_window(number) for number in reversed(range(60))] == expected[::-1]
    assert first(forward) == expected


def test_adapt_takes_the_smallest_ratio_that_holds_the_text_and_keeps_it() -> None:
    settings = BeaconSettings(window=8, ratios=(8, 2, 4), ratio_mix="adapt-4")
    # 32 positions hold 8 + 5*8 = 48 tokens at ratio 2, 8 + 11*8 = 96 at 4, 8 + 23*8 = 192 at 8.
    assert [adapted(tokens, settings, 32) for tokens in (1, 48, 49, 96, 97, 192, 193)] == [
        2,
        2,
        4,
        4,
        8,
        8,
        8,
    ]
    ratios = RatioSource(settings, limit=32)
    ratios.expect(45)
    assert ratios.of_window(0) == 4  # 45 + 4 tokens to come
    ratios.expect(500)
    assert ratios.of_window(1) == 4


def test_adapt_takes_no_compression_while_the_text_fits() -> None:
    settings = BeaconSettings(window=8, ratios=(0, 2), ratio_mix="adapt-0")
    assert [adapted(tokens, settings, 32) for tokens in (32, 33)] == [0, 2]


@given(st.integers(0, 99), st.integers(17, 90), st.sampled_from(["step-random", "sequence"]))
def test_training_leaves_at_most_one_window_raw_and_one_more_follows_it(
    seed: int, tokens: int, mix: str
) -> None:
    ratios = source(mix, (0, 2), seed=seed, training=True, tokens=tokens)
    compressed = -(-(tokens - 8) // 8)
    drawn = first(ratios, compressed)
    assert drawn.count(0) <= 1
    assert drawn[-1] == 2


@pytest.mark.parametrize("mix", ["instance-random", "adapt-0"])
def test_training_never_leaves_all_windows_raw(mix: str) -> None:
    for seed in range(10):
        ratios = source(mix, (0, 2), seed=seed, training=True, tokens=40, limit=1000)
        ratios.expect(40)
        assert first(ratios, 4) == [2] * 4


@pytest.mark.parametrize("mix", ["step-random", "adapt-4"])
def test_a_source_survives_json_and_a_fork(mix: str) -> None:
    settings = BeaconSettings(window=8, ratios=(2, 4, 8), ratio_mix=mix)
    ratios = RatioSource(settings, generator=Random(0), limit=32)
    ratios.expect(60)
    ratios.of_window(2)
    again = RatioSource.from_json(json.loads(json.dumps(ratios.to_json())), settings)
    fork = ratios.fork()
    expected = first(ratios)
    assert first(again) == expected
    assert first(fork) == expected


def test_a_fork_that_runs_ahead_does_not_move_the_others() -> None:
    ratios, untouched = source("step-random"), source("step-random")
    fork = ratios.fork()
    fork.of_window(20)
    ratios.of_window(9)
    assert first(fork) == first(ratios) == first(untouched)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (BeaconSettings(), "step-random needs a generator"),
        (BeaconSettings(ratio_mix="adapt-1"), "needs the model's length"),
    ],
)
def test_a_mix_without_what_it_needs_is_refused(settings: BeaconSettings, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        RatioSource(settings)
