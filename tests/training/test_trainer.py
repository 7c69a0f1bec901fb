"""Training: resumed equals uninterrupted, one batch equals several, nothing not finite reaches the weights."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Server
from safetensors.torch import load_file

from longlora_cli.commands import train
from longlora_cli.config import TrainConfig
from longlora_cli.console import Console
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.ordering import cost_balance, reading_order
from longlora_cli.errors import DataError, IntegrityError, NumericError, SettingsError
from longlora_cli.storage import read_json_lines, sha256_of, verify_folder
from longlora_cli.training import checkpoint


@pytest.fixture
def command(tiny_model_folder: Path, tiny_data_folder: Path) -> dict[str, Any]:
    return {"model": str(tiny_model_folder), "data": [str(tiny_data_folder)], "device": "cpu", "lora_rank": 4}


def run(command: dict[str, Any], **more: Any) -> dict[str, Any]:
    return train.run(TrainConfig(**{**command, **more}), Console(json_mode=True), dry_run=False)


def flags(command: dict[str, Any]) -> list[str]:
    words = []
    for name, value in command.items():
        words += [f"--{name.replace('_', '-')}", str(value[0] if isinstance(value, list) else value)]
    return words


def launch(command: dict[str, Any], *launcher: str) -> str:
    """Train in processes that a launcher starts; what they printed."""
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "longlora_cli", "train", *flags(command)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(folder / "adapter" / "adapter_model.safetensors")
    return tensors


def adapter_hash(folder: Path) -> str:
    return sha256_of(folder / "adapter" / "adapter_model.safetensors")


def test_training_lowers_the_loss_and_leaves_a_whole_run(command: dict[str, Any], tmp_path: Path) -> None:
    # At 2e-2 the fall was 0.14 to 0.73 by the seed's luck; at 5e-3 in twice the steps it is 1.5 with each of three.
    result = run(command, out=tmp_path / "r", epochs=12, batch_size=4, learning_rate=5e-3)
    rows = read_json_lines(tmp_path / "r" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert result["steps"] == 72
    assert sum(losses[-6:]) < sum(losses[:6]) - 1.0
    assert {"tokens_per_second", "tflops", "peak_host_gib", "learning_rate"} <= set(rows[0])
    verify_folder(tmp_path / "r" / "adapter", "adapter")
    assert json.loads((tmp_path / "r" / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_number_format_trains(command: dict[str, Any], tmp_path: Path, dtype: str) -> None:
    result = run(command, out=tmp_path / "r", steps=2, dtype=dtype)
    assert 5 < result["last_loss"] < 7
    tensors = adapter_of(tmp_path / "r")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert all(t.abs().max() > 0 for n, t in tensors.items() if "lora_B" in n)  # they begin as zeros


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_trains_on_a_cpu(command: dict[str, Any], tmp_path: Path, quantization: str) -> None:
    result = run(command, out=tmp_path / "r", steps=8, quantization=quantization, learning_rate=2e-2)
    rows = [r for r in read_json_lines(tmp_path / "r" / "metrics.jsonl") if "loss" in r]
    assert result["steps"] == 8
    assert max(t.abs().max() for n, t in adapter_of(tmp_path / "r").items() if "lora_B" in n) > 0
    assert len(rows) == 8
    assert all(r["grad_norm"] > 0 for r in rows)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_every_optimizer_resumes_bit_for_bit(command: dict[str, Any], tmp_path: Path, optimizer: str) -> None:
    more = {"optimizer": optimizer, "steps": 4, "save_every": 2, "lora_rank": 64, "also_train": "all"}
    run(command, out=tmp_path / "whole", **more)
    run(command, out=tmp_path / "parts", **more)
    cut_back(tmp_path / "parts", 2)
    run(command, out=tmp_path / "parts", **more)
    assert adapter_hash(tmp_path / "parts") == adapter_hash(tmp_path / "whole")


def test_a_run_is_trained_on_at_a_greater_length_with_its_own_positions_and_adapter(
    command: dict[str, Any], tmp_path: Path
) -> None:
    stretch = {"rope": "theta", "rope_theta": 40_000.0}
    run(command, out=tmp_path / "first", steps=2, max_length=512, **stretch)
    begun = {**command, "model": str(tmp_path / "first"), "max_length": 1024}
    del begun["lora_rank"]
    result = run(begun, out=tmp_path / "second", steps=2, learning_rate=1e-9, **stretch)
    assert result["context_length"] == 1024
    assert result["rope"]["max_position_embeddings"] == 1024
    assert result["rope"]["parameters"]["rope_theta"] == 40_000.0
    first, second = adapter_of(tmp_path / "first"), adapter_of(tmp_path / "second")
    for name, value in first.items():  # it began where the first run ended, not at a fresh adapter
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-7)
    record = json.loads((tmp_path / "second" / "adapter" / "longlora.json").read_text())
    assert record["base"] == command["model"]
    assert record["context_length"] == 1024
    with pytest.raises(SettingsError, match="the adapter was trained with"):
        run(begun, out=tmp_path / "third", steps=2, rope="theta", rope_theta=50_000.0)


def test_a_stage_does_not_resume_from_another_run_than_it_began_with(
    command: dict[str, Any], tmp_path: Path
) -> None:
    run(command, out=tmp_path / "first", steps=1)
    begun = {**command, "model": str(tmp_path / "first"), "steps": 4, "save_every": 2}
    del begun["lora_rank"]
    run(begun, out=tmp_path / "second")
    cut_back(tmp_path / "second", 2)
    shutil.rmtree(tmp_path / "first")
    run(command, out=tmp_path / "first", steps=2)
    with pytest.raises(IntegrityError, match="was started with another adapter"):
        run(begun, out=tmp_path / "second")


def test_paged_optimizer_state_on_a_cpu_is_refused(command: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has no effect on a CPU"):
        run(command, out=tmp_path / "r", steps=1, optimizer="paged_adamw_8bit")
    assert not (tmp_path / "r").exists()


def cut_back(folder: Path, step: int) -> None:
    """Make a finished run look as if it had been killed after `step`."""
    shutil.rmtree(folder / "adapter")
    for later in checkpoint.steps_of(folder):
        if later > step:
            shutil.rmtree(checkpoint.folder_of(folder, later))


# Within an epoch, at its end, and at the very end.
@pytest.mark.parametrize("step", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5, 9, 12)), 6, 13])
def test_a_run_resumed_at_any_step_equals_an_uninterrupted_one(
    command: dict[str, Any], tmp_path: Path, step: int
) -> None:
    more = {"steps": 13, "save_every": 1, "keep_checkpoints": 20, "accumulate": 2, "batch_size": 2}
    more |= {"lora_dropout": 0.2, "also_train": "norms", "warmup": 3}
    whole = tmp_path / "whole"
    run(command, out=whole, **more)
    wanted, losses = adapter_hash(whole), [r.get("loss") for r in read_json_lines(whole / "metrics.jsonl")]
    cut_back(whole, step)
    run(command, out=whole, **more)
    assert adapter_hash(whole) == wanted
    assert [r.get("loss") for r in read_json_lines(whole / "metrics.jsonl")][:13] == losses[:13]


def test_two_micro_batches_equal_one_batch(command: dict[str, Any], tmp_path: Path) -> None:
    """Chunks with 25 and 95 labels: equal weights per micro-batch would be far off."""
    once = {"steps": 1, "learning_rate": 1e-3, "also_train": "all"}
    run(command, out=tmp_path / "batch", batch_size=4, **once)
    run(command, out=tmp_path / "micro", accumulate=4, **once)
    batch, micro = (read_json_lines(tmp_path / n / "metrics.jsonl")[0] for n in ("batch", "micro"))
    assert micro["loss"] == pytest.approx(batch["loss"], rel=1e-6)
    assert micro["grad_norm"] == pytest.approx(batch["grad_norm"], rel=1e-5)


def test_two_processes_equal_one_and_only_the_first_prints_and_writes(
    command: dict[str, Any], tmp_path: Path, server: Server
) -> None:
    command |= {"steps": 6, "save_every": 3, "learning_rate": 1e-3}
    run(command, out=tmp_path / "one", accumulate=2)
    out = launch({**command, "out": tmp_path / "two"}, "torch.distributed.run", "--nproc_per_node", "2")
    assert out.count("step 6: loss") == 1
    one, two = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    torch.testing.assert_close(two, one, rtol=0, atol=1e-6)
    assert checkpoint.steps_of(tmp_path / "two") == [6, 3]
    # A mistake is told once, not once per process.
    other = {**command, "out": tmp_path / "two", "lora_rank": 8}
    child = server.start("train", *flags(other), processes=2)
    _, err = child.communicate()
    assert child.returncode == SettingsError.exit_code
    assert err.count("holds another run: lora_rank was 4, now 8") == 1


@pytest.mark.slow
def test_two_processes_resumed_within_a_later_pass_read_what_was_left_of_it(
    command: dict[str, Any], tmp_path: Path, server: Server
) -> None:
    """24 chunks: the second pass begins after 12 steps of two processes."""
    command |= {
        "steps": 16,
        "save_every": 1,
        "keep_checkpoints": 20,
        "learning_rate": 1e-3,
        "out": tmp_path / "r",
    }
    _, err = (child := server.start("train", *flags(command), processes=2)).communicate()
    assert child.returncode == 0, err
    wanted = adapter_hash(tmp_path / "r")
    cut_back(tmp_path / "r", 13)
    _, err = (child := server.start("train", *flags(command), processes=2)).communicate()
    assert child.returncode == 0, err
    assert adapter_hash(tmp_path / "r") == wanted


def test_steps_are_random_and_their_chunks_sorted_by_cost(
    command: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, read = ChunkDataset.open(Path(command["data"][0])), []
    get = ChunkDataset.__getitem__
    monkeypatch.setattr(ChunkDataset, "__getitem__", lambda self, n: (read.append(n), get(self, n))[1])
    run(command, out=tmp_path / "r", epochs=2, seed=3, accumulate=4)
    costs = np.array([data.cost.of(data.document_lengths(n)).sum() for n in range(24)])
    first, second = reading_order(costs, 3, 0, 4), reading_order(costs, 3, 1, 4)
    assert first != second
    assert read[-48:] == first + second
    assert cost_balance(costs[first], 2) > cost_balance(costs[reading_order(costs, 3, 0)], 2)


def test_accelerate_launches_it(command: dict[str, Any], tmp_path: Path) -> None:
    command |= {"out": tmp_path / "r", "steps": 2}
    launch(command, "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    verify_folder(tmp_path / "r" / "adapter", "adapter")


@pytest.mark.parametrize("wanted", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(
    command: dict[str, Any], tmp_path: Path, server: Server, wanted: int
) -> None:
    command |= {"steps": 60, "save_every": 1, "lora_dropout": 0.1}
    run(command, out=tmp_path / "whole")
    draw, kills, attempts = random.Random(5), 0, 0
    folder = tmp_path / "killed"
    while kills < wanted and attempts < wanted + 4:
        attempts += 1
        already = max(checkpoint.steps_of(folder), default=0)
        child = server.start("train", *flags({**command, "out": folder}))
        deadline = time.monotonic() + 60
        while max(checkpoint.steps_of(folder), default=0) <= already and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(draw.random() * 0.08)
        child.send_signal(signal.SIGKILL)
        _, err = child.communicate()
        assert child.returncode in (-signal.SIGKILL, 0), err
        kills += child.returncode == -signal.SIGKILL
    assert kills == wanted
    run(command, out=folder)
    assert adapter_hash(folder) == adapter_hash(tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_says_how_it_ended(
    command: dict[str, Any], tmp_path: Path, server: Server, number: signal.Signals, code: int
) -> None:
    folder = tmp_path / "r"
    child = server.start("train", *flags({**command, "out": folder, "steps": 5000, "save_every": 5000}))
    while not (folder / "metrics.jsonl").exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(number)
    _, err = child.communicate()
    assert child.returncode == code, err
    state = json.loads((folder / "run.json").read_text())
    assert (state["status"], state["exit_code"], state["resumable"]) == ("stopped", code, True)
    newest, faults = checkpoint.newest(folder)
    assert newest is not None
    assert faults == []
    assert f"stopped at step {state['step']}" in err


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run_before_the_weights_see_it(
    command: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from longlora_cli.training.trainer import LongContextTrainer

    seen: dict[str, Any] = {"steps": 0}
    original = LongContextTrainer.training_step

    def poisoned(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = original(self, model, inputs, num_items_in_batch)
        seen["steps"] += 1
        trainable = [p for p in model.parameters() if p.requires_grad]
        seen["before"] = [p.detach().clone() for p in trainable]
        seen["after"] = trainable
        if seen["steps"] == 3:
            if what == "gradient":
                trainable[0].grad[0] = float("nan")
            else:
                self._loss_is_finite = False
        return loss

    monkeypatch.setattr(LongContextTrainer, "training_step", poisoned)
    with pytest.raises(NumericError, match=f"step 3: the {what} is not finite") as caught:
        run(command, out=tmp_path / "r", steps=5, save_every=1)
    assert caught.value.exit_code == 6
    assert all(torch.equal(a, b) for a, b in zip(seen["before"], seen["after"], strict=True))
    assert checkpoint.steps_of(tmp_path / "r") == [2, 1]
    assert json.loads((tmp_path / "r" / "run.json").read_text())["status"] == "failed"


def test_a_loss_that_is_not_finite_is_seen(command: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(NumericError, match="not finite"):
        run(command, out=tmp_path / "r", steps=50, learning_rate=1e30)


def test_another_run_in_the_folder_is_refused_with_the_difference(
    command: dict[str, Any], tmp_path: Path
) -> None:
    run(command, out=tmp_path / "r", steps=1)
    with pytest.raises(SettingsError, match="holds another run: steps was 1, now 2"):
        run(command, out=tmp_path / "r", steps=2)


def test_a_folder_of_something_else_is_refused(command: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match=r"is not empty and holds no run \(notes\.txt\)"):
        run(command, out=tmp_path, steps=1)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_finished_run_takes_no_step(command: dict[str, Any], tmp_path: Path) -> None:
    run(command, out=tmp_path / "r", steps=2)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*")}
    result = run(command, out=tmp_path / "r", steps=2)
    assert result["finished"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*")} == before


def test_data_that_changed_under_a_run_is_refused(
    command: dict[str, Any], tmp_path: Path, tiny_data_folder: Path
) -> None:
    import shutil

    data = Path(shutil.copytree(tiny_data_folder, tmp_path / "d"))
    run({**command, "data": [data]}, out=tmp_path / "r", steps=2, save_every=1)
    shutil.rmtree(tmp_path / "r" / "adapter")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["meta"]["note"] = "prepared again"
    (data / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="started with another data"):
        run({**command, "data": [data]}, out=tmp_path / "r", steps=2, save_every=1)


def test_a_context_shorter_than_the_data_is_refused(command: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="below the longest chunk of the data, 96 tokens"):
        run(command, out=tmp_path / "r", max_length=64)


def test_a_dry_run_writes_nothing(command: dict[str, Any], tmp_path: Path) -> None:
    result = train.run(TrainConfig(**command, out=tmp_path / "r"), Console(json_mode=True), dry_run=True)
    assert result["steps"] == 24
    assert not (tmp_path / "r").exists()


def test_a_dataset_without_its_manifest_does_not_exist(
    command: dict[str, Any], tmp_path: Path, tiny_data_folder: Path
) -> None:
    import shutil

    data = Path(shutil.copytree(tiny_data_folder, tmp_path / "d"))
    (data / "manifest.json").unlink()
    with pytest.raises(DataError, match="is not prepared data, or not whole"):
        run({**command, "data": [data]}, out=tmp_path / "r")


def test_a_run_can_be_trained_on_with_its_own_adapter_and_positions(
    command: dict[str, Any], tmp_path: Path
) -> None:
    run(command, out=tmp_path / "first", steps=3, rope="theta", rope_theta=5e4)
    more = {name: value for name, value in command.items() if name != "lora_rank"}
    more["model"] = str(tmp_path / "first")
    result = run(more, out=tmp_path / "second", steps=3)
    assert result["rope"]["parameters"]["rope_theta"] == 5e4
    first, second = adapter_of(tmp_path / "first"), adapter_of(tmp_path / "second")
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(SettingsError, match="--lora-rank has no effect"):
        run({**more, "lora_rank": 4}, out=tmp_path / "third", steps=1)
