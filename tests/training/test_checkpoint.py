"""State goes to disk and back unchanged; only whole checkpoints are resumed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longlora_cli.errors import IncompatibleError
from longlora_cli.training import checkpoint


def trained_optimizer(kind: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(64, 80)), torch.nn.Parameter(torch.randn(7))]
    optimizer = kind(parameters, lr=0.1)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return optimizer


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b)) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) and type(a) is type(b)


def adamw_8bit(*args: Any, **options: Any) -> torch.optim.Optimizer:
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(*args, min_8bit_size=64, **options)
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.AdamW, adamw_8bit])
def test_optimizer_state_comes_back_unchanged(tmp_path: Path, kind: Any) -> None:
    state = {"optimizer": trained_optimizer(kind).state_dict(), "scaler": None}
    checkpoint.write(tmp_path / "c", state, lambda staging: None, {"step": 3})
    assert same(checkpoint.read_state(tmp_path / "c"), state)


def test_random_state_comes_back_unchanged(tmp_path: Path) -> None:
    before = checkpoint.random_state()
    drawn = (random.random(), np.random.rand(), torch.rand(1).item())
    checkpoint.write(tmp_path / "c", {"random": [before]}, lambda staging: None, {})
    states = checkpoint.read_state(tmp_path / "c")["random"]
    checkpoint.set_random_state(checkpoint.own_random_state(states, 0))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn


def test_more_processes_than_saved_random_states_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="random state of 1 processes, this is number 2"):
        checkpoint.own_random_state([{}], 1)


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(TypeError, match="/a is a set"):
        checkpoint.pack({"a": {1}}, {})


def run_with_steps(folder: Path, *steps: int) -> Path:
    for step in steps:
        state = {"x": torch.arange(step), "step": step}
        checkpoint.write(checkpoint.folder_of(folder, step), state, lambda staging: None, {"step": step})
    return folder


FILES = ("manifest.json", "state.json", "state.safetensors")


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "flipped", "swapped"])
@pytest.mark.parametrize("name", FILES)
def test_the_newest_whole_checkpoint_is_used_and_the_damage_named(
    tmp_path: Path, name: str, damage: str
) -> None:
    run = run_with_steps(tmp_path, 5, 6, 7)
    victim = checkpoint.folder_of(run, 7) / name
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    elif damage == "swapped":
        victim.write_bytes((checkpoint.folder_of(run, 6) / name).read_bytes())
    else:
        flipped = bytes([content[0] ^ 1]) + content[1:]
        victim.write_bytes({"truncated": content[:-9], "empty": b"", "flipped": flipped}[damage])
    assert not victim.exists() or victim.read_bytes() != content
    newest, faults = checkpoint.newest(run)
    assert newest == checkpoint.folder_of(run, 6)
    assert len(faults) == 1
    assert faults[0].startswith("step-000007 is not used")


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    run = run_with_steps(tmp_path, 1, 2, 3, 4)
    checkpoint.remove_old(run, keep=2)
    assert checkpoint.steps_of(run) == [4, 3]
