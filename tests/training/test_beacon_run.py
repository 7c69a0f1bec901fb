"""Training beacons by the command: alone and beside an adapter, resumed, over processes, loaded back."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from forked import Server
from safetensors.torch import load_file
from tiny_models import make_tiny_model

from longlora_cli.beacon.choice import settings_of
from longlora_cli.beacon.loading import load_model, train_beacons
from longlora_cli.beacon.projections import projections_of
from longlora_cli.beacon.session import BeaconSession
from longlora_cli.beacon.training import window_losses
from longlora_cli.commands import merge, train
from longlora_cli.config import MergeConfig, TrainConfig
from longlora_cli.console import Console
from longlora_cli.data.chunk import Chunk
from longlora_cli.data.collate import collate
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.long_documents import LongDocuments
from longlora_cli.errors import DataError, IncompatibleError, IntegrityError, SettingsError
from longlora_cli.models import loading
from longlora_cli.models.tokenizer import load_tokenizer, template_sha256, tokenizer_sha256
from longlora_cli.sections import ModelSection
from longlora_cli.storage import read_json_lines, sha256_of, verify_folder
from longlora_cli.training import checkpoint
from longlora_cli.training.objective import BeaconObjective

BEACONS = Path("adapter") / "beacon" / "beacon.safetensors"
LOW_RANK = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """16 documents of 96 tokens (6 windows of 16) and, packed in pairs, 8 of 40 (3) and 8 of 56 (4); of 8 tokens only,
    so that there is something to learn.
    """
    tokenizer = load_tokenizer(tiny_model_folder)
    random = np.random.default_rng(0)
    chunks = []
    for number in range(24):
        ids = random.integers(3, 11, 96).astype(np.int32)
        labels, lengths = ids.copy(), [40, 56] if number % 3 == 0 else [96]
        labels[np.cumsum(lengths) - lengths] = -100
        chunks.append(Chunk(ids, labels, np.array(lengths, dtype=np.int32)))
    folder = tmp_path_factory.mktemp("documents") / "chunks"
    hashes = {"tokenizer_sha256": tokenizer_sha256(tokenizer), "template_sha256": template_sha256(tokenizer)}
    ChunkDataset.write(folder, chunks, {**hashes, "max_length": 96})
    return folder


@pytest.fixture
def command(tiny_model_folder: Path, documents: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model_folder), "data": [str(documents)], "device": "cpu",
        "beacon_ratio": [2, 4, 8], "beacon_window": 16, "adapter": "none", "learning_rate": 1e-3,
    }  # fmt: skip


def run(command: dict[str, Any], *, dry_run: bool = False, **more: Any) -> dict[str, Any]:
    return train.run(TrainConfig(**{**command, **more}), Console(json_mode=True), dry_run=dry_run)


def beside_lora(command: dict[str, Any]) -> dict[str, Any]:
    return {**command, "adapter": "lora", "lora_rank": 4}


def two_processes(server: Server, command: dict[str, Any]) -> str:
    """Train in two processes; what they printed."""
    words = []
    for name, value in command.items():
        shown = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        words += [f"--{name.replace('_', '-')}", shown]
    out, err = (child := server.start("train", *words, processes=2)).communicate(timeout=120)
    assert child.returncode == 0, err
    return out


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_json_lines(folder / "metrics.jsonl") if "tokens_per_second" in row]


def test_beacons_alone_lower_the_loss_and_leave_a_whole_run_without_a_low_rank_adapter(
    command: dict[str, Any], tmp_path: Path
) -> None:
    result = run(command, out=tmp_path / "r", steps=40, batch_size=4, learning_rate=1e-2)
    found = losses(tmp_path / "r")
    assert sum(found[-5:]) < sum(found[:5]) - 0.5
    verify_folder(tmp_path / "r" / "adapter", "adapter")
    assert not (tmp_path / "r" / LOW_RANK).exists()
    tensors = load_file(tmp_path / "r" / BEACONS)
    assert result["trainable"] == sum(t.numel() for t in tensors.values()) == 2 * (64 + 32 + 32) * 64 + 64
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_beside_an_adapter_both_are_trained_and_the_base_is_not(
    command: dict[str, Any], tmp_path: Path
) -> None:
    run(beside_lora(command), out=tmp_path / "r", steps=3)
    low_rank, beacons = load_file(tmp_path / "r" / LOW_RANK), load_file(tmp_path / "r" / BEACONS)
    assert max(t.abs().max() for n, t in low_rank.items() if "lora_B" in n) > 0
    assert not [name for name in low_rank if "beacon" in name]
    assert not [name for name in beacons if "lora" in name]
    loaded = load_model(ModelSection(model=str(tmp_path / "r"), device="cpu"), training=True)
    trained = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or ".beacon." in name for name in trained)
    assert len([n for n in trained if ".beacon." in n]) == len(beacons)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_beacons_train_on_a_quantized_base(
    command: dict[str, Any], tmp_path: Path, quantization: str
) -> None:
    run(command, out=tmp_path / "r", steps=2, quantization=quantization)
    rows = [r for r in read_json_lines(tmp_path / "r" / "metrics.jsonl") if "grad_norm" in r]
    assert len(rows) == 2
    assert all(row["grad_norm"] > 0 for row in rows)
    section = ModelSection(model=str(tmp_path / "r"), device="cpu")
    assert load_model(section).quantization == quantization


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_beacons_are_float32_beside_a_base_of_16_bits(
    command: dict[str, Any], tmp_path: Path, dtype: str
) -> None:
    result = run(command, out=tmp_path / "r", steps=2, dtype=dtype)
    assert 5 < result["last_loss"] < 8
    assert {t.dtype for t in load_file(tmp_path / "r" / BEACONS).values()} == {torch.float32}


# A pass of 4 documents a step has 8 steps.
@pytest.mark.parametrize(
    ("step", "adapter"),
    [
        *(pytest.param(step, "none", marks=pytest.mark.slow) for step in (1, 8)),
        (9, "none"),
        (5, "lora"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    command: dict[str, Any], tmp_path: Path, step: int, adapter: str
) -> None:
    more = {
        "steps": 10,
        "save_every": 1,
        "keep_checkpoints": 20,
        "accumulate": 2,
        "batch_size": 2,
        "warmup": 2,
    }
    if adapter == "lora":
        more |= {"adapter": "lora", "lora_rank": 4, "lora_dropout": 0.2}
    run(command, out=tmp_path / "r", **more)
    names = [BEACONS, *([LOW_RANK] if adapter == "lora" else [])]
    wanted = [sha256_of(tmp_path / "r" / name) for name in names]
    shutil.rmtree(tmp_path / "r" / "adapter")
    for later in checkpoint.steps_of(tmp_path / "r"):
        if later > step:
            shutil.rmtree(checkpoint.folder_of(tmp_path / "r", later))
    run(command, out=tmp_path / "r", **more)
    assert [sha256_of(tmp_path / "r" / name) for name in names] == wanted


@pytest.mark.parametrize("mix", ["step-random", "instance-random", "sequence", "adapt-8"])
def test_two_micro_batches_equal_one_batch(command: dict[str, Any], tmp_path: Path, mix: str) -> None:
    """A step of four documents with equally many windows and the same ratios, however it is cut."""
    once = {"steps": 2, "beacon_ratio_mix": mix}
    run(command, out=tmp_path / "batch", batch_size=4, **once)
    run(command, out=tmp_path / "micro", accumulate=4, **once)
    batch, micro = (read_json_lines(tmp_path / name / "metrics.jsonl")[:2] for name in ("batch", "micro"))
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in micro] == pytest.approx([r[key] for r in batch], rel=2e-5)


def same_tensors(one: Path, two: Path) -> None:
    torch.testing.assert_close(load_file(two), load_file(one), rtol=0, atol=1e-6)


def test_two_processes_equal_one(command: dict[str, Any], tmp_path: Path, server: Server) -> None:
    command = beside_lora(command) | {"steps": 5, "save_every": 5, "eval_data": command["data"][0]}
    run(command, out=tmp_path / "one", accumulate=2)
    out = two_processes(server, {**command, "out": tmp_path / "two", "batch_size": 1})
    assert out.count("step 5: loss") == 1
    measured = [
        [r["eval_nll"] for r in read_json_lines(tmp_path / name / "metrics.jsonl") if "eval_nll" in r]
        for name in ("one", "two")
    ]
    assert len(measured[0]) == 1
    assert measured[1] == pytest.approx(measured[0], rel=1e-5)
    for name in (BEACONS, LOW_RANK):
        same_tensors(tmp_path / "one" / name, tmp_path / "two" / name)


@pytest.mark.slow
def test_two_processes_resume_what_they_began_and_still_equal_one(
    command: dict[str, Any], tmp_path: Path, server: Server
) -> None:
    command |= {"steps": 5, "save_every": 1, "keep_checkpoints": 20}
    for again in (False, True):
        if again:
            wanted = sha256_of(tmp_path / "two" / BEACONS)
            shutil.rmtree(tmp_path / "two" / "adapter")
            for later in (4, 5):
                shutil.rmtree(checkpoint.folder_of(tmp_path / "two", later))
        two_processes(server, {**command, "out": tmp_path / "two"})
    assert sha256_of(tmp_path / "two" / BEACONS) == wanted
    run(command, out=tmp_path / "one", accumulate=2)
    same_tensors(tmp_path / "one" / BEACONS, tmp_path / "two" / BEACONS)


def test_padding_changes_neither_loss_nor_gradient(command: dict[str, Any]) -> None:
    """56 and 60 tokens: four windows each, so they may be one batch, and the shorter row is padded."""
    config = TrainConfig(**command, out="x")
    loaded = train_ready(config)
    settings = settings_of(config)
    assert settings is not None
    chunks = [ChunkDataset.open(Path(command["data"][0]))[1], ChunkDataset.open(Path(command["data"][0]))[2]]
    from longlora_cli.data.shorter import cut

    documents = [cut(chunks[0], 0, 56), cut(chunks[1], 0, 60)]
    objective = BeaconObjective(loaded, settings, seed=0, step=lambda: 3, tile_tokens=8)
    batch = collate(documents, pad_id=7)
    assert batch["document_lengths"] == [[56, 4], [60]]
    together = objective(**batch, num_items_in_batch=1)["loss"]
    together.backward()
    gradients = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
    objective.zero_grad()
    apart = sum(objective(**collate([d], pad_id=7), num_items_in_batch=1)["loss"] for d in documents)
    assert isinstance(apart, torch.Tensor)
    apart.backward()
    assert together.item() == pytest.approx(apart.item(), rel=1e-6)
    for one, other in zip(
        gradients, (p.grad for p in objective.parameters() if p.grad is not None), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def train_ready(config: TrainConfig) -> loading.LoadedModel:
    from longlora_cli.commands.train_plan import load_trained

    return load_trained(config, None, 96, settings_of(config))


def test_every_beacon_weight_gets_a_gradient_in_every_step(command: dict[str, Any]) -> None:
    """DDP waits for all of them; documents of one window, which give none, are left out."""
    config = TrainConfig(**command, out="x", beacon_sink=2)
    loaded, settings = train_ready(config), settings_of(config)
    assert settings is not None
    documents = LongDocuments(ChunkDataset.open(Path(command["data"][0])), 16, 16, learn_first=True)
    shortest = min(range(len(documents)), key=lambda n: len(documents[n]))
    objective = BeaconObjective(loaded, settings, seed=0, step=lambda: 0, tile_tokens=64)
    objective(**collate([documents[shortest]], pad_id=0))["loss"].backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []


def peak_bytes(step: Callable[[], torch.Tensor]) -> int:
    """Most bytes that tensors made in a step and its backward pass take at one time, by torch's own account."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step().backward()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_a_longer_document_takes_little_more_memory(command: dict[str, Any]) -> None:
    """Windows are computed again in the backward pass: what 32 more of them take is their beacons, and one window's
    attention to these. With all activations kept it is 25 times as much, and 38 times for 128 windows.
    """
    config = TrainConfig(**{**command, "beacon_ratio": [8], "beacon_window": 32}, out="x")
    loaded, settings = train_ready(config), settings_of(config)
    assert settings is not None
    objective = BeaconObjective(loaded, settings, seed=0, step=lambda: 0, tile_tokens=32)

    def trained(tokens: int) -> int:
        ids = torch.arange(tokens)[None] % 500
        return peak_bytes(lambda: objective(ids, ids.clone(), [[tokens]])["loss"])

    def kept(tokens: int) -> int:
        ids = torch.arange(tokens)[None] % 500
        whole = partial(window_losses, loaded.causal_lm, settings, ids, ids, tile_tokens=32, recompute=False)
        return peak_bytes(lambda: whole()[0])

    trained(512)  # the first backward pass makes the gradients that later ones find
    growth, growth_kept = trained(1536) - trained(512), kept(1536) - kept(512)
    assert growth < growth_kept / 20


