"""`longlora merge` from the command line: exit codes, one JSON object, a table for people."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from longlora_cli.commands import merge
from longlora_cli.config import MergeConfig


def longlora(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longlora_cli", "merge", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_weights_are_typed_side_by_side_and_the_result_is_one_json_object(
    tiny_model_folder, tmp_path, server
):
    out = tmp_path / "out"
    words = ["merge", tiny_model_folder, tiny_model_folder, "--weights", "0.7", "0.3", "--out", out, "--json"]
    printed, err = (done := server.start(*words)).communicate()
    result = json.loads(printed)

    assert done.returncode == 0, err
    assert printed.count("\n") == 1
    assert result["weights"] == [0.7, 0.3]
    assert result["probe"]["mean_difference"] <= result["probe"]["bound"]
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == 512


def test_people_get_a_table_and_no_library_noise(tiny_model_folder, tmp_path):
    done = longlora(tiny_model_folder, tiny_model_folder, "--weights", "1", "1", "--out", tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr == "longlora: warning: the weights sum to 2, not to 1\n"
    assert "Loading" not in done.stdout
    assert "probe: logits differ" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["MODEL", "MODEL", "--weights", "1"], 2, "1 --weights for 2 sources"),
        (["MODEL", "MODEL", "--weights", "nan", "1"], 2, "finite"),
        (["MODEL", "--keep-adapter"], 2, "one source is not mixed"),
        (["MODEL", "MODEL", "--keep-adapter", "--base-weights", "original"], 2, "holds no base weights"),
        (["MODEL", "MODEL", "--keep-adapter"], 4, "whole model"),
        (["MODEL", "MODEL", "--base-weights", "original"], 2, "no source is an adapter"),
        (["MODEL", "MODEL", "--model", "MODEL"], 2, "no source is an adapter"),
        (["./nothing", "MODEL"], 3, "no model folder"),
        (["MODEL", "OTHER"], 4, "only one of"),
    ],
)
def test_what_cannot_be_merged_ends_with_its_exit_code_and_nothing_written(
    tiny_model_folder, tmp_path, capsys, arguments, code, told
):
    from longlora_cli.cli import main

    other = tmp_path / "other"
    if "OTHER" in arguments:
        config = AutoConfig.from_pretrained(tiny_model_folder, num_hidden_layers=1)
        AutoModelForCausalLM.from_config(config).save_pretrained(other)
    names = {"MODEL": str(tiny_model_folder), "OTHER": str(other)}
    with pytest.raises(SystemExit) as ended:
        main(["merge", *[names.get(a, a) for a in arguments], "--out", str(tmp_path / "out")])
    assert ended.value.code == code
    assert not (tmp_path / "out").exists()
    assert told in capsys.readouterr().err


def test_every_setting_of_the_command_is_read():
    source = inspect.getsource(merge)
    assert [name for name in MergeConfig.model_fields if f"config.{name}" not in source] == []
