"""Settings of the beacon core: what is refused, and that they survive a file."""

from __future__ import annotations

from typing import Any

import pytest

from longlora_cli.beacon.settings import BeaconSettings


def test_the_defaults_are_valid_and_the_stride_is_the_window() -> None:
    settings = BeaconSettings()
    settings.validate()
    assert settings.hop == settings.window == 1024
    assert settings.reserve is None


def test_adaptive_mixes_carry_their_reserve() -> None:
    settings = BeaconSettings(ratio_mix="adapt-512")
    settings.validate()
    assert settings.reserve == 512


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"window": 0}, "window of 0"),
        ({"stride": 2048}, "stride of 2048 in a window of 1024"),
        ({"stride": 0}, "stride of 0"),
        ({"stride": 512}, "needs appended beacons"),
        ({"ratios": (3,)}, "ratio 3 does not divide the window of 1024"),
        ({"stride": 512, "position": "append", "ratios": (1024,)}, "does not divide the stride of 512"),
        ({"ratios": (-2,)}, "ratio -2"),
        ({"ratios": ()}, "no beacon ratio"),
        ({"ratio_mix": "adapt-"}, "ratio mix 'adapt-'"),
        ({"attention": "causal"}, "attention 'causal'"),
        ({"position": "prepend"}, "position 'prepend'"),
        ({"embed_init": "pad"}, "embedding init 'pad'"),
        ({"projections": ("q", "x")}, "projections q,x"),
        ({"projections": ("q", "q")}, "projections q,q"),
        ({"sink": 1025}, "sink of 1025"),
        ({"attend_prev": False}, "interleaved beacons with full coverage"),
        ({"parallel": 0}, "0 beacon windows in parallel"),
        ({"parallel": 2, "stride": 512, "position": "append"}, "parallel windows cannot overlap"),
    ],
)
def test_values_that_cannot_be_used_are_refused_in_one_line(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part.replace("(", r"\(")) as caught:
        BeaconSettings(**changes).validate()
    assert "\n" not in str(caught.value)


def test_settings_survive_json() -> None:
    import json

    settings = BeaconSettings(
        window=8, stride=4, ratios=(2, 0), position="append", sink=1, projections=("q", "o")
    )
    assert BeaconSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
