"""The benchmark of beacons: what it asks for is accepted, what it measures is what is held, its rows are whole."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from longlora_cli.beacon.loading import load_model, train_beacons
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.sections import ModelSection

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark's module by its name; modules beside it can be imported by it."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def by_name(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return by_name


def test_facts_alone_are_asked_with_the_recipes_lengths_and_samples(load: Any) -> None:
    flags = load("smollm2_beacon").needle_flags("smollm2-135m-beacon.yaml")
    assert flags[:2] == ["--tasks", "needle"]
    assert flags[flags.index("--samples") + 1] == "26"
    assert "--beyond" in flags
    assert "--window" not in flags


@pytest.mark.parametrize("ratio", [None, 2, 8])
def test_bytes_that_are_measured_are_those_of_the_plan(
    load: Any, tiny_model_folder: Path, ratio: int | None
) -> None:
    loaded = load_model(ModelSection(model=str(tiny_model_folder), device="cpu"))
    train_beacons(loaded, BeaconSettings(16, ratios=(2, 8), sink=2))
    found = load("beacon_speed").measure(loaded, list(range(3, 90)), ratio, 2, 2)
    assert found["kv_bytes_per_token"] == found["planned_kv_bytes_per_token"]
    assert found["prefill_seconds"] > 0
    assert found["decode_tok_s"] > 0
    # 2 layers of 2 heads of 16, keys and values, float32; 5 windows of 16 are full, and 7 tokens are left.
    rows = {None: 87, 2: 2 + 5 * 8 + 7 + 3, 8: 2 + 5 * 2 + 7}[ratio]
    assert found["kv_bytes"] == rows * 2 * 2 * 2 * 16 * 4


def test_rows_and_aims_come_from_evaluations_and_speed(load: Any, tmp_path: Path) -> None:
    module, results = load("smollm2_beacon"), load("results")
    origin = {"machine": "M", "commit": "c", "command": "x"}
    rows = []
    for stack, perplexity, score in ((module.FULL, 20.0, 1.0), ("x4", 21.0, 0.95), ("x8 + BM25", None, 0.99)):
        cell = {"length": 8192, "score": score, "n": 104, "ci95": [0.9, 1.0]}
        tasks: dict[str, Any] = {"needle": {"lengths": [cell]}}
        if perplexity is not None:
            tasks["ppl"] = {"by_position": [{"to": 32768, "perplexity": perplexity, "n": 10}]}
        folder = tmp_path / module.folder_name(stack)
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps({"tasks": tasks}))
        rows += module.rows_of(folder, stack, origin)
    speed = {
        "prefill_seconds": 2.0,
        "decode_tok_s": 50.0,
        "kv_bytes_per_token": 100.0,
        "planned_kv_bytes_per_token": 100.0,
    }
    rows += module.speed_rows(
        {module.FULL: speed | {"tokens": 65536}, "x4": speed | {"tokens": 65536}}, origin
    )
    results.add_rows(rows, tmp_path / "rows.jsonl")
    assert results.read_rows(tmp_path / "rows.jsonl") == rows
    said = module.aims(rows, trained=16384, farthest=65536)
    assert "x4 perplexity up to 32,768: +5.0 % of full (aim 5 %)" in said
    assert "x4 needle at 8,192: 95 % (aim 90 %)" in said
    assert "x8 + BM25 needle at 8,192: 99 % (aim 99 %)" in said
    assert "x4 keys: +0.00 % of the plan (aim 2 %)" in said
    assert "x4 reads 65,536 in 2.00 s, full in 2.00 s" in said


def test_every_way_to_read_has_its_flags_and_its_folder(load: Any, tmp_path: Path) -> None:
    module = load("smollm2_beacon")
    options = argparse.Namespace(work=tmp_path, base="base", ratios=[2, 8], parallel=4, skip_retrieval=False)
    found = module.stacks(options)
    assert list(found) == [module.FULL, "x2", "x8", "x8 + BM25"]
    assert found["x8"][2:] == ["--beacon-ratio", "8", "--beacon-parallel-window", "4"]
    assert found["x8 + BM25"][2:] == ["--beacon-ratio", "8", "--retrieval-method", "bm25"]
    assert [module.folder_name(name) for name in found] == [
        "eval-full-attention",
        "eval-x2",
        "eval-x8",
        "eval-x8-BM25",
    ]
