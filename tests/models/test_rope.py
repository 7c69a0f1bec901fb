"""Positions: computed here and in transformers alike, set before construction, verified after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from longlora_cli.errors import IncompatibleError, SettingsError
from longlora_cli.models.rope import RopeRecord, extend, inverse_frequencies, verify
from longlora_cli.sections import RopeSection

BASE = RopeRecord({"rope_type": "default", "rope_theta": 10_000.0}, 128)
METHODS: list[dict[str, Any]] = [
    {"rope": "keep"},
    {"rope": "theta"},
    {"rope": "theta", "rope_theta": 1e6},
    {"rope": "linear"},
    {"rope": "dynamic"},
    {"rope": "yarn"},
    {"rope": "llama3", "rope_factor": 8},
]


def tiny_config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}
    return LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=128, **sizes, **changes)


def built(record: RopeRecord) -> torch.nn.Module:
    config = tiny_config()
    record.apply(config)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("settings", METHODS)
def test_transformers_builds_the_frequencies_that_the_record_says(settings: dict[str, Any]) -> None:
    record = extend(BASE, RopeSection(**settings), 512, head_dim=32)
    verify(built(record), record, head_dim=32)


@pytest.mark.parametrize("settings", METHODS[2:4] + METHODS[5:])
def test_a_model_built_from_other_settings_is_found_out(settings: dict[str, Any]) -> None:
    record = extend(BASE, RopeSection(**settings), 512, head_dim=32)
    with pytest.raises(IncompatibleError, match="not those of its record"):
        verify(built(BASE), record, head_dim=32)


def test_yarns_temperature_alone_is_found_out() -> None:
    record = extend(BASE, RopeSection(rope="yarn"), 512, head_dim=32)
    other = RopeRecord(record.parameters | {"attention_factor": 1.0}, record.max_position_embeddings)
    with pytest.raises(IncompatibleError):
        verify(built(other), record, head_dim=32)


def test_the_ntk_rule_turns_the_slowest_pair_by_the_factor() -> None:
    record = extend(BASE, RopeSection(rope="theta", rope_factor=4), None, head_dim=32)
    slow, fast = inverse_frequencies(record, 32), inverse_frequencies(BASE, 32)
    assert slow[0] == fast[0] == 1
    torch.testing.assert_close(fast[-1] / slow[-1], torch.tensor(4.0, dtype=torch.float64))


def test_the_factor_is_the_ratio_of_lengths() -> None:
    assert extend(BASE, RopeSection(rope="linear"), 512, head_dim=32).parameters["factor"] == 4


def test_stretching_without_a_longer_context_is_refused() -> None:
    with pytest.raises(SettingsError, match="needs a factor"):
        extend(BASE, RopeSection(rope="yarn"), 128, head_dim=32)


def test_a_second_scaling_is_refused_but_theta_keeps_the_first() -> None:
    scaled = extend(BASE, RopeSection(rope="llama3", rope_factor=8), None, head_dim=32)
    with pytest.raises(SettingsError, match="scaled already"):
        extend(scaled, RopeSection(rope="linear", rope_factor=2), None, head_dim=32)
    raised = extend(scaled, RopeSection(rope="theta", rope_theta=1e6), 4096, head_dim=32)
    assert raised.parameters == scaled.parameters | {"rope_theta": 1e6}


def test_dynamic_keeps_the_length_it_measures_growth_against() -> None:
    assert extend(BASE, RopeSection(rope="dynamic"), 512, head_dim=32).max_position_embeddings == 128


@pytest.mark.parametrize("settings", METHODS)
def test_older_readers_find_the_same_numbers(settings: dict[str, Any]) -> None:
    record = extend(BASE, RopeSection(**settings), 512, head_dim=32)
    old = record.legacy_keys()
    config = tiny_config(rope_theta=old["rope_theta"], rope_scaling=old["rope_scaling"])
    live = AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq
    torch.testing.assert_close(live.double(), inverse_frequencies(record, 32), rtol=1e-4, atol=0)


def test_a_record_survives_json() -> None:
    record = extend(BASE, RopeSection(rope="yarn"), 512, head_dim=32)
    assert RopeRecord.from_json(record.to_json()) == record


def test_positions_per_layer_type_are_refused() -> None:
    config = tiny_config()
    config.rope_parameters = {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}
    with pytest.raises(IncompatibleError, match="per layer type"):
        RopeRecord.of(config)
