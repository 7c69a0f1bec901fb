"""Positions and tokenizer come out as they went in, for new readers and old ones."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from longlora_cli.errors import IncompatibleError, IntegrityError, ResourceError, SettingsError
from longlora_cli.merging import export
from longlora_cli.merging.probe import verify_positions
from longlora_cli.models.rope import RopeRecord
from longlora_cli.models.source import AdapterRecord
from longlora_cli.storage import write_json

ORIGINAL = {"original_max_position_embeddings": 128}
ROPES = {
    "theta": ({"rope_type": "default", "rope_theta": 77_000.0}, 512),
    "linear": ({"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}, 512),
    "dynamic": ({"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}, 128),
    "yarn": ({"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, **ORIGINAL}, 512),
    "llama3": (
        {
            "rope_type": "llama3",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            **ORIGINAL,
        },
        512,
    ),
}


@pytest.mark.parametrize("kind", ROPES)
def test_positions_of_the_run_reach_the_merged_model(
    make_base, make_adapter, merge, load_plain, load_adapted, logits, kind
):
    parameters, length = ROPES[kind]
    adapter = make_adapter(make_base(), rope=parameters, length=length)
    merged, result = merge(adapter)
    model, trained = load_plain(merged), load_adapted(adapter)

    assert torch.equal(model.model.rotary_emb.inv_freq, trained.get_base_model().model.rotary_emb.inv_freq)
    for spread in (1, 10):  # to position 480, beyond the base's 128
        torch.testing.assert_close(logits(model, spread), logits(trained, spread), rtol=1e-5, atol=1e-5)
    assert result["positions_verified"]
    assert result["rope"]["parameters"] == parameters


@pytest.mark.parametrize("kind", ROPES)
def test_old_readers_find_the_same_positions(make_base, make_adapter, merge, kind):
    parameters, length = ROPES[kind]
    merged, _ = merge(make_adapter(make_base(), rope=parameters, length=length))
    config = json.loads((merged / "config.json").read_text())
    scaling = config["rope_scaling"] or {"rope_type": "default"}

    assert config["rope_parameters"] == parameters
    assert config["max_position_embeddings"] == length
    assert config["rope_theta"] == parameters["rope_theta"]
    assert {k: v for k, v in scaling.items() if k != "type"} | {
        "rope_theta": config["rope_theta"]
    } == parameters
    assert config["rope_scaling"] is None or scaling["type"] == scaling["rope_type"]


def test_the_tokenizer_knows_the_new_length_and_keeps_its_template(make_base, make_adapter, merge):
    parameters, length = ROPES["yarn"]
    base = make_base()
    merged, _ = merge(make_adapter(base, rope=parameters, length=length))
    assert json.loads((merged / "tokenizer_config.json").read_text())["model_max_length"] == 512
    assert (merged / "chat_template.jinja").read_text() == (base / "chat_template.jinja").read_text()
    assert (merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_config_that_lost_its_positions_is_found_out(make_base, make_adapter, merge):
    parameters, length = ROPES["yarn"]
    merged, _ = merge(make_adapter(make_base(), rope=parameters, length=length))
    shutil.copy(make_base() / "config.json", merged / "config.json")
    with pytest.raises(IntegrityError, match="lost its positions"):
        verify_positions(merged, RopeRecord(parameters, length))


def test_adapters_with_different_positions_are_not_mixed(make_base, make_adapter, merge):
    one = make_adapter(make_base(), rope=ROPES["yarn"][0], length=512)
    other = make_adapter(make_base(), rope=ROPES["linear"][0], length=512)
    with pytest.raises(IncompatibleError, match="different positions: yarn"):
        merge(one, other)


def test_models_with_different_tokenizers_are_not_mixed(make_base, merge, tmp_path):
    one, other = make_base(), tmp_path / "other"
    shutil.copytree(one, other)
    content = json.loads((other / "tokenizer.json").read_text())
    content["added_tokens"][0]["content"] = "<|other|>"
    write_json(other / "tokenizer.json", content)
    with pytest.raises(IncompatibleError, match="different tokenizers"):
        merge(one, other)


def test_a_token_without_a_row_is_refused(make_base, make_adapter, merge):
    adapter = make_adapter(make_base())
    (adapter / "manifest.json").unlink()
    (adapter / "longlora.json").unlink()
    content = json.loads((adapter / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 512, "content": "<|new|>"})
    write_json(adapter / "tokenizer.json", content)
    with pytest.raises(IncompatibleError, match="token id 512, its embedding only 512 rows"):
        merge(adapter)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtype_converts_the_whole_model(make_base, make_adapter, merge, dtype, torch_dtype):
    from transformers import AutoModelForCausalLM

    merged, result = merge(make_adapter(make_base()), dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert {p.dtype for p in model.parameters()} == {torch_dtype}
    assert result["probe"]["mean_difference"] <= result["probe"]["bound"]


def test_a_dry_run_says_the_size_and_writes_nothing(make_base, make_adapter, merge, tmp_path):
    adapter = make_adapter(make_base(), quantization="nf4")
    before = sorted(tmp_path.rglob("*"))
    out, planned = merge(adapter, dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    assert planned["base_weights"] == "dequantized nf4"
    _, written = merge(adapter, out=out)
    assert (planned["bytes"], planned["tensors"]) == (written["bytes"], written["tensors"])


def test_a_small_disk_is_refused_before_work(make_base, make_adapter, merge, monkeypatch, tmp_path):
    adapter = make_adapter(make_base())
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="MiB free"):
        merge(adapter, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_overwritten(make_base, make_adapter, merge, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(SettingsError, match="exists already"):
        merge(make_adapter(make_base()), out=tmp_path / "out")


def test_a_damaged_adapter_is_refused(make_base, make_adapter, merge):
    adapter = make_adapter(make_base())
    path = adapter / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="sha256"):
        merge(adapter)


def test_a_damaged_model_of_ours_is_refused(make_base, make_adapter, merge):
    merged, _ = merge(make_adapter(make_base()))
    path = merged / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="sha256"):
        merge(merged, make_base())


def test_the_record_survives_as_an_adapter_record(make_base, make_adapter, merge):
    base = make_base()
    pair = [make_adapter(base, seed=s, rope=ROPES["yarn"][0], length=512) for s in (0, 1)]
    mixed, _ = merge(*pair, keep_adapter=True)
    record = AdapterRecord.read(mixed)
    assert record is not None
    assert record.rope == {"parameters": ROPES["yarn"][0], "max_position_embeddings": 512}
