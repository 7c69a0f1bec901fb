from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora_cli.data import dataset as module
from longlora_cli.data.chunk import IGNORE, Chunk
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.errors import IncompatibleError, IntegrityError, NotFoundError, SettingsError
from longlora_cli.models.tokenizer import template_sha256, tokenizer_sha256


def chunk(lengths: list[int], first: int = 0) -> Chunk:
    ids = np.arange(first, first + sum(lengths), dtype=np.int32)
    labels = ids.copy()
    starts = np.cumsum(lengths) - lengths
    labels[starts] = IGNORE
    return Chunk(ids, labels, np.array(lengths, dtype=np.int32))


def meta(tokenizer: Any) -> dict[str, Any]:
    return {
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "template_sha256": template_sha256(tokenizer),
        "max_length": 64,
    }


def same(left: Chunk, right: Chunk) -> bool:
    return all(
        np.array_equal(getattr(left, name), getattr(right, name))
        for name in ("input_ids", "labels", "document_lengths")
    )


def test_what_is_written_is_read_again(chatml: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_TOKENS", 20)
    monkeypatch.setattr(module, "_SHARD_TOKENS", 50)  # several batches in several shards
    chunks = [chunk([1 + n % 5, 3, n + 1], n) for n in range(30)]
    found = ChunkDataset.write(tmp_path / "data", chunks, meta(chatml))
    assert len(list((tmp_path / "data").glob("*.arrow"))) > 3
    assert len(found) == 30
    assert all(same(found[n], chunks[n]) for n in range(30))
    assert same(found[-1], chunks[-1])
    with pytest.raises(IndexError):
        found[30]
    assert found[0].input_ids.dtype == np.int32


def test_positions_restart_and_documents_are_numbered() -> None:
    found = chunk([3, 1, 2])
    assert found.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert found.document_ids.tolist() == [0, 0, 0, 1, 2, 2]


def test_the_manifest_counts_what_was_written(chatml: Any, tmp_path: Path) -> None:
    found = ChunkDataset.write(tmp_path / "data", [chunk([3, 1]), chunk([6])], meta(chatml))
    counts = found.manifests[0].meta
    assert (counts["chunks"], counts["tokens"], counts["trained_tokens"]) == (2, 10, 7)
    assert found.longest_chunk == 6
    assert [found.trained_tokens(n) for n in range(2)] == [2, 5]


def test_lengths_that_do_not_sum_to_the_tokens_are_refused(chatml: Any, tmp_path: Path) -> None:
    wrong = Chunk(np.arange(5, dtype=np.int32), np.arange(5, dtype=np.int32), np.array([4], dtype=np.int32))
    with pytest.raises(ValueError, match="document lengths"):
        ChunkDataset.write(tmp_path / "data", [wrong], meta(chatml))
    assert list(tmp_path.iterdir()) == []


def test_the_shards_open_in_datasets(chatml: Any, tmp_path: Path) -> None:
    ChunkDataset.write(tmp_path / "data", [chunk([3, 1]), chunk([6])], meta(chatml))
    rows = datasets.Dataset.from_file(str(tmp_path / "data" / "shard-00000.arrow"))
    assert rows[1]["input_ids"] == [0, 1, 2, 3, 4, 5]
    assert rows[0]["document_lengths"] == [3, 1]


def test_several_folders_are_one_dataset(chatml: Any, tmp_path: Path) -> None:
    ChunkDataset.write(tmp_path / "a", [chunk([3]), chunk([4])], meta(chatml))
    ChunkDataset.write(tmp_path / "b", [chunk([5])], meta(chatml))
    both = ChunkDataset.open_all([tmp_path / "a", tmp_path / "b"])
    assert [len(both[n]) for n in range(len(both))] == [3, 4, 5]
    assert both.longest_chunk == 5


def test_folders_of_different_tokenizers_are_refused(chatml: Any, tmp_path: Path) -> None:
    ChunkDataset.write(tmp_path / "a", [chunk([3])], meta(chatml))
    ChunkDataset.write(tmp_path / "b", [chunk([3])], {**meta(chatml), "tokenizer_sha256": "0"})
    with pytest.raises(IncompatibleError, match="different tokenizers"):
        ChunkDataset.open_all([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("other", ["tokenizer", "chat template"])
def test_another_model_is_refused_by_what_differs(
    chatml: Any, families: dict[str, Any], tmp_path: Path, other: str
) -> None:
    import copy

    found = ChunkDataset.write(tmp_path / "data", [chunk([3])], meta(chatml))
    found.require_tokenizer(chatml)
    model = copy.deepcopy(families["llama3"] if other == "tokenizer" else chatml)
    model.chat_template = chatml.chat_template + (" " if other == "chat template" else "")
    with pytest.raises(IncompatibleError, match=f"another {other}"):
        found.require_tokenizer(model)


def test_a_flipped_bit_is_found_by_verification(chatml: Any, tmp_path: Path) -> None:
    ChunkDataset.write(tmp_path / "data", [chunk([100])], meta(chatml))
    shard = tmp_path / "data" / "shard-00000.arrow"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"shard-00000\.arrow differs"):
        ChunkDataset.open(tmp_path / "data", verify=True)


def test_a_shorter_shard_is_found_always(chatml: Any, tmp_path: Path) -> None:
    ChunkDataset.write(tmp_path / "data", [chunk([100])], meta(chatml))
    shard = tmp_path / "data" / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(IntegrityError, match=r"shard-00000\.arrow has"):
        ChunkDataset.open(tmp_path / "data")


def test_a_folder_without_manifest_is_not_data(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="has no manifest"):
        ChunkDataset.open(tmp_path)


def test_a_folder_that_exists_is_not_overwritten(chatml: Any, tmp_path: Path) -> None:
    ChunkDataset.write(tmp_path / "data", [chunk([3])], meta(chatml))
    with pytest.raises(SettingsError, match="exists already"):
        ChunkDataset.write(tmp_path / "data", [chunk([3])], meta(chatml))


def test_a_worker_process_maps_the_files_anew(chatml: Any, tmp_path: Path) -> None:
    found = ChunkDataset.write(tmp_path / "data", [chunk([3, 2])], meta(chatml))
    sent = pickle.dumps(found)
    assert len(sent) < 400  # paths, not tokens
    assert same(pickle.loads(sent)[0], found[0])


@settings(max_examples=50)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=10))
def test_position_and_document_ids_follow_from_the_lengths(lengths: list[int]) -> None:
    found = chunk(lengths)
    assert found.position_ids.tolist() == [p for length in lengths for p in range(length)]
    assert found.document_ids.tolist() == [n for n, length in enumerate(lengths) for _ in range(length)]
