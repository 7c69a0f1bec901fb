"""What is seen of a loaded model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from longlora_cli.evaluation.live_checks import look_at
from longlora_cli.models import adapter as adapters
from longlora_cli.models.loading import LoadedModel, load_model
from longlora_cli.models.rope import RopeRecord
from longlora_cli.models.source import AdapterRecord, fingerprint
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.sections import ModelSection, RopeSection
from longlora_cli.storage import atomic_folder

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder: Path, *, rope: RopeSection | None = None, training: bool = False, **changes) -> LoadedModel:
    adapter, length = changes.pop("adapter", None), changes.pop("context_length", None)
    values = {"model": str(folder), "dtype": "fp32", "device": "cpu", "quantization": "none"}
    section = ModelSection(**{**values, **changes})
    return load_model(section, rope, adapter=adapter, training=training, context_length=length)


def look(loaded: LoadedModel, *, rope: str = "keep") -> dict:
    live = look_at(loaded, rope=rope, chat_template="auto")
    return {"live": live, **{one["name"].split()[0]: one for one in live.audits}}


@pytest.fixture
def make_adapter(tiny_model_folder, tmp_path):
    """An adapter on the tiny model; of size 0 it changes nothing."""

    def make(size: float, *, has_template: bool = True) -> Path:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        record = RopeRecord.of(model.config)
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LINEAR))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * size
        folder = tmp_path / f"adapter-{size}"
        name, tokenizer = str(tiny_model_folder), load_tokenizer(tiny_model_folder)
        tokenizer.chat_template = tokenizer.chat_template if has_template else None
        kept = AdapterRecord(name, fingerprint(tiny_model_folder), record.to_json(), "none", "fp32", 128)
        with atomic_folder(folder, "adapter") as staging:
            adapters.save(wrapped, tokenizer, kept, staging)
        return folder

    return make


def test_positions_within_the_models_length_are_ok_and_beyond_it_are_not(tiny_model_folder):
    live = look(load(tiny_model_folder))["live"]
    within, beyond = live.position_audit(128), live.position_audit(130)
    assert (within["ok"], beyond["ok"]) == (True, False)
    assert beyond["note"] == "2 tokens beyond what the model is made for"
    assert within["value"]["made for"] == 128


def test_stretched_positions_reach_as_far_as_they_were_stretched(tiny_model_folder):
    loaded = load(tiny_model_folder, rope=RopeSection(rope="yarn"), context_length=512)
    live = look(loaded, rope="yarn")["live"]
    assert (live.position_audit(512)["ok"], live.position_audit(513)["ok"]) == (True, False)


def test_live_frequencies_that_are_not_the_records_are_not_ok(tiny_model_folder):
    loaded = load(tiny_model_folder)
    module = next(m for m in loaded.causal_lm.modules() if hasattr(m, "inv_freq"))
    module.inv_freq.mul_(1.01)
    found = look(loaded)["live"].position_audit(10)
    assert found["ok"] is False
    assert "not those of its record" in found["note"]


@pytest.mark.parametrize(("quantization", "held"), [("nf4", "nf4"), ("int8", "int8"), ("none", "fp32")])
def test_the_numbers_of_linear_layers_are_read_from_the_layers(tiny_model_folder, quantization, held):
    found = look(load(tiny_model_folder, quantization=quantization))["Numbers"]
    assert (found["ok"], found["value"]) == (True, {held: 14})


def test_weights_that_are_not_quantized_although_the_settings_say_so_are_not_ok(tiny_model_folder):
    found = look(replace(load(tiny_model_folder), quantization="nf4"))["Numbers"]
    assert (found["ok"], found["note"]) == (False, "the settings say nf4")


@pytest.mark.parametrize(("size", "ok"), [(0.1, True), (0.0, False)])
def test_an_adapter_beside_the_weights_is_active_where_it_changes_logits(
    make_adapter, tiny_model_folder, size, ok
):
    loaded = load(tiny_model_folder, adapter=make_adapter(size), training=True)
    loaded.model.eval()
    found = look(loaded)["Adapter"]
    assert found["ok"] is ok
    assert (found["value"]["largest change of a logit"] > 0) is ok


@pytest.mark.parametrize(("size", "ok", "changed"), [(0.1, True, 14), (0.0, False, 0)])
def test_a_folded_adapter_is_active_where_it_changes_weights(
    make_adapter, tiny_model_folder, size, ok, changed
):
    loaded = load(tiny_model_folder, adapter=make_adapter(size))
    assert not loaded.source_has_adapter
    found = look(loaded)["Adapter"]
    assert (found["ok"], found["value"]["tensors"], found["value"]["changed"]) == (ok, 14, changed)


def test_looking_at_an_adapter_leaves_it_on(make_adapter, tiny_model_folder):
    loaded = load(tiny_model_folder, adapter=make_adapter(0.1), training=True)
    loaded.model.eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = loaded.model(input_ids=ids).logits
        look(loaded)
        assert torch.equal(loaded.model(input_ids=ids).logits, before)


def test_a_template_the_run_was_not_trained_with_is_not_ok(make_adapter, tiny_model_folder):
    adapter = make_adapter(0.1)
    trained = look(load(tiny_model_folder, adapter=adapter))["Chat"]
    other = look(load(tiny_model_folder, adapter=adapter, chat_template="qwen"))["Chat"]
    assert (trained["ok"], other["ok"]) == (True, False)
    assert trained["value"] != other["value"]


def test_a_template_for_a_run_that_was_trained_without_one_is_not_ok(make_adapter, tiny_model_folder):
    adapter = make_adapter(0.1, has_template=False)
    without = look(load(tiny_model_folder, adapter=adapter))["Chat"]
    other = look(load(tiny_model_folder, adapter=adapter, chat_template="qwen"))["Chat"]
    assert (without["ok"], other["ok"]) == (True, False)
    assert other["note"] == "the run was trained without one"


def test_the_template_of_a_base_is_told_and_not_judged(tiny_model_folder):
    assert look(load(tiny_model_folder))["Chat"]["ok"] is None
