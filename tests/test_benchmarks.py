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


def check_options(load: Any, folder: Path) -> argparse.Namespace:
    """Of a check on a CPU, whose bf16 rounds elsewhere than a GPU's and whose few tokens leave more to chance."""
    words = [str(folder), "--model-kind", "smollm2", "--check", "--layers", "2"]
    words += ["--seq", "96", "--texts", "3", "--slack", "1.25"]
    options: argparse.Namespace = load("step").parse(words)
    return options


def test_losses_and_gradients_of_the_engine_are_as_near_to_float32_as_the_plain_path(
    load: Any, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    assert load("step_check").check(check_options(load, tiny_model_folder), torch.device("cpu"))
    shown = capsys.readouterr().out
    assert "96 tokens, 3 texts" in shown
    for line in ("token losses", "losses of 64 tokens", "loss ", "q_proj.lora_A", "down_proj.lora_B"):
        assert f"\n  {line}" in shown


def test_an_engine_that_loses_precision_does_not_pass_the_check(
    load: Any, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from longlora_cli.memory.engine import FusedEngine

    real = FusedEngine.run

    def rough(self: FusedEngine, *args: Any) -> torch.Tensor:
        x = real(self, *args)
        return x + 0.004 * x.detach().abs().mean() * torch.randn_like(x)

    monkeypatch.setattr(FusedEngine, "run", rough)
    assert not load("step_check").check(check_options(load, tiny_model_folder), torch.device("cpu"))
    (line,) = [s for s in capsys.readouterr().out.splitlines() if "token losses" in s]
    assert "TOO LARGE" in line


def test_token_losses_that_do_not_add_up_to_the_loss_are_refused(
    load: Any, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from longlora_cli.memory import engine

    real = engine.normed_loss

    def more(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, count = real(*args, **kwargs)
        return total * (1 + 1e-5), count

    monkeypatch.setattr(engine, "normed_loss", more)
    with pytest.raises(RuntimeError, match="token losses have the mean"):
        load("step_check").check(check_options(load, tiny_model_folder), torch.device("cpu"))


def with_errors(load: Any, *, spread: float, offset: float = 0.0, seed: int = 0, texts: int = 8) -> list[Any]:
    """Results of texts whose token losses of 10 nats have independent errors and an offset."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(texts):
        tokens = 10 + offset + spread * torch.randn(2047, generator=draw, dtype=torch.float64)
        found.append(load("step_check").Result(float(tokens.mean()), tokens, {"w.lora_A": torch.ones(1)}))
    return found


def test_a_path_of_equal_precision_passes_though_the_other_was_lucky(load: Any) -> None:
    module = load("step_check")
    exact = with_errors(load, spread=0.0)
    plain = with_errors(load, spread=0.01, seed=1)
    lucky = [module.Result(e.loss + 1e-7, p.tokens, p.gradients) for e, p in zip(exact, plain, strict=True)]
    ours = [with_errors(load, spread=0.0098, seed=seed) for seed in range(2, 22)]
    assert sum(module.compare(2048, exact, found, lucky, 1.0) for found in ours) == 20


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"spread": 0.011}, "token losses"),
        ({"spread": 0.0098, "offset": 0.002}, "losses of 64 tokens"),
        ({"spread": 0.0098, "offset": 0.002}, "loss "),
    ],
)
def test_each_size_of_error_has_the_line_that_finds_it(
    load: Any, changes: dict[str, float], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exact, plain = with_errors(load, spread=0.0), with_errors(load, spread=0.01, seed=1)
    ours = with_errors(load, seed=2, **changes)
    assert not load("step_check").compare(2048, exact, ours, plain, 1.0)
    (shown,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith(f"  {line}")]
    assert "TOO LARGE" in shown


@pytest.mark.parametrize(("numbers", "chi_squared"), [(4, 13.277), (8, 20.090), (64, 93.217)])
def test_the_allowance_for_few_texts_is_the_99_percent_point_of_chi_squared(
    load: Any, numbers: int, chi_squared: float
) -> None:
    assert load("step_check").chance(numbers) ** 2 == pytest.approx(chi_squared / numbers, rel=0.01)


def test_longer_texts_are_fewer_but_never_one(load: Any) -> None:
    of = load("step_check").default_texts
    assert [of(n) for n in (512, 2048, 4096, 8192, 32768)] == [8, 8, 4, 4, 4]


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("The river ran past the mill, and nobody saw it. " * 2000)
    return folder


def test_prepare_and_its_rivals_make_tokens_of_the_same_books(load: Any, books: Path, tmp_path: Path) -> None:
    prepare = load("prepare")
    tokens = {}
    for stack, run in prepare.STACKS.items():
        (tmp_path / stack).mkdir()
        figures = run(books, "builtin", tmp_path / stack)
        assert all(figures[name] > 0 for name in ("seconds", "cpu_seconds", "peak_bytes"))
        tokens[stack] = figures["tokens"]
    # Prepare alone ends each of the two books with an end token.
    assert tokens["longlora"] == tokens["longlora-command"]
    assert tokens["longlora"] - 2 == tokens["tokenizers-raw"] == tokens["datasets-map"] > 20_000


def test_one_file_of_a_size_repeats_the_books(load: Any, books: Path, tmp_path: Path) -> None:
    prepare = load("prepare")
    one = prepare.one_file(books, tmp_path / "one.txt").read_text()
    assert one == "".join(path.read_text() + "\n\n" for path in sorted(books.iterdir()))
    large = prepare.one_file(books, tmp_path / "large.txt", 1).stat().st_size
    assert 1_000_000 <= large < 1_000_000 + len(one)


def test_medians_become_rows_and_ratios(load: Any, tmp_path: Path) -> None:
    prepare = load("prepare")

    def figures(seconds: float, cpu_seconds: float) -> dict[str, float]:
        return {"tokens": 1000, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": 1 << 30}

    found = {
        ("tokenizers-raw", "files"): figures(9.0, 18.0),
        ("longlora", "files"): figures(10.0, 20.0),
        ("longlora", "one file"): figures(8.0, 20.0),
        ("longlora-command", "files"): figures(12.5, 20.0),
        ("datasets-map", "files"): figures(20.0, 30.0),
    }
    assert list(prepare.ratios(found)) == [
        ("longlora / tokenizers-raw", 0.9, 0.9),
        ("longlora-command / tokenizers-raw", 0.72, 0.9),
        ("longlora / datasets-map", 2.0, 1.5),
        ("one file / files", 1.25, 1.0),
    ]
    options = argparse.Namespace(machine="M", commit="c", rounds=3)
    out = tmp_path / "rows.jsonl"
    prepare.add_rows(prepare.rows_of(options, found), out)
    rows = load("results").read_rows(out)
    assert [(r["metric"], r["value"]) for r in rows[:3]] == [
        ("tok_s", 111),
        ("seconds", 9.0),
        ("peak_host_gib", 1.0),
    ]
    table = [line for line in load("results").page(rows).splitlines() if "| longlora" in line]
    assert table == [
        "|  | longlora (files) | 100 | 10 | 1 |",
        "|  | longlora (one file) | 125 | 8 | 1 |",
        "|  | longlora-command (files) | 80 | 12.5 | 1 |",
    ]


def test_a_model_built_in_memory_is_quantized_and_computes_as_an_untrained_one(load: Any) -> None:
    import math

    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    module = load("random_model")
    config = module.llama8b_config(2)
    assert (config.num_hidden_layers, config.hidden_size) == (2, 4096)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = type(config)(**sizes, num_hidden_layers=2, vocab_size=500)
    quantizer = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = module.quantized_in_memory(config, torch.device("cpu"), "sdpa", quantizer)
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 14
    assert all(isinstance(m, Linear4bit) and m.weight.quant_state is not None for m in linears)
    assert not isinstance(model.lm_head, Linear4bit)
    ids = torch.randint(0, 500, (1, 64))
    assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(math.log(500), rel=0.05)
