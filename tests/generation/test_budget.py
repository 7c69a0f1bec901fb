"""The outline without weights says what the loaded model will take."""

from __future__ import annotations

import pytest
import torch

from longlora_cli.errors import ResourceError
from longlora_cli.generation.budget import Budget, _cgroup_available, free_bytes, outline_model, size
from longlora_cli.generation.session import Session
from longlora_cli.models.loading import load_model
from longlora_cli.sections import ModelSection, RopeSection

ROPES = {
    "own": (RopeSection(), None),
    "longer": (RopeSection(), 4096),
    "yarn": (RopeSection(rope="yarn", rope_factor=4.0), None),
    "theta by length": (RopeSection(rope="theta"), 4096),
}


@pytest.mark.parametrize("name", ROPES)
def test_the_outline_has_the_loaded_models_context_and_kv_bytes(make_folder, name):
    rope, length = ROPES[name]
    section = ModelSection(model=str(make_folder("outline")), device="cpu", dtype="fp32")
    outline = outline_model(section, rope, adapter=None, context_length=length)
    session = Session(load_model(section, rope, context_length=length), context_length=length)
    assert outline.context_length == session.context_length
    assert 100 * outline.facts.kv_bytes_per_token(outline.element_bytes) == session.kv_bytes_for(100)


def test_the_outline_of_an_adapter_has_its_trained_length(make_loaded):
    loaded = make_loaded("adapter")
    section = ModelSection(model=str(loaded.source.adapter), device="cpu")
    outline = outline_model(section, RopeSection(), adapter=None, context_length=None)
    assert outline.context_length == loaded.context_length
    assert outline.source == loaded.source


def test_the_outline_weighs_the_weights(make_folder):
    section = ModelSection(model=str(make_folder("weights")), device="cpu", dtype="fp32")
    outline = outline_model(section, RopeSection(), adapter=None, context_length=None)
    loaded = load_model(section)
    exact = sum(p.numel() * p.element_size() for p in loaded.causal_lm.parameters())
    assert outline.weights_bytes == pytest.approx(exact, rel=0.05)


def budget(**changes):
    facts = {
        "prompt_tokens": 90,
        "max_new_tokens": 10,
        "context_length": 100,
        "kv_bytes": 2**30,
        "more_bytes": 2**30,
        "free_bytes": 2**31,
    }
    return Budget(**(facts | changes))


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, ": fits"),
        ({"prompt_tokens": 91}, ": does not fit"),
        ({"free_bytes": 2**30 - 1}, ": does not fit"),
        ({"free_bytes": None}, ": fits"),
    ],
)
def test_a_budget_says_whether_it_fits(changes, verdict):
    assert budget(**changes).describe().endswith(verdict)


def test_a_budget_tells_tokens_and_bytes():
    assert (
        budget().describe() == "90 prompt tokens + up to 10 new of 100 (100%), KV 1.0 GiB, 2.0 GiB free: fits"
    )


def test_too_little_memory_is_refused_with_numbers():
    budget().refuse_memory()
    with pytest.raises(ResourceError, match=r"1\.0 GiB more are needed for 100 tokens, 512\.0 MiB are free"):
        budget(free_bytes=2**29).refuse_memory()


def test_free_memory_of_the_host_is_told():
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


def test_a_cgroups_limit_counts_without_the_file_pages_it_can_give_up(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert _cgroup_available(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_available(tmp_path) is None
    assert _cgroup_available(tmp_path / "none") is None


def test_sizes_have_units():
    assert [size(n) for n in (512, 3 * 2**20, 13 * 2**30)] == ["0.5 KiB", "3.0 MiB", "13.0 GiB"]
