"""Files are read and written a block at a time; what is damaged is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longlora_cli.errors import IntegrityError, SecurityError
from longlora_cli.merging.tensors import OutputTensor, write_model
from longlora_cli.models.tensors import BLOCK_ELEMENTS, StoredRows, open_folder


def outputs_of(folder: Path, dtype: torch.dtype | None = None) -> list[OutputTensor]:
    tensors = open_folder(folder).tensors
    return [OutputTensor(n, t.shape, dtype or t.dtype, lambda t=t: StoredRows(t)) for n, t in tensors.items()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (3,), "b": (5, 7), "c": (2, 3, 4), "d": (), "e": (300, 8192), "f": (0, 4)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    assert tensors["e"].numel() > 2 * BLOCK_ELEMENTS
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    return tmp_path / "in"


@pytest.mark.parametrize("shard_bytes", [10**9, 5_000, 100])
def test_what_is_written_is_what_was_read_in_any_number_of_shards(folder, tmp_path, shard_bytes):
    out = tmp_path / "out"
    out.mkdir()
    done: list[int] = []
    write_model(out, outputs_of(folder), advance=done.append, shard_bytes=shard_bytes)
    expected, found = load_file(folder / "model.safetensors"), {}
    files = sorted(out.glob("*.safetensors"))
    for file in files:
        found |= load_file(file)

    assert (len(files) == 1) == (shard_bytes == 10**9)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert sum(done) == sum(t.nbytes for t in expected.values())
    reread = open_folder(out).tensors
    assert torch.equal(reread["e"].read(), expected["e"])


def test_the_index_gives_the_bytes_and_places_every_tensor(folder, tmp_path):
    write_model(tmp_path, outputs_of(folder), advance=lambda n: None, shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in open_folder(folder).tensors.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_cut_off_file_is_refused(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(IntegrityError, match="damaged"):
        open_folder(folder)


def test_an_index_may_not_point_outside_its_folder(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../outside.safetensors"}})
    )
    with pytest.raises(SecurityError, match="outside"):
        open_folder(folder)


def test_an_index_that_lists_a_missing_tensor_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"z": "part.safetensors"}})
    )
    with pytest.raises(IntegrityError, match="differ: a"):
        open_folder(folder)


MEASURE = """
import sys, pathlib, torch
from longlora_cli.merging import plan, quantized, methods, tensors, mixing
from longlora_cli.models import layout
import transformers, peft, bitsandbytes, peft.tuners.lora
torch.set_num_threads(1)

def high_water():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024

sources, quantization, out = sys.argv[4:], sys.argv[1], pathlib.Path(sys.argv[2])
layout.layout_of(pathlib.Path(sys.argv[3]))  # importing the architecture belongs to the imports
a = torch.randn(64, 64); quantized.nf4_round_trip(a)
torch.addmm(a.double(), a.double(), a.double())
before = high_water()
ingredients = plan.read_ingredients(sources, None)
seen = quantized.Seen(quantization, torch.bfloat16)
merged = plan.plan_model(ingredients, [1 / len(sources)] * len(sources), methods.METHODS["linear"], seen, "auto")
out.mkdir()
tensors.write_model(out, merged.outputs, advance=lambda n: None)
print(high_water() - before, merged.nbytes // 2**20)
"""


def growth(base: Path, sources: list[Path], out: Path, quantization: str = "none") -> tuple[int, int]:
    """MiB of memory that a merge needed above the imports, and MiB that it wrote."""
    command = [sys.executable, "-c", MEASURE, quantization, str(out), str(base), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    needed, written = done.stdout.split()
    return int(needed), int(written)


LARGE = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}


@pytest.mark.parametrize(
    "kind",
    ["nf4 adapter", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("two models", "adapter"))],
)
def test_merging_needs_the_same_memory_whatever_the_size(make_base, make_adapter, tmp_path, kind):
    base = make_base(dtype=torch.bfloat16, **LARGE)
    sources = (
        [base, base]
        if kind == "two models"
        else [make_adapter(base, r=64, target_modules=["q_proj", "up_proj"])]
    )
    needed, written = growth(base, sources, tmp_path / "out", "nf4" if kind == "nf4 adapter" else "none")
    assert written >= 100
    assert needed <= 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["two models", "adapter", "nf4 adapter"])
def test_600_mb_are_merged_in_300(make_base, make_adapter, tmp_path, kind):
    base = make_base(dtype=torch.bfloat16, **{**LARGE, "vocab_size": 128_256, "num_hidden_layers": 12})
    sources = [base, base] if kind == "two models" else [make_adapter(base, r=64)]
    needed, written = growth(base, sources, tmp_path / "out", "nf4" if kind == "nf4 adapter" else "none")
    assert written >= 590
    assert needed <= 300


def test_a_kill_in_the_middle_leaves_no_folder(make_base, tmp_path, server):
    base = make_base(dtype=torch.bfloat16, **LARGE)
    out = tmp_path / "out"
    process = server.start("merge", base, base, "--out", out)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        staged = list(tmp_path.glob(".staging-*/model.safetensors"))
        if staged and os.path.getsize(staged[0]) > 1_000_000:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert staged
    assert not out.exists()
