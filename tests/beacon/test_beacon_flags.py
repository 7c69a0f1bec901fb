"""Flags of beacons: one line for each combination that cannot work or would have no effect."""

from __future__ import annotations

from typing import Any

import pytest

from longlora_cli.beacon.choice import evaluated, settings_of
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.errors import SettingsError
from longlora_cli.options import resolve
from longlora_cli.sections_beacon import BeaconUseSection

NEEDED = {"data": ["d"], "out": "o"}


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"beacon_ratio": ["3"]}, "--beacon-ratio 3 does not divide --beacon-window 1024"),
        ({"beacon_ratio": ["2"], "eval_data": "e", "eval_beacon_ratio": "7"}, "--eval-beacon-ratio 7 does not"),
        ({"beacon_ratio": ["2"], "beacon_stride": "2k"}, "--beacon-stride 2048 is above --beacon-window 1024"),
        ({"beacon_ratio": ["2"], "beacon_stride": "512"}, "that needs --beacon-position append"),
        ({"beacon_ratio": ["0"]}, "--beacon-ratio 0 alone compresses nothing"),
        ({"beacon_ratio": ["2"], "beacon_sink": "2k"}, "--beacon-sink 2048 is above --beacon-window 1024"),
        ({"beacon_ratio": ["2,-4"]}, "greater than or equal to 0"),
        ({"beacon_ratio": ["2,4"], "beacon_ratio_mix": "dice"}, "--beacon-ratio-mix dice: one of step-random"),
        ({"beacon_ratio": ["2"], "beacon_ratio_mix": "sequence"}, "there is one ratio"),
        ({"beacon_ratio": ["2"], "beacon": True}, "--beacon has no effect here"),
        ({"beacon_window": "512"}, "--beacon-window has no effect here"),
        ({"beacon_ratio": ["2"], "beacon_param": ["x"]}, "--beacon-param x: of q, k, v, o"),
        ({"beacon_ratio": ["2"], "beacon_attend_prev": False}, "--beacon-attend-prev has no effect here"),
        ({"beacon_ratio": ["2"], "eval_beacon_ratio": "2"}, "there is no --eval-data"),
        ({"beacon_ratio": ["2"], "max_length": "auto"}, "--max-length auto has no effect here"),
        ({"beacon_ratio": ["2"], "rope": "dynamic"}, "--rope dynamic changes positions"),
        (
            {"beacon_ratio": ["2"], "eval_data": "e", "eval_method": "generation"},
            "--eval-method generation reads without beacons",
        ),
        ({"adapter": "none"}, "--adapter none leaves nothing to train"),
        ({"adapter": "none", "beacon": True, "lora_rank": "4"}, "--lora-rank has no effect here"),
    ],
)  # fmt: skip
def test_a_combination_that_cannot_work_is_refused_with_one_line(flags: dict[str, Any], line: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve("train", NEEDED | flags)
    assert line in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["engine", "plan", "s2_group", "gpu_memory", "host_memory", "disk_offload"])
def test_settings_of_the_memory_engine_are_refused_beside_beacons(name: str) -> None:
    values = {"engine": "fused", "plan": ["group=2"], "s2_group": "64"}
    with pytest.raises(SettingsError, match=rf"--{name.replace('_', '-')} has no effect here: beacons"):
        resolve("train", NEEDED | {"beacon_ratio": ["2"], name: values.get(name, "1GB")})


def test_every_flag_reaches_the_settings_of_the_core() -> None:
    flags = {
        "beacon_ratio": ["0", "2", "8"], "beacon_ratio_mix": "adapt-64", "beacon_window": "64",
        "beacon_stride": "32", "beacon_attention": "segmentation", "beacon_position": "append",
        "beacon_attend_prev": False, "beacon_param": ["q,k,v,o"], "beacon_sink": "4", "beacon_embed_init": "bos",
    }  # fmt: skip
    found = settings_of(resolve("train", NEEDED | flags))
    assert found == BeaconSettings(
        64, 32, (0, 2, 8), "adapt-64", "segmentation", "append", False, ("q", "k", "v", "o"), 4, "bos", 1
    )
    parallel = settings_of(resolve("train", NEEDED | {"beacon_ratio": ["2"], "beacon_parallel_window": "3"}))
    assert parallel is not None
    assert parallel.parallel == 3


def test_beacons_are_off_until_they_are_asked_for() -> None:
    assert settings_of(resolve("train", NEEDED)) is None
    found = settings_of(resolve("train", NEEDED | {"beacon": True}))
    assert found is not None
    assert found.ratios == (2, 4, 8, 16, 32)


@pytest.mark.parametrize(("asked", "ratio"), [({}, 8), ({"eval_beacon_ratio": "4"}, 4)])
def test_evaluations_have_one_ratio_the_largest_or_the_one_asked_for(
    asked: dict[str, Any], ratio: int
) -> None:
    section = resolve("train", NEEDED | {"beacon_ratio": ["2,8,4"], "eval_data": "e"} | asked)
    settings = settings_of(section)
    assert settings is not None
    assert evaluated(section, settings) == settings.with_ratios(ratio)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"beacon_ratio": [8], "beacon_ratio_mix": "sequence"}, "--beacon-ratio-mix has no effect here"),
        ({"retrieval_topk": 2}, "--retrieval-topk has no effect here"),
        ({"retrieval_key_length": "64"}, "--retrieval-key-length has no effect here"),
        ({"retrieval_method": "bm25", "beacon_ratio": [2, 4, 8]}, "at most two --beacon-ratio"),
    ],
)
def test_settings_of_use_without_effect_are_refused(values: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        BeaconUseSection(**values)
