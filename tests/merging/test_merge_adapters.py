"""An adapter merged into its base computes what PEFT computes with the adapter on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longlora_cli.errors import IncompatibleError, IntegrityError, NotFoundError, SettingsError
from longlora_cli.storage import read_manifest, verify_folder, write_json

NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 16},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa", "size": 0.02},
    "patterns": {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "one layer": {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
    "norms": {"modules_to_save": NORMS},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_merged_adapter_gives_the_logits_of_peft(
    make_base, make_adapter, merge, load_plain, load_adapted, logits, kind, tied
):
    adapter = make_adapter(make_base(tie_word_embeddings=tied), **KINDS[kind])
    merged, result = merge(adapter)

    torch.testing.assert_close(
        logits(load_plain(merged)), logits(load_adapted(adapter)), rtol=1e-5, atol=1e-5
    )
    assert result["probe"]["max_difference"] <= 1e-4
    assert result["tied_embeddings"] is tied


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["embedding", "head", "both", "both as one", "lora embedding", "lora head", "lora both"],
)
@pytest.mark.filterwarnings("ignore")
def test_trained_embeddings_and_heads_survive_ties(
    make_base, make_adapter, merge, load_plain, load_adapted, logits, tied, settings
):
    adapter = make_adapter(make_base(tie_word_embeddings=tied), **settings)
    merged, result = merge(adapter)
    model = load_plain(merged)

    torch.testing.assert_close(logits(model), logits(load_adapted(adapter)), rtol=1e-5, atol=1e-5)
    stays_tied = tied and settings.get("ensure_weight_tying", False)
    assert result["tied_embeddings"] is stays_tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is stays_tied


def test_qwen2_with_biases_merges(make_base, make_adapter, merge, load_plain, load_adapted, logits):
    adapter = make_adapter(make_base(family="qwen2"))
    merged, _ = merge(adapter)
    torch.testing.assert_close(
        logits(load_plain(merged)), logits(load_adapted(adapter)), rtol=1e-5, atol=1e-5
    )


def test_a_bf16_base_gets_the_rounded_float64_sum(make_base, make_adapter, merge):
    base = make_base(dtype=torch.bfloat16)
    adapter = make_adapter(base)
    merged, _ = merge(adapter)
    factors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    delta = 2.0 * (
        factors[f"base_model.model.{name}.lora_B.weight"].double()
        @ factors[f"base_model.model.{name}.lora_A.weight"].double()
    )
    exact = load_file(base / "model.safetensors")[f"{name}.weight"].double() + delta
    found = load_file(merged / "model.safetensors")[f"{name}.weight"]

    assert found.dtype == torch.bfloat16
    half_unit = torch.finfo(torch.bfloat16).eps / 2
    assert bool(((found.double() - exact).abs() <= half_unit * exact.abs()).all())


def test_what_an_adapter_leaves_alone_is_copied_byte_for_byte(make_base, make_adapter, merge):
    base = make_base(dtype=torch.bfloat16)
    merged, _ = merge(make_adapter(base, target_modules=["q_proj"]))
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


def rewrite(adapter: Path, change: Any) -> None:
    """Change an adapter's tensors and keep its manifest true, as another tool might."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    (adapter / "manifest.json").unlink()
    (adapter / "longlora.json").unlink()


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda t: t.update(
                {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}
            ),
            "layers.7",
        ),
        (lambda t: t.update({f"{Q0}.lora_C.weight": torch.ones(4)}), "lora_C"),
        (lambda t: t.pop(f"{Q0}.lora_A.weight"), Q0),
        (lambda t: (t.pop(f"{Q0}.lora_A.weight"), t.pop(f"{Q0}.lora_B.weight")), Q0),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 63)}), Q0),
        (lambda t: t.pop("base_model.model.model.norm.weight"), "model.norm.weight"),
    ],
    ids=["another layer", "unknown part", "half a pair", "a missing pair", "another width", "a missing norm"],
)
def test_an_adapter_tensor_without_a_place_or_a_place_without_a_tensor_is_refused(
    make_base, make_adapter, merge, tmp_path, change, named
):
    adapter = make_adapter(make_base(), modules_to_save=["norm"])
    rewrite(adapter, change)
    with pytest.raises(IncompatibleError) as caught:
        merge(adapter, out=tmp_path / "out")
    assert named in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "all"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("fan_in_fan_out", True),
    ],
)
def test_adapters_without_an_exact_merge_are_refused(make_base, make_adapter, merge, key, value):
    adapter = make_adapter(make_base())
    rewrite(adapter, lambda tensors: None)
    path = adapter / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | {key: value})
    with pytest.raises(IncompatibleError, match="exactly"):
        merge(adapter)


def test_an_adapter_asked_onto_another_base_is_a_settings_error(make_base, make_adapter, merge):
    adapter = make_adapter(make_base())
    with pytest.raises(SettingsError, match="another base") as caught:
        merge(adapter, model=str(make_base(seed=1)))
    assert caught.value.exit_code == 2


def test_an_adapter_whose_own_base_has_changed_is_incompatible(make_base, make_adapter, merge):
    base = make_base()
    moved = make_adapter(base).parent / "base"
    shutil.copytree(base, moved)
    adapter = make_adapter(moved)
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IncompatibleError, match="another base") as caught:
        merge(adapter)
    assert caught.value.exit_code == 4


def test_a_copy_of_the_base_can_be_named(make_base, make_adapter, merge, tmp_path):
    base = make_base()
    shutil.copytree(base, tmp_path / "copy")
    _, result = merge(make_adapter(base), model=str(tmp_path / "copy"))
    assert result["sources"][0]["base"] == str(tmp_path / "copy")


def test_pickled_weights_are_not_read(make_base, merge, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((make_base() / name).read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(NotFoundError, match="safetensors"):
        merge(folder, dtype="bf16")


def test_a_run_folder_is_merged_by_its_adapter(make_base, make_adapter, merge, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    make_adapter(make_base()).rename(run / "adapter")
    _, result = merge(run)
    assert result["sources"][0]["kind"] == "lora"


def test_the_folder_carries_recipe_hashes_card_and_manifest(make_base, make_adapter, merge):
    base = make_base()
    adapter = make_adapter(base)
    merged, result = merge(adapter)
    record = json.loads((merged / "longlora.json").read_text())

    assert verify_folder(merged, "model").files.keys() >= {"config.json", "tokenizer.json", "README.md"}
    digest = read_manifest(adapter).files["adapter_model.safetensors"]["sha256"]
    assert record["inputs"][f"{adapter}/adapter_model.safetensors"] == digest
    assert record["probe"] == result["probe"]
    assert record["base_weights"] == "original"
    card = (merged / "README.md").read_text()
    assert digest in card
    assert result["probe_summary"] in card


def test_a_result_that_computes_something_else_is_not_kept(
    make_base, make_adapter, merge, monkeypatch, tmp_path
):
    from longlora_cli.models.adapter_tensors import Adapter

    adapter = make_adapter(make_base(dtype=torch.bfloat16))
    right = Adapter.scale
    monkeypatch.setattr(Adapter, "scale", lambda self, module: right(self, module) * 1.2)
    with pytest.raises(IntegrityError, match="differs from its sources"):
        merge(adapter, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".staging-*"))
