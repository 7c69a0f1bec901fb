"""One declaration, four places to set it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from longlora_cli.config import TrainConfig
from longlora_cli.errors import DataError, NotFoundError, SettingsError
from longlora_cli.options import CONFIGS, ENVIRONMENT, expand_lists, flag_of, resolve, write_recipe

NEEDED = {"data": ["d"], "out": "o"}


def recipe(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def test_flag_beats_environment_beats_recipe_beats_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, "train:\n  steps: 1\n  seed: 1\n  lora_rank: 8\n")
    monkeypatch.setenv("LONGLORA_STEPS", "2")
    monkeypatch.setenv("LONGLORA_SEED", "2")
    config = resolve("train", NEEDED | {"steps": "3"}, path)
    assert (config.steps, config.seed, config.lora_rank, config.batch_size) == (3, 2, 8, 1)


@pytest.mark.parametrize("command", sorted(CONFIGS))
def test_a_misspelt_recipe_key_names_its_line_and_the_right_key(tmp_path: Path, command: str) -> None:
    for name in CONFIGS[command].model_fields:
        wrong = name[:-1] + ("z" if name[-1] != "z" else "y")
        path = recipe(tmp_path, f"{command}:\n  {wrong}: 1\n")
        with pytest.raises(SettingsError) as caught:
            resolve(command, {}, path)
        assert f"r.yaml:2: unknown key '{wrong}' in {command}; did you mean" in caught.value.message


def test_an_unknown_command_in_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"r\.yaml:1: unknown command 'trian'; did you mean train\?"):
        resolve("train", NEEDED, recipe(tmp_path, "trian:\n  steps: 1\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", r"r\.yaml:1: not YAML"),
        ("train:\n  steps: 1\n  steps: 2\n", r"r\.yaml:3: key 'steps' is given twice"),
        ("- 1\n", r"r\.yaml:1: a mapping"),
        ("train: 3\n", r"r\.yaml:1: a mapping"),
    ],
)
def test_a_broken_recipe_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        resolve("train", NEEDED, recipe(tmp_path, text))


def test_a_missing_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(NotFoundError, match=r"no recipe nowhere\.yaml"):
        resolve("train", NEEDED, Path("nowhere.yaml"))


def test_a_bad_value_names_where_it_was_written(tmp_path: Path) -> None:
    path = recipe(tmp_path, "train:\n  lora_rank: zero\n")
    with pytest.raises(SettingsError, match=r"r\.yaml:2: lora_rank zero: input should be a valid integer"):
        resolve("train", NEEDED, path)


def test_a_misspelt_environment_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGLORA_STEPZ", "2")
    with pytest.raises(SettingsError, match="did you mean LONGLORA_STEPS"):
        resolve("train", NEEDED)


def test_another_commands_variable_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGLORA_WINDOW", "64")
    assert resolve("train", NEEDED).steps is None


def test_a_missing_required_setting_is_named() -> None:
    with pytest.raises(SettingsError, match="--data is missing"):
        resolve("train", {"out": "o"})


def test_what_ran_is_repeated_by_its_recipe(tmp_path: Path) -> None:
    config = resolve("train", NEEDED | {"max_length": "32k", "rope": "yarn", "report_to": ["tensorboard"]})
    again = resolve("train", {}, recipe(tmp_path, write_recipe("train", config)))
    assert again == config
    assert again.model_fields_set == config.model_fields_set


def test_a_list_flag_takes_several_words() -> None:
    words = ["a", "b", "--weights", "0.7", "-0.3", "--out", "x"]
    assert expand_lists("merge", words) == ["a", "b", "--weights", "0.7", "-0.3", "--out", "x"]
    words = ["--weights", "0.7", "0.3", "a", "b"]
    assert expand_lists("merge", words) == ["--weights", "0.7", "--weights", "0.3", "a", "b"]


def test_every_shipped_recipe_parses() -> None:
    folder = Path(__file__).parent.parent / "longlora_cli" / "recipes"
    recipes = sorted(folder.glob("*.yaml"))
    assert recipes
    for path in recipes:
        for command in yaml.safe_load(path.read_text()):
            needed = {"out": "o", "data": ["d"], "inputs": ["i"], "sources": ["s"]}
            given = {k: v for k, v in needed.items() if k in CONFIGS[command].model_fields}
            assert resolve(command, given, path)


def test_flags_variables_and_keys_have_one_name() -> None:
    assert flag_of("max_length") == "--max-length"
    assert ENVIRONMENT + "max_length".upper() == "LONGLORA_MAX_LENGTH"
    assert "max_length" in TrainConfig.model_fields
