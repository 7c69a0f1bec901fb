"""Windows on a GPU: one fused call for all of a pass is no further from float64 than torch's kernels one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from beacon_reference import Reference, loaded, tiny_model, with_beacons
from torch import Tensor

import longlora_cli.memory.attention as attention
from longlora_cli.beacon.session import BeaconSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.training import window_losses

IDS = [int(i) for i in torch.randint(3, 64, (61,), generator=torch.Generator().manual_seed(8))]
SETTINGS = BeaconSettings(window=16, ratios=(4,), sink=1)

pytestmark = pytest.mark.gpu


def on_gpu(settings: BeaconSettings) -> Any:
    model = tiny_model()
    with_beacons(model, settings)
    return model.to("cuda", torch.bfloat16)


def logits_of(model: Any, settings: BeaconSettings) -> Tensor:
    held = replace(loaded(model), device=torch.device("cuda"), dtype="bf16")
    hidden = list(BeaconSession(held, settings).hidden_states(IDS))
    return model.lm_head(torch.cat(hidden)).double().cpu()


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize("name", ["full-coverage", "step-expansion"])
def test_a_session_in_bf16_is_as_close_to_the_method_with_fused_kernels_as_without(
    monkeypatch: pytest.MonkeyPatch, parallel: int, name: str
) -> None:
    settings = replace(SETTINGS, parallel=parallel, attention=name)
    exact_model = tiny_model()
    with_beacons(exact_model, settings)
    exact = Reference(exact_model, settings, [4]).logits(IDS)
    fused = (logits_of(on_gpu(settings), settings) - exact).norm()
    monkeypatch.setattr(attention, "segment_kernel", lambda backend, query: None)
    apart = (logits_of(on_gpu(settings), settings) - exact).norm()
    assert fused < 1.2 * apart
    assert fused < 0.2 * exact.norm()


@pytest.mark.parametrize("parallel", [1, 3, 4])
@pytest.mark.parametrize("name", ["full-coverage", "step-expansion"])
def test_gradients_in_bf16_are_as_close_with_fused_kernels_as_without(
    monkeypatch: pytest.MonkeyPatch, name: str, parallel: int
) -> None:
    settings = replace(SETTINGS, parallel=parallel, attention=name)
    exact_model = tiny_model()
    with_beacons(exact_model, settings)
    ids = torch.tensor(IDS)
    window_losses(exact_model, settings, [ids, ids.flip(0)], [ids, ids.flip(0)])[0].backward()
    exact = exact_model.model.beacon.layers[1]["k"].weight.grad

    def error() -> Tensor:
        model = on_gpu(settings)
        rows = [ids.cuda(), ids.flip(0).cuda()]
        window_losses(model, settings, rows, rows)[0].backward()
        return (model.model.beacon.layers[1]["k"].weight.grad.double().cpu() - exact).norm()

    fused = error()
    monkeypatch.setattr(attention, "segment_kernel", lambda backend, query: None)
    assert fused < 1.2 * error()
    assert fused < 0.5 * exact.norm()
