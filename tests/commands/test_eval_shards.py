"""An evaluation in shares is the evaluation."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longlora_cli.commands import eval as command
from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.errors import SettingsError
from longlora_cli.options import resolve

TASKS = ["ppl", "passkey", "needle", "generate", "lines"]
UNEQUAL = {"seconds", "reused_tokens"}  # of the clock, and of which prompt came before


@pytest.fixture(scope="module")
def settings(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(f"The {name} river was old. They walked over the bridge. " * 40)
    asked = [{"input": "What is blue?", "answers": ["mill"]}, {"input": "What is it?", "answers": ["blue"]}]
    line = {"context": "The mill is blue.", "questions": asked}
    rows = [{"input": "say one", "outputs": ["one"]}, {"input": "say two", "outputs": ["two"]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, line]))
    return {
        "model": str(tiny_model_folder), "tasks": TASKS, "haystack": [folder / "a.txt"],
        "data": [*(folder / f"{n}.txt" for n in ("a", "b", "c")), folder / "rows.jsonl"],
        "lengths": [400, 600], "depths": 2, "samples": 2, "max_new_tokens": 4, "needle_facts": 3, "window": 64,
        "max_tokens": 200, "compat": ["hf-docs"],
    }  # fmt: skip


def samples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.stem: [
            {k: v for k, v in json.loads(line).items() if k not in UNEQUAL}
            for line in path.read_text().splitlines()
        ]
        for path in sorted((folder / "samples").iterdir())
    }


def run(settings: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    return command.run(
        EvalConfig(beyond=True, **settings, out=out, **more), Console(json_mode=True), dry_run=False
    )


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    run(settings, out)
    return out


def test_three_shares_put_together_are_the_evaluation_and_nothing_is_asked_twice(
    settings: dict[str, Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    answered = [run(settings, out, shard=f"{number}/3")["answered"] for number in (2, 3, 1)]
    assert not out.exists()
    sizes = {name: len(rows) for name, rows in samples(whole).items()}
    assert {task: sum(one[task] for one in answered) for task in TASKS} == sizes
    assert all(one["needle"] < sizes["needle"] for one in answered)

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("longlora_cli.evaluation.answerer.SessionAnswerer.answer", asked)
    monkeypatch.setattr("longlora_cli.evaluation.measure_perplexity.score_text", asked)
    run(settings, out)
    assert samples(out) == samples(whole)
    for name in ("nll.npy", "nll_offsets.npy"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_a_missing_share_is_answered_when_shares_are_put_together(
    settings: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(settings, out, shard="2/3")
    run(settings, out)
    assert samples(out) == samples(whole)


def test_two_processes_of_a_launcher_are_the_evaluation(
    settings: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [f"--{k.replace('_', '-')}={','.join(map(str, v)) if isinstance(v, list) else v}"
             for k, v in settings.items() if k not in ("data", "haystack")]  # fmt: skip
    words += ["--beyond"]
    words += [
        word for name in ("data", "haystack") for path in settings[name] for word in (f"--{name}", str(path))
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes=2",
        "--main_process_port",
        port,
        "-m",
    ]
    done = subprocess.run(
        [sys.executable, *launcher, "longlora_cli", "eval", *words, "--out", str(out), "--json"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["out"] == str(out)  # one object: only one process speaks
    assert samples(out) == samples(whole)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("share", ["5/4", "0/2", "1", "1/2/3", "a/b", "-1/2"])
def test_what_is_no_share_is_refused(share: str) -> None:
    with pytest.raises(SettingsError, match=r"--shard .*not a share"):
        resolve("eval", {"shard": share, "out": "x"})
