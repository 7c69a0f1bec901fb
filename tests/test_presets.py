"""A preset is a set of defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from longlora_cli.errors import SettingsError
from longlora_cli.options import resolve
from longlora_cli.presets import PRESETS


def settings(**flags: Any) -> Any:
    return resolve("eval", {"out": "x", **flags})


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_a_valid_evaluation_by_itself(name: str) -> None:
    found = settings(preset=name)
    assert {key: getattr(found, key) for key in PRESETS[name]} == PRESETS[name]


def test_what_is_given_wins_over_the_preset() -> None:
    found = settings(preset="quick", samples="7")
    assert (found.samples, found.depths) == (7, 11)


def test_a_recipe_wins_over_the_preset(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("eval: {depths: 3}")
    assert resolve("eval", {"out": "x", "preset": "quick"}, tmp_path / "r.yaml").depths == 3


def test_settings_of_a_preset_that_other_tasks_do_not_need_are_no_fault() -> None:
    assert settings(preset="smoke", tasks="ppl").lengths == PRESETS["smoke"]["lengths"]


def test_a_given_setting_without_effect_is_refused_beside_a_preset_too() -> None:
    with pytest.raises(SettingsError, match="--depths has no effect here"):
        settings(preset="smoke", tasks="ppl", depths="4")


def test_no_such_preset_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match="--preset tiny"):
        settings(preset="tiny")


def test_hours_beside_a_share_are_refused() -> None:
    with pytest.raises(SettingsError, match="shares have to be of the same lengths"):
        settings(max_hours="2", shard="1/2")
