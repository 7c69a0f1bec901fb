"""How much of what is asked training data hold."""

from __future__ import annotations

import random

import numpy as np
import pytest

from longlora_cli.config import EvalConfig
from longlora_cli.data.chunk import Chunk
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.errors import DataError, IncompatibleError
from longlora_cli.evaluation.plan import make_plan
from longlora_cli.evaluation.train_overlap import open_train_data, overlap_audit
from longlora_cli.models.tokenizer import load_tokenizer, template_sha256, tokenizer_sha256


def text(seed: int, words: int = 400) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(words)) + "."


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder)


@pytest.fixture
def plan(tiny_model_folder, tokenizer, tmp_path):
    """Perplexity of text 1, and passkeys in text 2."""
    for seed in (1, 2):
        (tmp_path / f"{seed}.txt").write_text(text(seed))
    config = EvalConfig(
        beyond=True,
        model=str(tiny_model_folder), tasks=["ppl", "passkey"], data=[tmp_path / "1.txt"],
        haystack=[tmp_path / "2.txt"], lengths=[600], depths=1, samples=1, out=tmp_path / "out",
    )  # fmt: skip
    return make_plan(config, tokenizer)


def overlap(plan, paths):
    return overlap_audit(plan, open_train_data(paths, plan.tokenizer), lambda size: None)


def test_a_task_whose_text_was_trained_on_is_told_from_one_whose_text_was_not(plan, tmp_path):
    path = tmp_path / "train.txt"
    path.write_text(f"{text(5)} {text(1)}")
    found = overlap(plan, [path])
    assert found["value"] == {"passkey": 0.0, "ppl": 1.0}
    assert found["ok"] is False
    assert found["note"].startswith("training data hold much of ppl 100.0 %;")


def test_a_half_that_was_trained_on_is_about_a_half(plan, tmp_path):
    path = tmp_path / "train.txt"
    path.write_text(" ".join(text(1).split()[:200]))
    assert overlap(plan, [path])["value"]["ppl"] == pytest.approx(188 / 388)


def test_other_texts_share_nothing(plan, tmp_path):
    path = tmp_path / "train.txt"
    path.write_text(text(7))
    found = overlap(plan, [path])
    assert (found["ok"], found["value"]) == (True, {"passkey": 0.0, "ppl": 0.0})


def test_several_data_are_looked_at_together(plan, tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, part in zip(paths, (slice(0, 200), slice(200, 400)), strict=True):
        path.write_text(" ".join(text(1).split()[part]))
    assert overlap(plan, paths)["value"]["ppl"] == pytest.approx(376 / 388)


def test_chats_are_read_turn_by_turn(plan, tmp_path):
    import json

    path = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": text(1)}, {"role": "assistant", "content": "yes"}]
    path.write_text(json.dumps({"messages": turns}))
    assert overlap(plan, [path])["value"]["ppl"] == 1.0


def prepared(folder, tokenizer, tokenizer_hash):
    ids = np.concatenate([safe_encoder(tokenizer).encode_batch([text(seed)])[0] for seed in (5, 1)])
    size = len(safe_encoder(tokenizer).encode_batch([text(5)])[0])
    lengths = np.array([size, len(ids) - size], dtype=np.int32)
    chunk = Chunk(ids.astype(np.int32), ids.astype(np.int32), lengths)
    meta = {"tokenizer_sha256": tokenizer_hash, "template_sha256": template_sha256(tokenizer)}
    ChunkDataset.write(folder, [chunk], {**meta, "max_length": len(ids)})
    return folder


def test_prepared_data_are_read_document_by_document(plan, tmp_path):
    folder = prepared(tmp_path / "chunks", plan.tokenizer, tokenizer_sha256(plan.tokenizer))
    assert overlap(plan, [folder])["value"] == {"passkey": 0.0, "ppl": 1.0}


def test_prepared_data_of_another_tokenizer_are_refused(plan, tmp_path):
    folder = prepared(tmp_path / "chunks", plan.tokenizer, "another")
    with pytest.raises(IncompatibleError, match="another tokenizer"):
        open_train_data([folder], plan.tokenizer)


def test_missing_data_are_refused_before_anything_is_read(tokenizer, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        open_train_data([tmp_path / "nowhere"], tokenizer)
