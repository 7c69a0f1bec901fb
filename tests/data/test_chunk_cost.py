from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from longlora_cli.data.chunk_cost import ChunkCost, chunk_cost, chunk_costs, default_cost
from longlora_cli.memory.cost import Flops, squared_lengths
from longlora_cli.memory.plan import ModelShape
from longlora_cli.models.source import AdapterRecord

SHAPE = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, 2, 0, 0)


def test_a_merged_models_sizes_are_its_own_beside_the_record_of_its_making(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    shutil.copytree(tiny_model_folder, merged)
    (merged / "longlora.json").write_text(json.dumps({"format": 1, "kind": "merge", "adapter": False}))
    assert chunk_cost(str(merged)).per_token == chunk_cost(str(tiny_model_folder)).per_token


@pytest.mark.parametrize("lengths", [[1], [32768], [5, 70, 900]])
def test_a_chunk_costs_what_the_planner_counts(lengths: list[int]) -> None:
    planned = Flops.of(SHAPE, sum(lengths), squared_lengths(lengths)).model(SHAPE.layers)
    assert default_cost().of(np.array(lengths)).sum() == pytest.approx(planned, rel=1e-12)


def test_sizes_are_the_models_own(tiny_model_folder: Path) -> None:
    config = json.loads((tiny_model_folder / "config.json").read_text())
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    cost = chunk_cost(str(tiny_model_folder))
    assert cost.per_squared_token == layers * 3.5 * 2 * heads * head_dim
    assert cost.model == str(tiny_model_folder)
    assert chunk_cost("builtin").per_token < default_cost().per_token


def test_a_run_has_its_bases_sizes(tiny_model_folder: Path, tmp_path: Path) -> None:
    record = AdapterRecord(str(tiny_model_folder), "", {}, "none", "fp32", 64)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "longlora.json").write_text(record.to_json())
    of_run, of_base = chunk_cost(str(tmp_path)), chunk_cost(str(tiny_model_folder))
    assert (of_run.per_token, of_run.per_squared_token) == (of_base.per_token, of_base.per_squared_token)
    assert of_run.model == str(tmp_path)


def test_sizes_may_lie_under_the_text_part_of_a_config(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config, "vision_config": {}}))
    assert chunk_cost(str(tmp_path)).per_token == chunk_cost(str(tiny_model_folder)).per_token


@pytest.mark.parametrize("content", [None, "{", "[]", '{"hidden_size": 0}', '{"hidden_size": 64}'])
def test_without_a_decoders_sizes_the_default_is_taken_and_named(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert chunk_cost(str(tmp_path)) == default_cost()
    assert default_cost().model == "Llama-3.1-8B"


def test_costs_of_chunks_are_summed_over_their_documents() -> None:
    cost = ChunkCost(10.0, 1.0, "a model")
    lengths = [np.array([2, 3]), np.array([4]), np.array([1, 1, 1])]
    assert chunk_costs(lengths, cost).tolist() == [24 + 39, 56, 33]
    assert chunk_costs([], cost).tolist() == []


def test_the_manifest_holds_all_of_it() -> None:
    assert ChunkCost(**default_cost().as_dict()) == default_cost()  # type: ignore[arg-type]
