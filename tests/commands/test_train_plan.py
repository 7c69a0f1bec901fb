"""The longest context that fits is trained on, whatever the data was prepared for, and a run keeps it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_tiny_model

from longlora_cli.commands import train, train_plan
from longlora_cli.config import TrainConfig
from longlora_cli.console import Console
from longlora_cli.errors import SettingsError
from longlora_cli.memory import host_embedding
from longlora_cli.models.source import AdapterRecord
from longlora_cli.storage import read_json_lines, sha256_of
from longlora_cli.training import checkpoint
from longlora_cli.training.engine import Planner


@pytest.fixture
def auto(tiny_model_folder: Path, tiny_data_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model_folder),
        "data": [str(tiny_data_folder)],
        "device": "cpu",
        "lora_rank": 4,
        "max_length": "auto",
        "out": tmp_path / "run",
        "epochs": 1,
        "batch_size": 2,
        "save_every": 10,
    }


def run(settings: dict[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
    return train.run(TrainConfig(**settings), Console(json_mode=True), dry_run=dry_run)


def test_chunks_longer_than_what_fits_are_cut_there_and_all_trained_on(
    auto: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Planner, "longest", lambda self: 80)
    result = run(auto)
    assert result["steps"] == 24 * 3 // 2  # 96 tokens in pieces of 40, 40 and 16, two in a batch
    record = AdapterRecord.read(auto["out"] / "adapter")
    assert record is not None
    assert record.context_length == 40


def test_a_run_keeps_its_length_when_other_memory_is_free_later(
    auto: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Planner, "longest", lambda self: 80)
    run(auto)
    monkeypatch.setattr(Planner, "longest", lambda self: 128)
    again = run(auto)
    assert again["context_length"] == 40


def test_what_fits_beyond_the_data_is_no_longer_than_the_data(auto: dict[str, Any]) -> None:
    assert run(auto, dry_run=True)["context_length"] == 96


def test_a_probe_measures_what_the_plan_predicts(auto: dict[str, Any]) -> None:
    facts = run(auto | {"probe": True}, dry_run=True)
    assert facts["measured"]["loss"] == pytest.approx(6.2, abs=0.5)  # random weights over 512 tokens: ln 512
    assert facts["measured"]["seconds"] > 0
    assert facts["predicted"]["seconds"] > 0
    assert not auto["out"].exists()


def test_a_probe_predicts_what_it_measured_once_it_has_measured_it(
    auto: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    facts = train.run(TrainConfig(**auto | {"probe": True}), Console(), dry_run=True)
    assert facts["calibrated"]["seconds"] == pytest.approx(facts["measured"]["seconds"], rel=0.1)
    assert facts["calibration"]["seconds_ratio"] != 1.0
    assert facts["calibration"]["copy_bytes_per_second"] > 0
    shown = capfd.readouterr()
    assert "calibrated" in shown.out + shown.err
    assert "GB/s" in shown.out + shown.err


def test_a_probe_of_the_generic_path_measures_and_corrects_nothing(auto: dict[str, Any]) -> None:
    facts = run(auto | {"probe": True, "engine": "generic"}, dry_run=True)
    assert facts["measured"]["seconds"] > 0
    assert "calibrated" not in facts


@pytest.mark.parametrize(("long_tokens", "first"), [(192, 16), (193, 96)])
def test_a_probe_of_many_tokens_warms_up_with_few(
    auto: dict[str, Any], monkeypatch: pytest.MonkeyPatch, long_tokens: int, first: int
) -> None:
    from longlora_cli.training import probe

    widths = []
    real = probe._forward_backward

    def watched(loaded: Any, batch: dict[str, Any]) -> float:
        widths.append(batch["input_ids"].shape)
        return real(loaded, batch)

    monkeypatch.setattr(probe, "_LONG_TOKENS", long_tokens)
    monkeypatch.setattr(probe, "_SHORT_TOKENS", 16)
    monkeypatch.setattr(probe, "_forward_backward", watched)
    run(auto | {"probe": True}, dry_run=True)
    assert widths == [(2, first), (2, 96)]


def test_a_probe_without_a_dry_run_is_refused(auto: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="dry-run"):
        run(auto | {"probe": True})


def test_an_embedding_on_the_host_is_refused_on_a_cpu(auto: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="embedding=host has no effect here: on a CPU"):
        run(auto | {"plan": ["embedding=host"]}, dry_run=True)
    assert not auto["out"].exists()


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets a CPU be the host of its own embedding; the sizes of all lookups, as they happen."""
    found: list[int] = []
    look_up = host_embedding._HostRows.look_up

    def counted(self: Any, ids: Any) -> Any:
        found.append(ids.numel())
        return look_up(self, ids)

    monkeypatch.setattr(host_embedding._HostRows, "look_up", counted)
    monkeypatch.setattr(train_plan, "embedding_fault", lambda *args: None)
    return found


@pytest.mark.parametrize("dtype", [pytest.param("fp32", marks=pytest.mark.slow), "bf16"])
def test_a_run_with_its_embedding_on_the_host_trains_evaluates_and_resumes_to_the_same_bits(
    auto: dict[str, Any],
    looked_up: list[int],
    tmp_path: Path,
    tiny_tokenizer_folder: Path,
    dtype: str,
) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"input": "What is the code?", "outputs": ["48213"]}) + "\n")
    auto |= {
        "model": str(make_tiny_model(tmp_path / "m", tiny_tokenizer_folder, tie_word_embeddings=False)),
        "dtype": dtype,
        "steps": 4,
        "save_every": 2,
        "eval_every": 2,
        "eval_data": questions,
        "eval_method": "generation",
        "eval_new_tokens": 3,
    }
    del auto["epochs"]
    run(auto | {"out": tmp_path / "gpu", "plan": ["embedding=gpu"]})
    assert not looked_up
    host = auto | {"out": tmp_path / "host", "plan": ["embedding=host"]}
    run(host)
    assert looked_up.count(192) == 4  # the steps
    assert 1 in looked_up  # tokens of an answer, with a cache
    shutil.rmtree(tmp_path / "host" / "adapter")
    shutil.rmtree(checkpoint.folder_of(tmp_path / "host", 4))
    run(host)
    assert looked_up.count(192) == 6
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("gpu", "host")]
    assert sha256_of(files[0]) == sha256_of(files[1])
    rows = [read_json_lines(tmp_path / name / "metrics.jsonl") for name in ("gpu", "host")]
    assert [r.get("loss") for r in rows[0]] == [r.get("loss") for r in rows[1]]
    assert [r.get("eval_f1") for r in rows[0]] == [r.get("eval_f1") for r in rows[1]]


def test_a_probe_of_a_plan_with_the_embedding_on_the_host_runs_it(
    auto: dict[str, Any], looked_up: list[int], tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    model = make_tiny_model(tmp_path / "m", tiny_tokenizer_folder, tie_word_embeddings=False)
    facts = run(auto | {"model": str(model), "plan": ["embedding=host"], "probe": True}, dry_run=True)
    assert facts["plan"]["input embedding"].startswith("host (0.1 MiB)")
    assert looked_up == [192] * 3  # two steps and an evaluation
