"""Settings become a path and a plan; sizes are those of the real model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_model

from longlora_cli.config import TrainConfig
from longlora_cli.errors import IncompatibleError, ResourceError, SettingsError
from longlora_cli.memory.machine import Machine
from longlora_cli.memory.plan import ModelShape
from longlora_cli.models import adapter as adapters
from longlora_cli.models.loading import load_model
from longlora_cli.models.source import ModelSource
from longlora_cli.training.engine import (
    Planner,
    choose_path,
    embedding_fault,
    machine_for,
    model_shape,
    outline_fault,
    start_engine,
)


def settings(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        **{"model": str(folder), "data": "d", "out": "o", "device": "cpu", "lora_rank": 3} | changes
    )


@pytest.mark.parametrize("also", ["none", "norms", "all"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_shape_counts_the_models_own_parameters(
    tiny_model_folder: Path, also: str, quantization: str
) -> None:
    config = settings(tiny_model_folder, also_train=also, quantization=quantization)
    loaded = load_model(config, config, context_length=128, training=True)
    frozen = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    loaded.model = adapters.attach(loaded.model, config, quantization=loaded.quantization)
    shape = model_shape(loaded.causal_lm.config, config, quantization, 4)
    assert shape.trainable == sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    assert shape.weight_bytes == pytest.approx(
        frozen, rel=0.02
    )  # quantization's scales are counted, not its buffers


@pytest.mark.parametrize(
    ("asked", "fault", "path"),
    [("auto", None, "fused"), ("auto", "x", "generic"), ("generic", None, "generic"), ("none", "x", "none")],
)
def test_the_path_follows_the_model_unless_it_is_asked_for(asked: str, fault: str | None, path: str) -> None:
    assert choose_path(settings(Path("m"), engine=asked), fault) == path


@pytest.mark.parametrize("asked", [{"engine": "fused"}, {"s2_group": 64}])
def test_the_fused_path_is_refused_with_the_reason(asked: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError, match="sliding window"):
        choose_path(settings(Path("m"), **asked), "some of its layers attend to a sliding window")


@pytest.mark.parametrize("changes", [{"adapter": "dora"}, {"lora_dropout": 0.1}, {}])
def test_the_outline_knows_the_path_that_the_loaded_model_takes(
    tiny_model_folder: Path, changes: dict[str, Any]
) -> None:
    from longlora_cli.memory.engine import fused_fault

    config = settings(tiny_model_folder, **changes)
    loaded = load_model(config, config, context_length=128, training=True)
    outline = outline_fault(loaded.causal_lm.config, config, "none")
    loaded.model = adapters.attach(loaded.model, config, quantization="none")
    assert (outline is None) == (fused_fault(loaded.causal_lm) is None)


def test_a_plan_that_does_not_fit_is_refused_before_the_model_changes(tiny_model_folder: Path) -> None:
    config = settings(tiny_model_folder)
    loaded = load_model(config, config, context_length=128, training=True)
    loaded.model = adapters.attach(loaded.model, config, quantization="none")
    machine = Machine(gpu_bytes=2**20, host_bytes=0)
    planner = Planner(config, model_shape(loaded.causal_lm.config, config, "none", 4), machine)
    with pytest.raises(ResourceError):
        start_engine(loaded, planner, 4096)
    assert "forward" not in vars(loaded.causal_lm)


def test_a_limit_on_a_gpu_that_is_not_used_is_refused(tiny_model_folder: Path) -> None:
    with pytest.raises(SettingsError, match="gpu-memory"):
        machine_for(settings(tiny_model_folder, gpu_memory="8GB"), torch.device("cpu"), 1, 4)


def test_processes_on_one_machine_share_its_host_memory(tiny_model_folder: Path) -> None:
    one, two = (
        machine_for(settings(tiny_model_folder, host_memory="1GiB"), torch.device("cpu"), n, 4)
        for n in (1, 2)
    )
    assert two.host_bytes == one.host_bytes // 2 == 2**29


@pytest.mark.parametrize("path", ["fused", "generic", "none"])
def test_an_engine_taken_off_leaves_the_models_own_code(tiny_model_folder: Path, path: str) -> None:
    config = settings(tiny_model_folder, engine=path)
    loaded = load_model(config, config, context_length=128, training=True)
    loaded.model = adapters.attach(loaded.model, config, quantization="none")
    machine = machine_for(config, torch.device("cpu"), 1, 4)
    planner = Planner(config, model_shape(loaded.causal_lm.config, config, "none", 4), machine)
    engine = start_engine(loaded, planner, 128)
    assert engine.path == path
    engine.close()
    changed = [n for n, m in loaded.causal_lm.named_modules() if "forward" in vars(m)]
    assert changed == []


@pytest.mark.parametrize(
    "part", [*("keep_attention=1", "keep_qkv=1", "keep_gate_up=1", "kv_heads_per_call=1", "embedding=host")]
)
def test_parts_of_a_plan_that_the_generic_path_cannot_follow_are_refused(part: str) -> None:
    with pytest.raises(SettingsError, match="no effect"):
        choose_path(settings(Path("m"), plan=part), "its family is phi3")
    assert choose_path(settings(Path("m"), plan=part), None) == "fused"


def test_a_disk_folder_that_is_not_there_is_refused_before_a_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not a folder"):
        machine_for(settings(Path("m"), disk_offload=tmp_path / "no"), torch.device("cpu"), 1, 4)


def test_groups_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        settings(Path("m"), s2_group=5)


def test_later_plans_do_with_the_disk_file_of_the_longest_batch(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    config = settings(tiny_model_folder, disk_offload=tmp_path, plan="offload=disk")
    loaded = load_model(config, config, context_length=128, training=True)
    loaded.model = adapters.attach(loaded.model, config, quantization="none")
    machine = machine_for(config, torch.device("cpu"), 1, 4)
    planner = Planner(config, model_shape(loaded.causal_lm.config, config, "none", 4), machine)
    longest = planner.plan(128).predicted.disk_bytes
    start_engine(loaded, planner, 128).close()
    assert 0 < longest == planner.machine.disk_bytes < machine.disk_bytes
    assert 0 < planner.plan(96).predicted.disk_bytes < longest


@pytest.fixture
def untied_model_folder(tmp_path: Path, tiny_tokenizer_folder: Path) -> Path:
    return make_tiny_model(tmp_path / "untied", tiny_tokenizer_folder, tie_word_embeddings=False)


CUDA = torch.device("cuda")
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "cpu": ({}, {"device": torch.device("cpu")}, "on a CPU"),
    "generic": ({}, {"path": "generic"}, "fused path"),
    "tied": ({}, {"tied": True}, "output matrix"),
    "trained": ({"also_train": "all"}, {}, "--also-train all"),
    "modules": ({}, {"adapter": {"modules_to_save": ["norm", "embed_tokens"]}}, "the adapter in"),
    "targets": ({}, {"adapter": {"target_modules": "model.embed_tokens"}}, "the adapter in"),
    "tokens": ({}, {"adapter": {"trainable_token_indices": [3]}}, "the adapter in"),
    "none": (
        {"also_train": "norms"},
        {"adapter": {"modules_to_save": ["norm"], "target_modules": ["q_proj"]}},
        "",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_an_embedding_that_cannot_wait_on_the_host_is_known_from_configs(case: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    changes, more, reason = FAULTS[case]
    (tmp_path / "adapter_config.json").write_text(json.dumps(more.get("adapter", {})))
    source = ModelSource("m", tmp_path if "adapter" in more else None)
    config = LlamaConfig(tie_word_embeddings=more.get("tied", False))
    place = (more.get("path", "fused"), more.get("device", CUDA), source)
    fault = embedding_fault(config, settings(Path("m"), **changes), *place)
    asked = settings(Path("m"), plan="embedding=host", **changes)
    if not reason:
        assert fault is None
        assert embedding_fault(config, asked, *place) is None
        return
    assert reason in (fault or "")
    with pytest.raises(SettingsError, match="--plan embedding=host has no effect here: .*" + reason):
        embedding_fault(config, asked, *place)


def test_the_bytes_of_an_embedding_that_can_move_are_the_models_own(untied_model_folder: Path) -> None:
    config = settings(untied_model_folder)
    loaded = load_model(config, config, context_length=128, training=True)
    model_config = loaded.causal_lm.config
    assert model_shape(model_config, config, "none", 4).embedding_bytes == 0
    shape = model_shape(model_config, config, "none", 4, embedding_can_move=True)
    assert shape.embedding_bytes == loaded.model.get_input_embeddings().weight.nbytes


# A table of 1 GiB: with it, the longest step does not fit on this machine and the short one does.
LARGE_TABLE = ModelShape(
    4, 1024, 8, 8, 128, 4096, 128_000, 4, 2**30 + 2**28, 10_000, 3, embedding_bytes=2**30
)
TIGHT = Machine(gpu_bytes=int(2.6 * 2**30), host_bytes=16 * 2**30)


def test_a_training_decides_once_where_the_embedding_is() -> None:
    free = Planner(settings(Path("m")), LARGE_TABLE, TIGHT)
    short, long = 256, free.longest()
    assert free.plan(long).embedding_on_host
    assert not free.plan(short).embedding_on_host
    training = dataclasses.replace(free, documents=(long,), made={})
    assert training.decide(long).embedding_on_host
    assert training.plan(short).embedding_on_host
    assert training.decide(long).embedding_on_host  # again, as an engine does
    other = dataclasses.replace(free, documents=(short,), made={})
    assert not other.decide(short).embedding_on_host
    with pytest.raises(ResourceError):
        other.plan(long)


def test_an_engine_moves_the_embedding_and_gives_it_back(untied_model_folder: Path) -> None:
    config = settings(untied_model_folder, plan="embedding=host")
    loaded = load_model(config, config, context_length=128, training=True)
    loaded.model = adapters.attach(loaded.model, config, quantization="none")
    machine = machine_for(config, torch.device("cpu"), 1, 4)
    shape = model_shape(loaded.causal_lm.config, config, "none", 4, embedding_can_move=True)
    embedding = loaded.model.get_input_embeddings()
    engine = start_engine(loaded, Planner(config, shape, machine), 128)
    assert "forward" in vars(embedding)
    engine.close()
    assert not {"forward", "_apply"} & vars(embedding).keys()


def test_an_embedding_that_does_not_fit_back_stays_on_the_host_and_ends_no_training(
    untied_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longlora_cli.training import engine as engines

    tried = []

    def full() -> None:
        tried.append(True)
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(engines, "use_host_embedding", lambda model: full)
    config = settings(untied_model_folder, plan="embedding=host")
    loaded = load_model(config, config, context_length=128, training=True)
    loaded.model = adapters.attach(loaded.model, config, quantization="none")
    machine = machine_for(config, torch.device("cpu"), 1, 4)
    shape = model_shape(loaded.causal_lm.config, config, "none", 4, embedding_can_move=True)
    start_engine(loaded, Planner(config, shape, machine), 128).close()
    assert tried
    assert "forward" not in vars(loaded.causal_lm)


@pytest.mark.parametrize("part", ["embedding=disk", "embedding=", "embedding"])
def test_a_place_that_no_embedding_can_have_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match=r"gpu or host|KEY=VALUE"):
        settings(Path("m"), plan=part)
