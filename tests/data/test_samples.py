from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.data.chunk import IGNORE, Chunk
from longlora_cli.data.plots import save_lengths
from longlora_cli.data.samples import sampled_chunks, token_runs


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5))
def test_runs_alternate_within_a_document_and_make_up_its_ids_and_labels(learnt: list[list[bool]]) -> None:
    flags = np.array([flag for document in learnt for flag in document])
    ids = np.arange(len(flags), dtype=np.int32)
    labels = np.where(flags, ids, IGNORE).astype(np.int32)
    lengths = np.array([len(document) for document in learnt], dtype=np.int32)
    documents = token_runs(Chunk(ids, labels, lengths))
    assert [sum(len(run.ids) for run in runs) for runs in documents] == lengths.tolist()
    assert np.array_equal(np.concatenate([run.ids for runs in documents for run in runs]), ids)
    told = [flag for runs in documents for run in runs for flag in [run.is_learnt] * len(run.ids)]
    assert told == flags.tolist()
    for runs in documents:
        assert all(a.is_learnt != b.is_learnt for a, b in itertools.pairwise(runs))


def test_the_seed_decides_which_chunks_are_shown_and_each_is_shown_once() -> None:
    first = sampled_chunks(1000, 5, seed=1)
    assert first == sampled_chunks(1000, 5, seed=1) == sorted(set(first))
    assert first != sampled_chunks(1000, 5, seed=2)
    assert sampled_chunks(3, 5, seed=1) == [0, 1, 2]


def test_equal_data_give_an_equal_picture_and_other_labels_another(tmp_path: Path) -> None:
    lengths, learnt = np.array([3, 900, 40]), np.array([1, 900, 0])
    save_lengths(tmp_path / "a.png", lengths, learnt)
    save_lengths(tmp_path / "b.png", lengths, learnt)
    save_lengths(tmp_path / "c.png", lengths, learnt // 2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()
