"""Loading: what a name means, what is refused, and that an adapter comes back as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_model

from longlora_cli.config import TrainConfig
from longlora_cli.errors import (
    DataError,
    IncompatibleError,
    IntegrityError,
    NotFoundError,
    SecurityError,
    SettingsError,
)
from longlora_cli.models import adapter as adapters
from longlora_cli.models.loading import LoadedModel, load_model
from longlora_cli.models.source import base_folder, fingerprint, resolve
from longlora_cli.storage import atomic_folder

IDS = torch.arange(3, 43)[None]


def settings(model: Path | str, **more: Any) -> TrainConfig:
    return TrainConfig(data=["d"], out="o", model=str(model), **more)


def trained(folder: Path, config: TrainConfig, context_length: int = 256) -> tuple[LoadedModel, Path]:
    """A base with an adapter whose every trained tensor was moved, and the folder it was saved in."""
    loaded = load_model(config, config, context_length=context_length, training=True)
    loaded.model = adapters.attach(loaded.model, config, quantization=loaded.quantization)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    loaded.model.eval()
    with atomic_folder(folder, "adapter") as staging:
        adapters.save(loaded.model, loaded.tokenizer, loaded.record(context_length), staging)
    return loaded, folder


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = loaded.model(input_ids=IDS, use_cache=False).logits
    return out


@pytest.mark.parametrize("also_train", ["none", "norms", "all"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa"])
def test_a_saved_adapter_gives_the_same_logits(
    tiny_model_folder: Path, tmp_path: Path, kind: str, also_train: str
) -> None:
    loaded, folder = trained(tmp_path / "a", settings(tiny_model_folder, adapter=kind, also_train=also_train))
    again = load_model(settings(folder))
    torch.testing.assert_close(logits(again), logits(loaded), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_an_adapter_on_quantized_weights_comes_back_on_quantized_weights(
    tiny_model_folder: Path, tmp_path: Path, quantization: str
) -> None:
    loaded, folder = trained(tmp_path / "a", settings(tiny_model_folder, quantization=quantization))
    again = load_model(settings(folder))
    assert again.quantization == quantization
    torch.testing.assert_close(logits(again), logits(loaded), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope", ["theta", "linear", "dynamic", "yarn", "llama3"])
def test_loading_without_naming_rope_restores_the_trained_positions(
    tiny_model_folder: Path, tmp_path: Path, rope: str
) -> None:
    loaded, folder = trained(tmp_path / "a", settings(tiny_model_folder, rope=rope), context_length=512)
    again = load_model(settings(folder))
    assert again.rope == loaded.rope
    assert again.context_length == 512
    live = again.causal_lm.model.rotary_emb.inv_freq
    assert torch.equal(live, loaded.causal_lm.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("rope", ["theta", "linear", "dynamic", "yarn", "llama3"])
def test_an_adapter_that_is_trained_on_reads_further_at_the_same_frequencies(
    tiny_model_folder: Path, tmp_path: Path, rope: str
) -> None:
    first, folder = trained(tmp_path / "a", settings(tiny_model_folder, rope=rope), context_length=512)
    again = load_model(settings(folder), settings(folder), context_length=2048, training=True)
    assert again.rope.parameters == first.rope.parameters
    # dynamic measures its growth against the base's own length, which has to stay.
    assert again.rope.max_position_embeddings == (
        first.rope.max_position_embeddings if rope == "dynamic" else 2048
    )
    live = again.causal_lm.model.rotary_emb.inv_freq
    assert torch.equal(live, first.causal_lm.model.rotary_emb.inv_freq)
    assert again.record(2048).rope["max_position_embeddings"] == again.rope.max_position_embeddings


def test_an_adapter_that_is_only_used_keeps_its_length(tiny_model_folder: Path, tmp_path: Path) -> None:
    first, folder = trained(tmp_path / "a", settings(tiny_model_folder, rope="theta"), context_length=512)
    assert load_model(settings(folder), context_length=2048).rope == first.rope


def test_other_positions_for_a_trained_adapter_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    _, folder = trained(tmp_path / "a", settings(tiny_model_folder, rope="yarn"))
    with pytest.raises(SettingsError, match="the adapter was trained with yarn"):
        load_model(settings(folder), settings(folder, rope="linear"), context_length=256)


def test_an_adapter_of_another_base_is_refused_with_exit_code_2(
    tiny_model_folder: Path, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    _, folder = trained(tmp_path / "a", settings(tiny_model_folder))
    (tmp_path / "other").mkdir()
    other = make_tiny_model(tmp_path / "other", tiny_tokenizer_folder, seed=7)
    with pytest.raises(SettingsError, match="an adapter of another base") as caught:
        load_model(settings(other), adapter=folder)
    assert caught.value.exit_code == 2


def test_a_flipped_bit_in_an_adapter_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    _, folder = trained(tmp_path / "a", settings(tiny_model_folder))
    weights = folder / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        load_model(settings(folder))


def test_an_adapter_that_lacks_a_tensor_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, folder = trained(tmp_path / "a", settings(tiny_model_folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "longlora.json").unlink()  # an adapter of another tool has no manifest to differ from
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tiny_model_folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with (
        pytest.raises(IncompatibleError, match="the adapter lacks"),
        pytest.warns(UserWarning, match="missing"),
    ):
        load_model(settings(folder))


def test_trainable_tensors_are_float32_and_the_rest_is_frozen(tiny_model_folder: Path) -> None:
    config = settings(tiny_model_folder, also_train="all", dtype="bf16")
    loaded = load_model(config, training=True)
    model = adapters.attach(loaded.model, config, quantization="none")
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("embed_tokens" in n for n in names)
    assert any("input_layernorm" in n for n in names)
    assert any("lora_A" in n for n in names)


def test_a_tied_head_follows_the_trained_embedding(tiny_model_folder: Path) -> None:
    config = settings(tiny_model_folder, also_train="all")
    loaded = load_model(config, training=True)
    loaded.model = adapters.attach(loaded.model, config, quantization="none")
    name, embedding = next(
        (n, p) for n, p in loaded.model.named_parameters() if "embed_tokens.modules_to_save" in n
    )
    before = logits(loaded)
    with torch.no_grad():
        embedding += 0.1
    assert loaded.head_weight().data_ptr() == embedding.data_ptr(), name
    assert not torch.equal(logits(loaded), before)


def test_an_unknown_target_is_refused_with_the_known_ones(tiny_model_folder: Path) -> None:
    config = settings(tiny_model_folder, lora_targets="q_proj,w_proj")
    with pytest.raises(SettingsError, match="w_proj: no linear layer") as caught:
        adapters.attach(load_model(config).model, config, quantization="none")
    assert "q_proj" in str(caught.value.hint)


def test_pissa_on_quantized_weights_is_refused(tiny_model_folder: Path) -> None:
    config = settings(tiny_model_folder, adapter="pissa", quantization="nf4")
    with pytest.raises(SettingsError, match="cannot start from nf4"):
        adapters.attach(load_model(config).model, config, quantization="nf4")


def test_a_fingerprint_does_not_depend_on_shards_but_on_weights(
    tiny_model_folder: Path, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_model_folder).save_pretrained(
        tmp_path / "s", max_shard_size="50KB"
    )
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "s") == fingerprint(tiny_model_folder)
    (tmp_path / "o").mkdir()
    assert fingerprint(make_tiny_model(tmp_path / "o", tiny_tokenizer_folder, seed=3)) != fingerprint(
        tmp_path / "s"
    )


@pytest.mark.parametrize("key", ["_attn_implementation_internal", "trust_remote_code", "custom_pipelines"])
def test_a_config_that_could_run_code_is_refused(tiny_model_folder: Path, tmp_path: Path, key: str) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: "somebody/kernel"}))
    with pytest.raises(SecurityError, match=key):
        base_folder(str(folder))


def test_what_is_no_model_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a model"):
        resolve(str(tmp_path))
    with pytest.raises(NotFoundError, match="no model folder"):
        resolve(str(tmp_path / "nothing"))
    with pytest.raises(NotFoundError, match="the hub does not give"):
        base_folder("nobody/nothing")


def test_weights_in_pickles_are_not_read(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_model_folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(NotFoundError, match=r"no \.safetensors"):
        fingerprint(tmp_path)


@pytest.mark.parametrize("attention", ["auto", "flash", "math"])
def test_every_kernel_of_a_cpu_gives_the_same_logits(tiny_model_folder: Path, attention: str) -> None:
    own = load_model(settings(tiny_model_folder, attention="math"))
    other = load_model(settings(tiny_model_folder, attention=attention))
    torch.testing.assert_close(logits(other), logits(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["cudnn", "efficient"])
def test_a_gpus_kernel_on_a_cpu_is_refused(tiny_model_folder: Path, attention: str) -> None:
    with pytest.raises(SettingsError, match=f"--attention {attention} needs a GPU"):
        load_model(settings(tiny_model_folder, attention=attention))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["auto", "cudnn", "flash", "efficient", "math"])
def test_every_kernel_of_a_gpu_loads_and_runs(tiny_model_folder: Path, attention: str) -> None:
    loaded = load_model(settings(tiny_model_folder, attention=attention, dtype="bf16", device="cuda"))
    out = loaded.hidden(IDS.to("cuda"), use_cache=False).last_hidden_state
    assert bool(out.isfinite().all())
