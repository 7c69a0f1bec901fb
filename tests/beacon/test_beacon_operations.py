"""How many operations beacons take, counted below autograd: a small model on a GPU waits for each to be launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
from beacon_reference import loaded, tiny_model, with_beacons
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import longlora_cli.memory.attention as attention
from longlora_cli.beacon.session import BeaconSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.training import window_losses

# The shape of the recipe smollm2-135m-beacon.yaml: 8 documents of 16 windows in one pass, small windows.
RECIPE = BeaconSettings(
    window=16, ratios=(2, 4, 8), position="append", attention="step-expansion", sink=4, parallel=16
)


class Uncounted:
    """A fused kernel that is one operation, as on a GPU; its numbers mean nothing."""

    def forward_over(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        key_lengths: Sequence[int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0])

    def backward_over(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "segment_kernel", lambda backend, query: Uncounted())


def counted(work: Callable[[], Any]) -> int:
    work()  # what is made once is made
    with Counting() as counting:
        work()
    return counting.operations


def of_a_step(layers: int, documents: int, settings: BeaconSettings, *, lora: bool = False) -> int:
    model = tiny_model(layers=layers).float()
    with_beacons(model, settings)
    if lora:
        from peft import LoraConfig, get_peft_model

        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.model.beacon.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 64, (settings.window * 16,), generator=generator) for _ in range(documents)]

    def step() -> None:
        loss, _ = window_losses(model, settings, ids, ids, Random(1))
        loss.backward()

    return counted(step)


def test_a_training_step_of_the_recipe_takes_less_than_40_000_operations_in_30_layers() -> None:
    one, two = (of_a_step(layers, 8, RECIPE, lora=True) for layers in (1, 2))
    assert one + 29 * (two - one) < 40_000


def test_a_layer_takes_as_many_operations_for_eight_documents_as_for_one() -> None:
    one, eight = ([of_a_step(layers, n, RECIPE) for layers in (1, 2)] for n in (1, 8))
    assert one[1] - one[0] == eight[1] - eight[0]


def test_a_layer_takes_as_many_operations_to_read_eight_texts_as_one() -> None:
    found = []
    for texts in (1, 8):
        per_model = []
        for layers in (1, 2):
            model = tiny_model(layers=layers)
            with_beacons(model, RECIPE)
            session = BeaconSession(loaded(model), RECIPE.with_ratios(8))
            rows = [list(range(3, 35))] * texts
            per_model.append(counted(lambda: session.feed(rows)))  # noqa: B023 - called at once
        found.append(per_model[1] - per_model[0])
    assert found[0] == found[1]
