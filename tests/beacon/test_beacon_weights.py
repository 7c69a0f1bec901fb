"""Beacon weights: copies also of quantized layers, a folder of their own, and which base they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from beacon_reference import FAMILIES, loaded, tiny_model, with_beacons
from tiny_models import make_tiny_model

from longlora_cli.beacon.projections import projections_of
from longlora_cli.beacon.session import BeaconSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.training import window_losses
from longlora_cli.beacon.weights import attach, detach, load, read_record, save
from longlora_cli.errors import IncompatibleError, IntegrityError, NotFoundError, SettingsError
from longlora_cli.models.loading import LoadedModel, load_model
from longlora_cli.sections import ModelSection

SETTINGS = BeaconSettings(window=8, ratios=(2, 4), ratio_mix="sequence", projections=("q", "v", "o"), sink=1)
IDS = list(range(3, 32))


def quantized(folder: Path, quantization: str) -> LoadedModel:
    return load_model(ModelSection(model=str(folder), quantization=quantization, dtype="fp32"), training=True)


@pytest.fixture(scope="session")
def wide_model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """Linear layers of 64 columns, whole blocks of NF4."""
    return make_tiny_model(tmp_path_factory.mktemp("wide"), tiny_tokenizer_folder, seed=3)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_copies_of_quantized_layers_compute_what_the_layers_compute(
    quantization: str, wide_model_folder: Path
) -> None:
    model = quantized(wide_model_folder, quantization).causal_lm
    projections = attach(model, BeaconSettings(), eos_token_id=2, bos_token_id=0)
    assert projections.beacon_embedding.dtype == torch.float32
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    for layer, copies in zip(model.model.layers, projections.layers, strict=True):
        for name in "qkv":
            own = getattr(layer.self_attn, f"{name}_proj")
            # int8 layers round their input too, to 1 part in 127.
            error = 2e-2 if quantization == "int8" else 1e-5
            torch.testing.assert_close(copies[name](x), own(x).float(), rtol=error, atol=error)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_beacons_train_over_a_quantized_base(quantization: str, wide_model_folder: Path) -> None:
    settings = BeaconSettings(window=8, ratios=(4,))
    model = quantized(wide_model_folder, quantization).causal_lm
    projections = attach(model, settings, eos_token_id=2, bos_token_id=0)
    optimizer = torch.optim.AdamW([p for p in projections.parameters() if p.requires_grad], lr=3e-2)
    ids = torch.randint(3, 500, (24,), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        loss, _ = window_losses(model, settings, [ids], [ids])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert (
        losses[-1] < losses[0] - 5
    )  # of 144 nats: most of these random tokens cannot be learnt from the past
    assert all(p.grad is None for name, p in model.named_parameters() if ".beacon." not in name)


def test_fresh_beacons_freeze_their_base() -> None:
    model = tiny_model().requires_grad_(True)
    attach(model, SETTINGS, eos_token_id=2, bos_token_id=1)
    assert all(("beacon." in name) == p.requires_grad for name, p in model.named_parameters())


def test_a_session_over_nf4_feeds_in_any_pieces(wide_model_folder: Path) -> None:
    settings = BeaconSettings(window=8, ratios=(4,), sink=1)
    model = quantized(wide_model_folder, "nf4")
    model.model.eval()
    attach(model.causal_lm, settings, eos_token_id=2, bos_token_id=0)
    whole = BeaconSession(model, settings).feed(IDS)
    session = BeaconSession(model, settings)
    for token in IDS:
        logits = session.step(token)
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_beacons_attach_to_their_base(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    with_beacons(model, SETTINGS)
    expected = BeaconSession(loaded(model), SETTINGS).feed(IDS)
    save(model, SETTINGS, tmp_path / "beacon", base="tiny", base_fingerprint="a" * 64)
    fresh = tiny_model(family)
    settings = load(fresh, tmp_path / "beacon", base_fingerprint="a" * 64, trainable=False)
    assert settings == SETTINGS
    assert torch.equal(BeaconSession(loaded(fresh), settings).feed(IDS), expected)
    assert not any(p.requires_grad for p in fresh.parameters())


def test_beacons_to_be_trained_stay_float32_and_those_to_be_used_take_the_base_format(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    projections = attach(model, SETTINGS, eos_token_id=2, bos_token_id=1)
    assert {p.dtype for p in projections.parameters()} == {torch.float32}
    save(model, SETTINGS, tmp_path, base="tiny", base_fingerprint="a" * 64)
    for trainable, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        detach(model)
        load(model, tmp_path, base_fingerprint="a" * 64, trainable=trainable)
        found: Any = projections_of(model)
        assert {p.dtype for p in found.parameters()} == {dtype}
        assert {p.requires_grad for p in found.parameters()} == {trainable}


def test_another_base_is_refused_in_one_line(tmp_path: Path) -> None:
    model = tiny_model()
    with_beacons(model, SETTINGS)
    save(model, SETTINGS, tmp_path, base="tiny", base_fingerprint="a" * 64)
    with pytest.raises(IncompatibleError, match="beacons of another base") as caught:
        load(tiny_model(seed=1), tmp_path, base_fingerprint="b" * 64, trainable=False)
    assert caught.value.exit_code == 4
    assert "\n" not in caught.value.message


def test_a_base_of_another_shape_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    model = tiny_model()
    with_beacons(model, SETTINGS)
    save(model, SETTINGS, tmp_path, base="tiny", base_fingerprint="a" * 64)
    other = tiny_model(layers=2)
    with pytest.raises(IncompatibleError, match="other layers or widths"):
        load(other, tmp_path, base_fingerprint="a" * 64, trainable=False)
    assert projections_of(other) is None


def test_damaged_beacons_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    with_beacons(model, SETTINGS)
    save(model, SETTINGS, tmp_path, base="tiny", base_fingerprint="a" * 64)
    content = bytearray((tmp_path / "beacon.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "beacon.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match="sha256"):
        load(tiny_model(), tmp_path, base_fingerprint="a" * 64, trainable=False)
    record = json.loads((tmp_path / "beacon.json").read_text())
    record["settings"]["ratios"] = [3]
    (tmp_path / "beacon.json").write_text(json.dumps(record))
    with pytest.raises(IntegrityError, match="does not divide"):
        read_record(tmp_path)
    with pytest.raises(NotFoundError):
        read_record(tmp_path / "nowhere")


def test_beacons_are_attached_once() -> None:
    model = tiny_model()
    with_beacons(model, SETTINGS)
    with pytest.raises(IncompatibleError, match="already"):
        attach(model, SETTINGS, eos_token_id=2, bos_token_id=1)
    detach(model)
    detach(model)
    attach(model, SETTINGS, eos_token_id=2, bos_token_id=1)


def test_an_initial_token_that_is_not_there_is_refused() -> None:
    with pytest.raises(SettingsError, match="cannot start from bos"):
        attach(tiny_model(), BeaconSettings(embed_init="bos"), eos_token_id=2, bos_token_id=None)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SettingsError, match="ratio 3 does not divide"):
        attach(tiny_model(), BeaconSettings(ratios=(3,)), eos_token_id=2, bos_token_id=1)


def test_another_family_is_refused() -> None:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(IncompatibleError, match="gpt_neox"):
        attach(AutoModelForCausalLM.from_config(config), BeaconSettings(), eos_token_id=2, bos_token_id=1)


def test_a_model_without_beacons_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleError, match="no beacons"):
        save(tiny_model(), SETTINGS, tmp_path, base="tiny", base_fingerprint="a")
