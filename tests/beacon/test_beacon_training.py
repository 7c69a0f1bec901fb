"""The training loss and all its gradients against the method spelled out, in float64 to rounding."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from beacon_reference import FAMILIES, Reference, loaded, tiny_model, with_beacons
from loop_kernel import Loops
from torch import Tensor, nn

import longlora_cli.memory.attention as attention
from longlora_cli.beacon.session import BeaconSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.beacon.training import window_losses
from longlora_cli.beacon.weights import attach
from longlora_cli.errors import IncompatibleError, SettingsError

EXACT = {"rtol": 1e-9, "atol": 1e-10}
IDS = torch.randint(3, 64, (29,), generator=torch.Generator().manual_seed(6))
PLANS = {
    "interleaved": BeaconSettings(window=8, ratios=(4,), sink=1),
    "sequence of ratios": BeaconSettings(window=8, ratios=(2, 8, 4), ratio_mix="sequence"),
    "one raw window": BeaconSettings(window=8, ratios=(0, 4), ratio_mix="sequence"),
    "all projections": BeaconSettings(window=8, ratios=(4,), projections=("q", "k", "v", "o")),
    "appended": BeaconSettings(window=8, ratios=(4,), position="append"),
    "appended steps": BeaconSettings(window=8, ratios=(2,), position="append", attention="step-expansion"),
    "interleaved segments, apart": BeaconSettings(
        window=8, ratios=(4,), attention="segmentation", attend_prev=False, sink=2
    ),
    "overlapping": BeaconSettings(window=8, stride=4, ratios=(2,), position="append"),
}


def prepared(settings: BeaconSettings, family: str = "llama") -> tuple[Any, Any]:
    model = tiny_model(family)
    return model, with_beacons(model, settings)


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def reference_loss(model: Any, settings: BeaconSettings, ids: Tensor, labels: Tensor) -> Tensor:
    ratios = settings.ratios if 0 not in settings.ratios else (0, 4, 4)  # a raw window once
    logits = Reference(model, settings, ratios, training=True).logits(ids.tolist())
    scored = list(range(len(ids) - 1))
    if settings.position == "append" or settings.attention != "full-coverage":
        scored = scored[settings.window :]
    scored = [at for at in scored if labels[at + 1] != -100]
    return nn.functional.cross_entropy(logits[scored], labels[1:][scored], reduction="sum")


@pytest.mark.parametrize("name", PLANS)
def test_loss_and_gradients_of_each_plan_are_those_of_the_method_spelled_out(name: str) -> None:
    settings = PLANS[name]
    model, projections = prepared(settings)
    labels = IDS.clone()
    labels[10:13] = -100
    expected = reference_loss(model, settings, IDS, labels)
    expected_gradients = gradients(projections, expected)
    found, _ = window_losses(model, settings, [IDS], [labels])
    torch.testing.assert_close(found, expected.detach(), **EXACT)
    torch.testing.assert_close(gradients(projections, found), expected_gradients, **EXACT)


@pytest.mark.parametrize(
    ("name", "parallel"),
    [(name, 1) for name in PLANS] + [(name, n) for name in PLANS if name != "overlapping" for n in (3, 4)],
)
def test_a_fused_kernel_gives_the_loss_and_gradients_of_the_method_spelled_out(
    monkeypatch: pytest.MonkeyPatch, name: str, parallel: int
) -> None:
    settings = replace(PLANS[name], parallel=parallel)
    model, projections = prepared(settings)
    rows = [IDS, IDS.flip(0)[:20]]
    expected = sum(reference_loss(model, settings, row, row) for row in rows)
    expected_gradients = gradients(projections, expected)
    monkeypatch.setattr(attention, "segment_kernel", lambda backend, query: Loops())
    found, _ = window_losses(model, settings, rows, rows)
    torch.testing.assert_close(found, expected.detach(), **EXACT)
    torch.testing.assert_close(gradients(projections, found), expected_gradients, **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_of_each_family_are_those_of_the_method_spelled_out(family: str) -> None:
    settings = PLANS["interleaved"]
    model, projections = prepared(settings, family)
    expected = reference_loss(model, settings, IDS, IDS)
    expected_gradients = gradients(projections, expected)
    found, _ = window_losses(model, settings, [IDS], [IDS])
    torch.testing.assert_close(found, expected.detach(), **EXACT)
    torch.testing.assert_close(gradients(projections, found), expected_gradients, **EXACT)


@pytest.mark.parametrize("name", [name for name in PLANS if name != "overlapping"])
@pytest.mark.parametrize("parallel", [2, 4])
def test_windows_in_parallel_have_the_loss_and_gradients_of_windows_in_turn(name: str, parallel: int) -> None:
    model, projections = prepared(PLANS[name])
    expected, _ = window_losses(model, PLANS[name], [IDS], [IDS])
    expected_gradients = gradients(projections, expected)
    together = BeaconSettings(**{**vars(PLANS[name]), "parallel": parallel})
    found, _ = window_losses(model, together, [IDS], [IDS])
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(gradients(projections, found), expected_gradients, **EXACT)


@pytest.mark.parametrize("parallel", [1, 2, 4])
def test_recomputing_passes_or_the_layers_of_one_pass_changes_no_number(parallel: int) -> None:
    settings = replace(PLANS["interleaved"], parallel=parallel)
    model, projections = prepared(settings)
    kept, _ = window_losses(model, settings, [IDS], [IDS], recompute=False)
    expected = gradients(projections, kept)
    found, _ = window_losses(model, settings, [IDS], [IDS])
    assert torch.equal(found, kept)
    torch.testing.assert_close(gradients(projections, found), expected, rtol=0, atol=0)


def saved_bytes(parallel: int, recompute: bool) -> int:
    """Between forward and backward, of 256 tokens in 8 windows at ratio 8, weights included that a product keeps."""
    settings = BeaconSettings(window=32, ratios=(8,), parallel=parallel)
    model, _ = prepared(settings)
    ids = IDS.repeat(9)[:256]
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        window_losses(model, settings, [ids], [ids], recompute=recompute)
    return sum(held.values())


def test_recomputing_windows_keeps_beacons_alone_between_forward_and_backward() -> None:
    assert saved_bytes(1, True) < saved_bytes(1, False) / 50


def test_recomputing_layers_keeps_their_inputs_alone_between_forward_and_backward() -> None:
    rows, inputs = 256 + 7 * 4, 3 + 1  # of three layers, and of the norm behind them
    loss_slope, norm_extra = 256 * 32 * 8, rows * 8 * 33
    assert saved_bytes(8, True) <= rows * inputs * 32 * 8 + loss_slope + norm_extra + 65536


def test_a_batch_without_beacons_is_recomputed_layer_by_layer_too() -> None:
    settings = PLANS["interleaved"]
    model, _ = prepared(settings)
    weight = model.model.embed_tokens.weight.requires_grad_(True)
    grads, saved = [], []

    def pack(tensor: Tensor) -> Tensor:
        saved[-1] += tensor.numel()
        return tensor

    for recompute in (False, True):
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, count = window_losses(model, settings, [IDS[:8]], [IDS[:8]], recompute=recompute)
        assert count == 7
        grads += torch.autograd.grad(loss, [weight])
    assert torch.equal(grads[0], grads[1])
    assert saved[1] < saved[0] / 3


def test_layers_are_what_they_were_after_a_pass_that_recomputes_them_and_after_one_that_fails() -> None:
    settings = replace(PLANS["interleaved"], parallel=4)
    model, _ = prepared(settings)
    before = [dict(layer.__dict__) for layer in model.model.layers]
    window_losses(model, settings, [IDS], [IDS])
    with pytest.raises(IndexError):
        window_losses(model, settings, [IDS + 64], [IDS])
    model.model.norm.weight = None
    with pytest.raises(TypeError):
        window_losses(model, settings, [IDS], [IDS])
    assert [dict(layer.__dict__) for layer in model.model.layers] == before


def test_a_batch_has_the_sum_of_the_losses_and_gradients_of_its_rows() -> None:
    settings = PLANS["one raw window"]
    model, projections = prepared(settings)
    rows = [IDS, IDS.flip(0), IDS[:20]]
    alone = [window_losses(model, settings, [row], [row]) for row in rows]
    expected = gradients(projections, sum(loss for loss, _ in alone))
    found, count = window_losses(model, settings, rows, rows)
    torch.testing.assert_close(found, sum(loss for loss, _ in alone).detach(), **EXACT)
    torch.testing.assert_close(gradients(projections, found), expected, **EXACT)
    assert count == sum(n for _, n in alone) == 28 + 28 + 19


@pytest.mark.parametrize(
    ("settings", "scored"),
    [
        (BeaconSettings(window=8, ratios=(4,)), 19),
        (BeaconSettings(window=8, ratios=(4,), position="append"), 11),
        (BeaconSettings(window=8, ratios=(4,), attention="step-expansion"), 11),
    ],
)
def test_the_first_window_counts_only_where_it_sees_its_own_beacons(
    settings: BeaconSettings, scored: int
) -> None:
    model, _ = prepared(settings)
    assert window_losses(model, settings, [IDS[:20]], [IDS[:20]])[1] == scored


def test_the_loss_is_that_of_the_logits_a_session_gives_as_far_as_the_last_window() -> None:
    settings = PLANS["interleaved"]
    model, _ = prepared(settings)
    labels = IDS.clone()
    labels[24:] = -100
    loss, _ = window_losses(model, settings, [IDS], [labels])
    session = BeaconSession(loaded(model), settings)
    logits = model.lm_head(torch.cat(list(session.hidden_states(IDS[:23].tolist()))))
    expected = nn.functional.cross_entropy(logits, IDS[1:24], reduction="sum")
    torch.testing.assert_close(loss.detach(), expected, **EXACT)


def test_a_16_bit_base_trains_float32_beacons_to_the_same_loss_within_its_rounding() -> None:
    settings = PLANS["interleaved"]
    model, projections = prepared(settings)
    exact, _ = window_losses(model, settings, [IDS], [IDS])
    expected = gradients(projections, exact)
    model.to(torch.bfloat16)
    projections.float()
    loss, _ = window_losses(model, settings, [IDS], [IDS])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=2e-2, atol=0)
    found = gradients(projections, loss)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    for name in ("beacon_embedding", "layers.0.k.weight", "layers.2.v.weight"):
        # Norms in bf16 and weights of 0.3 make gradients of 3 layers wrong by 15 %; their direction holds.
        same = nn.functional.cosine_similarity(
            found[name].double().flatten(), expected[name].flatten(), dim=0
        )
        assert same > 0.97


def later_window_gradients(length: int) -> tuple[Any, dict[str, Tensor]]:
    """Gradients of the loss of the tokens from 16 on, the third window."""
    settings = BeaconSettings(window=8, ratios=(4,))
    model, projections = prepared(settings)
    ids = IDS[:length]
    labels = ids.clone()
    labels[:17] = -100
    loss, _ = window_losses(model, settings, [ids], [labels])
    return model, gradients(projections, loss)


def test_a_later_loss_reaches_the_beacons_of_every_layer_and_their_embedding() -> None:
    _, found = later_window_gradients(24)
    assert found["beacon_embedding"].abs().sum() > 0
    for layer in range(3):
        for name in "kv":
            assert found[f"layers.{layer}.{name}.weight"].abs().sum() > 0
        # Nobody reads a beacon's last hidden state, so its last query is for nothing.
        assert (found[f"layers.{layer}.q.weight"].abs().sum() > 0) == (layer < 2)


def test_base_weights_get_no_gradient() -> None:
    model, _ = later_window_gradients(24)
    base = {name: p for name, p in model.named_parameters() if not name.startswith("model.beacon.")}
    assert len(base) > 20
    assert all(p.grad is None for p in base.values())


@pytest.mark.parametrize("tokens", [2, 7, 8])
def test_a_sequence_of_one_window_trains_no_beacon(tokens: int) -> None:
    settings = BeaconSettings(window=8, ratios=(4,))
    model, _ = prepared(settings)
    loss, count = window_losses(model, settings, [IDS[:tokens]], [IDS[:tokens]])
    assert count == tokens - 1
    assert not loss.requires_grad


def test_the_caller_owns_the_draws() -> None:
    settings = BeaconSettings(window=4, ratios=(1, 2, 4))
    model, _ = prepared(settings)
    generator = Random(3)
    first = [window_losses(model, settings, [IDS], [IDS], generator)[0].item() for _ in range(3)]
    again = Random(3)
    assert first == [window_losses(model, settings, [IDS], [IDS], again)[0].item() for _ in range(3)]
    assert len(set(first)) == 3
    assert generator.getstate() == again.getstate()


def test_a_model_without_beacons_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="no beacons"):
        window_losses(tiny_model(), BeaconSettings(window=8, ratios=(4,)), [IDS], [IDS])


def test_ratio_0_alone_is_refused_in_training() -> None:
    settings = BeaconSettings(window=8, ratios=(0,))
    model, _ = prepared(settings)
    with pytest.raises(SettingsError, match="trains no beacon"):
        window_losses(model, settings, [IDS], [IDS])


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.double()
    return wrapped


def test_beacons_before_an_adapter_are_beacons_after_it() -> None:
    settings = BeaconSettings(window=8, ratios=(4,))
    results = []
    for first in ("beacons", "adapter"):
        model = tiny_model()
        if first == "beacons":
            attach(model, settings, eos_token_id=2, bos_token_id=1)
            wrapped = with_lora(model)
        else:
            wrapped = with_lora(model)
            attach(model, settings, eos_token_id=2, bos_token_id=1)
            assert any("lora_A" in name for name, p in model.named_parameters() if p.requires_grad)
        model.model.beacon.requires_grad_(True)
        loss, _ = window_losses(model, settings, [IDS], [IDS])
        trained = nn.ModuleList([wrapped])
        results.append((loss.detach(), gradients(trained, loss)))
    torch.testing.assert_close(results[0][0], results[1][0], **EXACT)
    torch.testing.assert_close(results[0][1], results[1][1], **EXACT)
    names = results[0][1]
    assert sum("lora_" in name for name in names) == 2 * 7 * 3
    assert sum(".beacon." in name for name in names) == 1 + 3 * 3


@pytest.mark.parametrize("parallel", [1, 4])
def test_under_autocast_an_adapter_without_float32_copies_of_its_inputs_computes_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, parallel: int
) -> None:
    settings = BeaconSettings(window=8, ratios=(4,), parallel=parallel)
    model = tiny_model().float()
    attach(model, settings, eos_token_id=2, bos_token_id=1)
    wrapped = with_lora(model).float()
    model.model.beacon.requires_grad_(True)
    trained = nn.ModuleList([wrapped])
    copies = []

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, _ = window_losses(model, settings, [IDS], [IDS])
        return loss.detach(), gradients(trained, loss)

    layer = model.model.layers[1].mlp.up_proj
    cast = layer._cast_input_dtype

    def watched(x: Tensor, dtype: torch.dtype) -> Tensor:
        found: Tensor = cast(x, dtype)
        copies.append(found.dtype)
        return found

    monkeypatch.setattr(layer, "_cast_input_dtype", watched)
    model.to(torch.bfloat16)
    wrapped.float()
    for name, parameter in wrapped.named_parameters():
        if "lora_" not in name and ".beacon." not in name:
            parameter.data = parameter.data.bfloat16()
    found = run()
    assert copies
    assert set(copies) == {torch.bfloat16}
    assert layer.cast_input_dtype_enabled
    monkeypatch.setattr("longlora_cli.beacon.projections._casting_layers", lambda model: [])
    expected = run()
    assert copies[-1] == torch.float32
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)


def test_an_adapter_folded_into_the_base_leaves_beacons_what_they_were() -> None:
    settings = BeaconSettings(window=8, ratios=(4,))
    model = tiny_model()
    wrapped = with_lora(model)
    attach(model, settings, eos_token_id=2, bos_token_id=1)
    expected = BeaconSession(loaded(wrapped), settings).feed(IDS.tolist())
    before = model.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    folded = wrapped.merge_and_unload()
    found = BeaconSession(loaded(folded), settings).feed(IDS.tolist())
    torch.testing.assert_close(found, expected, **EXACT)
    assert not torch.equal(folded.model.layers[0].self_attn.q_proj.weight, before)
