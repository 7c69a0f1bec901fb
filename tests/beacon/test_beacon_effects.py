"""No setting is without effect: each changes logits, the loss, the weights or the number of forward passes."""

from __future__ import annotations

from dataclasses import fields, replace
from random import Random
from typing import Any

import pytest
import torch
from beacon_reference import loaded, tiny_model, with_beacons

from longlora_cli.beacon.session import BeaconSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.training import window_losses

IDS = [int(i) for i in torch.randint(3, 64, (61,), generator=torch.Generator().manual_seed(7))]
BASE = BeaconSettings(window=8, ratios=(4,))
STEPS = replace(BASE, position="append", attention="step-expansion", ratios=(2,))
# For each field: settings, and the same with another value of it.
CHANGES: dict[str, tuple[BeaconSettings, BeaconSettings]] = {
    "window": (BASE, replace(BASE, window=12)),
    "stride": (replace(STEPS, stride=4), STEPS),
    "ratios": (BASE, replace(BASE, ratios=(2,))),
    "ratio_mix": (
        replace(BASE, ratios=(1, 2, 4, 8), ratio_mix="step-random"),
        replace(BASE, ratios=(1, 2, 4, 8), ratio_mix="sequence"),
    ),
    "attention": (STEPS, replace(STEPS, attention="segmentation")),
    "position": (replace(STEPS, attention="full-coverage"), replace(BASE, ratios=(2,))),
    "attend_prev": (STEPS, replace(STEPS, attend_prev=False)),
    "projections": (BASE, replace(BASE, projections=("q", "k", "v", "o"))),
    "sink": (BASE, replace(BASE, sink=1)),
    "embed_init": (BASE, replace(BASE, embed_init="bos")),
    "parallel": (BASE, replace(BASE, parallel=4)),
}


def run(settings: BeaconSettings) -> tuple[Any, int]:
    """Last logits, and forward passes."""
    model = tiny_model()
    with_beacons(model, settings)
    session = BeaconSession(loaded(model), settings, generator=Random(2))
    hidden = list(session.hidden_states(IDS))
    return model.lm_head(hidden[-1][-1]), len(hidden)


@pytest.mark.parametrize("name", [field.name for field in fields(BeaconSettings)])
def test_a_setting_changes_what_is_computed(name: str) -> None:
    first, second = CHANGES[name]
    assert getattr(first, name) != getattr(second, name)
    first.validate()
    second.validate()
    (one, passes), (other, other_passes) = run(first), run(second)
    if name == "parallel":
        assert other_passes < passes
    else:
        assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["ratio_mix", "attention", "attend_prev", "position", "sink"])
def test_a_setting_changes_the_training_loss(name: str) -> None:
    ids = torch.tensor(IDS)
    losses = []
    for settings in CHANGES[name]:
        model = tiny_model()
        with_beacons(model, settings)
        losses.append(window_losses(model, settings, [ids], [ids], Random(2))[0].item())
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("mix", ["step-random", "instance-random", "sequence", "adapt-100"])
def test_each_mix_gives_a_session_its_ratios(mix: str) -> None:
    settings = replace(BASE, ratios=(2, 4, 8), ratio_mix=mix)
    model = tiny_model()
    with_beacons(model, settings)
    session = BeaconSession(loaded(model), settings, generator=Random(3))
    session.feed(IDS)
    (ratios,) = session.stats().ratios
    distinct = {"step-random": 3, "instance-random": 1, "sequence": 3, "adapt-100": 1}
    assert len(set(ratios)) == distinct[mix]
    if mix == "sequence":
        assert ratios == (2, 4, 8, 2, 4, 8, 2)
