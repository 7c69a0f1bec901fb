"""What benchmarks write down and print, without running them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

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


def row(stack: str, seq: int, metric: str, value: float) -> dict[str, Any]:
    origin = {"unit": "", "machine": "M", "commit": "c", "command": "x"}
    return {
        "case": "llama8b-qlora-step",
        "stack": stack,
        "seq": seq,
        "metric": metric,
        "value": value,
        **origin,
    }


def test_a_comparison_of_stacks_has_one_line_for_each_length_and_stack(load: Any) -> None:
    rows = [
        row("longlora", 131072, "tok_s", 3700.4),
        row("hf", 32768, "peak_gib", 72.1),
        row("longlora", 32768, "tflops", 512.5),
        row("hf", 32768, "tok_s", 4234),
        row("longlora", 32768, "tok_s", 8800),
    ]
    table = [line for line in load("results").page(rows).splitlines() if line.startswith("|")]
    assert table == [
        "| length | stack | tokens/s | GPU GiB | TFLOP/s |",
        "| ---: | --- | ---: | ---: | ---: |",
        "| 32,768 | hf | 4,234 | 72.1 |  |",
        "| 32,768 | longlora | 8,800 |  | 512.5 |",
        "| 131,072 | longlora | 3,700 |  |  |",
    ]


def test_lines_of_another_stack_become_rows_and_the_last_before_out_of_memory_is_its_longest(
    load: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    steps = [{"impl": "hf", "seq": n, "tok_s": n // 10, "peak_gib": n / 1000} for n in (1000, 2000)]
    log.write_text(
        "loaded\n"
        + "\n".join(json.dumps(s) for s in steps)
        + '\n{"impl": "hf", "seq": 4000, "oom": true} CUDA\n'
    )
    options = argparse.Namespace(peer_log=log, peer_command="python peer.py", machine="M", commit="c")
    step = load("step")
    rows = list(step.peer_rows(options))
    assert [(r["case"], r["seq"], r["metric"], r["value"]) for r in rows] == [
        ("llama8b-qlora-step", 1000, "tok_s", 100),
        ("llama8b-qlora-step", 1000, "peak_gib", 1.0),
        ("llama8b-qlora-step", 2000, "tok_s", 200),
        ("llama8b-qlora-step", 2000, "peak_gib", 2.0),
        ("llama8b-max-context", 2000, "tok_s", 200),
        ("llama8b-max-context", 2000, "peak_gib", 2.0),
    ]
    out = tmp_path / "rows.jsonl"
    step.add_rows(rows, out)
    assert len(load("results").read_rows(out)) == 6


def test_the_command_of_a_row_names_no_file_of_one_machine(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["step.py", "/data/l8b", "--seq", "32k", "--rows", "/tmp/r", "--commit", "c", "--machine", "M"]
    monkeypatch.setattr(sys, "argv", words)
    assert load("step").own_command() == "python benchmarks/step.py MODEL --seq 32k"


def test_a_context_that_does_not_fit_is_tried_again_with_a_plan_for_less_memory(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longlora_cli.memory.machine import Machine

    module = load("step_rig")
    tried: list[int] = []

    class Rig:
        machine = Machine(gpu_bytes=100_000, host_bytes=0)

        def longest(self) -> int:
            return self.machine.gpu_bytes // 10

    def runs_below_9500(rig: Rig, tokens: int, steps: int | None, *, short_warm_up: bool) -> int | None:
        tried.append(tokens)
        return tokens if tokens < 9500 else None

    monkeypatch.setattr(module, "measure_or_none", runs_below_9500)
    assert module.longest(Rig(), None) == 9409
    assert tried == [10_000, 9_700, 9_409]


def test_a_step_of_the_engine_and_of_the_plain_path_have_one_loss(
    load: Any, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    step = load("step")
    rows = tmp_path / "rows"
    words = [str(tiny_model_folder), "--model-kind", "smollm2", "--seq", "48", "--steps", "1"]
    words += ["--rows", str(rows), "--commit", "c", "--machine", "M"]
    options = step.parse(words)
    losses = []
    for stack in ("longlora", "hf"):
        rig = step.build(options, stack, torch.device("cpu"))
        torch.manual_seed(0)
        losses.append(rig.step(48))
        rig.undo()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    step.run(options, "longlora", torch.device("cpu"))
    assert {r["metric"] for r in load("results").read_rows(rows)} == {
        "tok_s",
        "peak_gib",
        "host_gib",
        "tflops",
    }
    assert "groups of" in capsys.readouterr().out
