"""Evaluation inside training: on the model as it is, without disturbing the training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from longlora_cli.commands import train
from longlora_cli.config import TrainConfig
from longlora_cli.console import Console
from longlora_cli.errors import SettingsError
from longlora_cli.storage import read_json_lines, sha256_of


@pytest.fixture
def command(tiny_model_folder: Path, tiny_data_folder: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model_folder),
        "data": [tiny_data_folder],
        "device": "cpu",
        "lora_rank": 4,
        "steps": 4,
    }


def run(command: dict[str, Any], **more: Any) -> dict[str, Any]:
    return train.run(TrainConfig(**{**command, **more}), Console(json_mode=True), dry_run=False)


def test_perplexity_is_logged_and_leaves_the_training_as_it_was(
    command: dict[str, Any], tmp_path: Path, tiny_data_folder: Path
) -> None:
    run(command, out=tmp_path / "plain", lora_dropout=0.3)
    result = run(command, out=tmp_path / "r", lora_dropout=0.3, eval_data=tiny_data_folder, eval_every=2)
    rows = [r for r in read_json_lines(tmp_path / "r" / "metrics.jsonl") if "eval_perplexity" in r]
    assert [r["step"] for r in rows] == [2, 4]  # the last one serves as the result too
    assert result["eval_perplexity"] == pytest.approx(math.exp(result["eval_nll"]))
    assert 300 < result["eval_perplexity"] < 700
    files = [tmp_path / n / "adapter" / "adapter_model.safetensors" for n in ("plain", "r")]
    assert sha256_of(files[0]) == sha256_of(files[1])


def test_a_sample_limit_is_kept(command: dict[str, Any], tmp_path: Path, tiny_data_folder: Path) -> None:
    result = run(command, out=tmp_path / "r", eval_data=tiny_data_folder, eval_samples=1)
    assert result["eval_tokens"] == 26  # the labels of the first chunk


def test_generation_is_scored(command: dict[str, Any], tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"input": "What is the code?", "outputs": ["48213"]}) + "\n")
    more = {"eval_data": questions, "eval_method": "generation", "eval_new_tokens": 3}
    result = run(command, out=tmp_path / "r", **more)
    assert {"eval_exact_match", "eval_f1", "eval_accuracy", "eval_rougeL"} <= set(result)
    assert all(0 <= v <= 1 for n, v in result.items() if n.startswith("eval_"))


@pytest.mark.parametrize("method", ["perplexity", "generation"])
def test_data_that_does_not_fit_the_method_is_refused(
    command: dict[str, Any], tmp_path: Path, tiny_data_folder: Path, method: str
) -> None:
    wrong = tiny_data_folder if method == "generation" else tmp_path / "q.jsonl"
    (tmp_path / "q.jsonl").write_text("{}")
    with pytest.raises(SettingsError, match="--eval-data"):
        run(command, out=tmp_path / "r", eval_data=wrong, eval_method=method)
    assert not (tmp_path / "r").exists()


def test_tensorboard_gets_the_log(command: dict[str, Any], tmp_path: Path) -> None:
    run(command, out=tmp_path / "r", report_to=["tensorboard"])
    events = list((tmp_path / "r").rglob("events.out.tfevents.*"))
    assert events
    assert b"train/loss" in events[0].read_bytes()