def test_logits_exist_a_tile_at_a_time(
    command: dict[str, Any], tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    (tmp_path / "wide").mkdir()
    model = make_tiny_model(tmp_path / "wide", tiny_tokenizer_folder, vocab_size=16384)
    config = TrainConfig(**{**command, "model": str(model), "beacon_window": 256}, out="x")
    loaded, settings = train_ready(config), settings_of(config)
    assert settings is not None
    ids = torch.arange(512)[None]
    peaks = []
    for tile in (32, 256):
        objective = BeaconObjective(loaded, settings, seed=0, step=lambda: 0, tile_tokens=tile)
        peaks.append(peak_bytes(lambda called=objective: called(ids, ids.clone(), [[512]])["loss"]))
    assert peaks[1] - peaks[0] > 0.8 * (256 - 32) * 16384 * 4


def test_a_run_is_loaded_back_as_it_was_trained(command: dict[str, Any], tmp_path: Path) -> None:
    for name, settings in (("alone", command), ("beside", beside_lora(command))):
        run(settings, out=tmp_path / name, steps=3)
        loaded = load_model(ModelSection(model=str(tmp_path / name), device="cpu"))
        assert loaded.beacons == settings_of(TrainConfig(**settings, out="x"))
        projections = projections_of(loaded.causal_lm)
        assert projections is not None
        saved = load_file(tmp_path / name / BEACONS)
        torch.testing.assert_close(dict(projections.state_dict()), saved, rtol=0, atol=0)
        assert not any(p.requires_grad for p in projections.parameters())


def test_a_loaded_run_gives_the_loss_that_its_last_checkpoint_has_in_training(
    command: dict[str, Any], tmp_path: Path
) -> None:
    """Low-rank matrices are folded into the weights then, and beacons' rows must not see them."""
    run(beside_lora(command), out=tmp_path / "r", steps=3, learning_rate=1e-2)
    section = ModelSection(model=str(tmp_path / "r"), device="cpu")
    used, trained = load_model(section), load_model(section, training=True)
    assert not used.source_has_adapter
    assert trained.source_has_adapter
    ids = torch.arange(60)[None] * 7 % 500
    found = [
        window_losses(m.causal_lm, m.beacons, ids, ids, Random(0))[0].item() for m in (used, trained)
    ]  # fmt: skip
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_beacons_change_what_a_session_answers(command: dict[str, Any], tmp_path: Path) -> None:
    run(command, out=tmp_path / "r", steps=3, learning_rate=1e-2)
    loaded = load_model(ModelSection(model=str(tmp_path / "r"), device="cpu"))
    ids = list(range(3, 80))
    logits = [BeaconSession(loaded, loaded.beacons.with_ratios(ratio)).feed(ids) for ratio in (0, 8)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


def test_beacons_attach_to_their_base_under_another_name_and_to_no_other(
    command: dict[str, Any], tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    run(command, out=tmp_path / "r", steps=1)
    same = Path(shutil.copytree(command["model"], tmp_path / "same"))
    loaded = load_model(ModelSection(model=str(same), device="cpu"), adapter=tmp_path / "r")
    assert projections_of(loaded.causal_lm) is not None
    (tmp_path / "other").mkdir()
    other = make_tiny_model(tmp_path / "other", tiny_tokenizer_folder, seed=1)
    with pytest.raises(IncompatibleError, match="has beacons of another base") as caught:
        load_model(ModelSection(model=str(other), device="cpu"), adapter=tmp_path / "r")
    assert caught.value.exit_code == 4


def test_a_base_that_changed_under_a_run_with_beacons_is_refused(
    command: dict[str, Any], tmp_path: Path, tiny_tokenizer_folder: Path
) -> None:
    base = Path(shutil.copytree(command["model"], tmp_path / "base"))
    run({**command, "model": str(base)}, out=tmp_path / "r", steps=1)
    make_tiny_model(base, tiny_tokenizer_folder, seed=1)
    with pytest.raises(IncompatibleError, match="has beacons of another base"):
        load_model(ModelSection(model=str(tmp_path / "r"), device="cpu"))


def test_damaged_beacons_are_refused(command: dict[str, Any], tmp_path: Path) -> None:
    run(command, out=tmp_path / "r", steps=1)
    with (tmp_path / "r" / BEACONS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(IntegrityError, match=r"beacon\.safetensors differs from its manifest"):
        load_model(ModelSection(model=str(tmp_path / "r"), device="cpu"))


def test_a_run_with_beacons_is_never_loaded_without_them(command: dict[str, Any], tmp_path: Path) -> None:
    run(command, out=tmp_path / "r", steps=1)
    with pytest.raises(IncompatibleError, match="has beacons, which this cannot read"):
        loading.load_model(ModelSection(model=str(tmp_path / "r"), device="cpu"))


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_merge_refuses_beacons_and_says_why(command: dict[str, Any], tmp_path: Path, adapter: str) -> None:
    run({**command, "adapter": adapter}, out=tmp_path / "r", steps=1)
    for sources in ([str(tmp_path / "r")], [str(tmp_path / "r" / "checkpoints" / "step-000001")]):
        with pytest.raises(IncompatibleError, match="has beacons, which no plain model can hold") as caught:
            merge.run(
                MergeConfig(sources=sources, out=tmp_path / "m"), Console(json_mode=True), dry_run=False
            )
        assert caught.value.exit_code == 4
        assert not (tmp_path / "m").exists()


def test_a_dry_run_writes_nothing_and_says_what_will_be_done(command: dict[str, Any], tmp_path: Path) -> None:
    found = run(command, out=tmp_path / "r", dry_run=True, batch_size=4, beacon_sink=2)
    assert not (tmp_path / "r").exists()
    assert found["windows"] == [3, 6]
    assert found["ratios"] == [2, 4, 8]
    assert (found["documents"], found["steps"], found["documents_per_step"]) == (32, 8, 4)
    assert found["beacon_parameters"] == 2 * (64 + 32 + 32) * 64 + 64
    # 96 tokens are six full windows of 16: their beacons, and the sink that is never compressed.
    assert found["kv_rows"] == {"2": 50, "4": 26, "8": 14}


def test_what_a_dry_run_says_of_memory_is_what_a_session_holds(
    command: dict[str, Any], tmp_path: Path
) -> None:
    more = {"beacon_sink": 2, "beacon_window": 32}
    found = run(command, out=tmp_path / "r", dry_run=True, **more)
    loaded = train_ready(TrainConfig(**{**command, **more}, out="x"))
    for ratio in (2, 4, 8):
        session = BeaconSession(loaded, loaded.beacons.with_ratios(ratio))
        session.feed(list(range(96)))
        stats = session.stats()
        assert stats.memory_rows + stats.open_rows == found["kv_rows"][str(ratio)]


def test_documents_of_one_window_are_left_out_and_told(
    command: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(**{**command, "beacon_window": 40}, out=tmp_path / "r", steps=1)
    found = train.run(config, Console(), dry_run=True)
    assert (found["documents"], found["short_documents"]) == (24, 8)
    assert (
        "8 of 32 documents are not longer than a window of 40 tokens and are left out"
        in capsys.readouterr().out
    )


def test_data_without_a_document_longer_than_a_window_is_refused(
    command: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no document is longer than --beacon-window 96; the longest has 96"):
        run({**command, "beacon_window": 96}, out=tmp_path / "r", steps=1)
    assert not (tmp_path / "r").exists()


def test_a_step_larger_than_any_group_of_equal_windows_is_refused(
    command: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="it takes 17 documents with equally many windows"):
        run(command, out=tmp_path / "r", steps=1, batch_size=17)


def test_positions_beyond_the_model_are_told(
    command: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long").mkdir()
    folder = Path(shutil.copytree(command["model"], tmp_path / "short"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    for model, told in ((folder, True), (command["model"], False)):
        train.run(
            TrainConfig(**{**command, "model": str(model)}, out=tmp_path / "r"), Console(), dry_run=True
        )
        # At ratio 2, 5 closed windows leave 40 beacons in front of the last 16 tokens.
        assert ("positions go to 56 at ratio 2" in capsys.readouterr().err) is told


def test_perplexity_during_training_has_one_ratio_and_leaves_the_training_as_it_was(
    command: dict[str, Any], tmp_path: Path
) -> None:
    data = Path(command["data"][0])
    run(command, out=tmp_path / "plain", steps=4)
    results = {
        ratio: run(command, out=tmp_path / f"r{ratio}", steps=4, eval_data=data, eval_every=2, **asked)
        for ratio, asked in ((8, {}), (2, {"eval_beacon_ratio": 2}))
    }
    assert results[2]["eval_nll"] != results[8]["eval_nll"]
    assert sha256_of(tmp_path / "plain" / BEACONS) == sha256_of(tmp_path / "r8" / BEACONS)
    loaded = load_model(ModelSection(model=str(tmp_path / "r8"), device="cpu"))
    documents = LongDocuments(ChunkDataset.open(data), 16, 16, learn_first=True)
    for ratio, result in results.items():
        total, labels = 0.0, 0
        for number in range(len(documents)):
            row = [
                torch.from_numpy(v.astype("int64"))[None]
                for v in (documents[number].input_ids, documents[number].labels)
            ]
            loss, count = window_losses(loaded.causal_lm, loaded.beacons.with_ratios(ratio), *row)
            total, labels = total + loss.item(), labels + int(count)
        assert result["eval_tokens"] == labels
        assert result["eval_perplexity"] == pytest.approx(math.exp(total / labels), rel=1e-5)


def test_a_run_with_beacons_is_trained_on(command: dict[str, Any], tmp_path: Path) -> None:
    run(command, out=tmp_path / "first", steps=2, beacon_param=["q", "k", "v", "o"])
    more = {**command, "model": str(tmp_path / "first")}
    run(more, out=tmp_path / "second", steps=2)
    first, second = load_file(tmp_path / "first" / BEACONS), load_file(tmp_path / "second" / BEACONS)
    assert first.keys() == second.keys()  # the copies of o too, which were not asked for again
    assert any(not torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(SettingsError, match="--beacon-param has no effect"):
        run({**more, "beacon_param": ["q"]}, out=tmp_path / "third", steps=1)
    plain = {name: value for name, value in more.items() if "beacon" not in name and name != "adapter"}
    with pytest.raises(SettingsError, match="has beacons, and this would train without them"):
        run(plain, out=tmp_path / "third", steps=1)


def test_beacons_are_put_on_a_run_whose_adapter_is_trained_on(
    command: dict[str, Any], tmp_path: Path
) -> None:
    plain = {name: value for name, value in command.items() if not name.startswith("beacon")}
    run({**plain, "adapter": "lora", "lora_rank": 4}, out=tmp_path / "first", steps=2)
    more = {name: value for name, value in command.items() if name != "adapter"} | {
        "model": str(tmp_path / "first")
    }
    run(more, out=tmp_path / "second", steps=2)
    first, second = load_file(tmp_path / "first" / LOW_RANK), load_file(tmp_path / "second" / LOW_RANK)
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "second" / BEACONS).is_file()
    with pytest.raises(SettingsError, match="--adapter has no effect"):
        run({**more, "adapter": "none"}, out=tmp_path / "third", steps=1)


def test_a_pass_is_as_long_as_a_dry_run_says(command: dict[str, Any], tmp_path: Path) -> None:
    for epochs in (1, 1.5):
        more = {"batch_size": 3, "accumulate": 2, "epochs": epochs}
        said = run(command, out=tmp_path / str(epochs), dry_run=True, **more)["steps"]
        assert run(command, out=tmp_path / str(epochs), **more)["steps"] == said


FIRST_STEP: dict[str, dict[str, Any]] = {
    "beacon_ratio": {"beacon_ratio": [4]},
    "beacon_ratio_mix": {"beacon_ratio_mix": "sequence"},
    "beacon_window": {"beacon_window": 24},
    "beacon_stride": {"beacon_stride": 8, "beacon_position": "append"},
    "beacon_position": {"beacon_position": "append"},
    "beacon_attention": {"beacon_attention": "step-expansion"},
    "beacon_attend_prev": {"beacon_attention": "step-expansion", "beacon_attend_prev": False},
    "beacon_sink": {"beacon_sink": 4},
    "beacon_param": {"beacon_param": ["q", "k", "v", "o"]},
}


def first_step(command: dict[str, Any], folder: Path, **more: Any) -> tuple[float, float]:
    run({**command, **more}, out=folder, steps=1, batch_size=2)
    row = read_json_lines(folder / "metrics.jsonl")[0]
    return row["loss"], row["grad_norm"]


def test_every_setting_changes_what_the_first_step_computes(command: dict[str, Any], tmp_path: Path) -> None:
    found = {"plain": first_step(command, tmp_path / "plain")}
    for name, more in FIRST_STEP.items():
        found[name] = first_step(command, tmp_path / name, **more)
    assert len(set(found.values())) == len(found), found
    assert found["beacon_param"][0] == found["plain"][0]  # copies begin as what they copy


def test_beacons_begin_as_the_token_that_was_asked_for(command: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="the tokenizer has no such token"):
        first_step(command, tmp_path / "r", beacon_embed_init="bos")
    for name, token in (("eos", 2), ("bos", 1)):
        settings = settings_of(TrainConfig(**command, out="x", beacon_embed_init=name))
        assert settings is not None
        loaded = loading.load_model(ModelSection(model=command["model"], device="cpu"))
        loaded.tokenizer.bos_token = "<|im_start|>"
        train_beacons(loaded, settings)
        projections = projections_of(loaded.causal_lm)
        assert projections is not None
        table = loaded.causal_lm.get_input_embeddings().weight
        torch.testing.assert_close(projections.beacon_embedding[0], table[token], rtol=0, atol=0)


def test_parallel_windows_compute_the_same_step(command: dict[str, Any], tmp_path: Path) -> None:
    plain = first_step(command, tmp_path / "plain")
    parallel = first_step(command, tmp_path / "parallel", beacon_parallel_window=3)
    assert parallel == pytest.approx(plain, rel=1e-5)
