"""`longlora eval` with synthetic tasks, and `--make`, from settings to folders."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from longlora_cli.commands import eval as command
from longlora_cli.commands import eval_make
from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.generation import Answer
from longlora_cli.options import resolve
from longlora_cli.storage import verify_folder

FIELDS = {
    "index",
    "input",
    "outputs",
    "length",
    "length_w_model_temp",
    "answer_prefix",
    "token_position_answer",
}


def config(folder, out, **changes):
    values = {
        "model": str(folder),
        "out": out,
        "tasks": ["lines", "count"],
        "lengths": [700, 900],
        "depths": 2,
    }
    changes = {"beyond": True, "batch_size": 1, **changes} if not changes.get("make") else changes
    return EvalConfig(**{**values, "samples": 1, "dtype": "fp32", "device": "cpu", **changes})


def test_tasks_end_in_results_by_length_and_group_with_a_heatmap_where_there_is_a_depth(
    tiny_model_folder, tmp_path, monkeypatch
):
    # What the model says is of no matter here, and 128 tokens for each of 32 needles take a minute.
    monkeypatch.setattr(
        command.SessionAnswerer, "answer", lambda self, ids, limit, stop: Answer([5] * limit, "no", "length")
    )
    results = command.run(
        config(tiny_model_folder, tmp_path / "out", tasks=["lines", "niah"], lengths=[1400, 1600]),
        Console(json_mode=True),
        dry_run=False,
    )
    verify_folder(tmp_path / "out", "evaluation")
    assert results["tasks"] == json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    lines = results["tasks"]["lines"]
    assert [(part["length"], part["n"]) for part in lines["lengths"]] == [(1400, 2), (1600, 2)]
    assert [(cell["length"], cell["depth"]) for cell in lines["cells"]] == [
        (1400, 0.0), (1400, 1.0), (1600, 0.0), (1600, 1.0)
    ]  # fmt: skip
    group = results["groups"]["niah"]
    assert len(group["tasks"]) == 8
    assert group["n"] == 8 * 4
    assert {path.name for path in (tmp_path / "out" / "plots").iterdir()} >= {
        "lines.png",
        "niah_single_1.png",
    }
    assert not (tmp_path / "out" / "plots" / "niah_multivalue.png").exists()
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "samples" / "lines.jsonl").read_text().splitlines()
    ]
    assert {row["scorer"] for row in rows} == {"synthetic.number"}
    assert all(row["prompt_tokens"] + 16 <= row["length"] and row["new_tokens"] == 16 for row in rows)
    assert sum(row["scores"]["score"] for row in rows) / 4 == lines["score"]


def test_a_killed_evaluation_of_tasks_goes_on_and_gives_the_same(tiny_model_folder, tmp_path, monkeypatch):
    whole = command.run(config(tiny_model_folder, tmp_path / "a"), Console(json_mode=True), dry_run=False)
    asked = []
    answer = command.SessionAnswerer.answer

    def interrupted(self, ids, limit, stop):
        asked.append(1)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return answer(self, ids, limit, stop)

    monkeypatch.setattr(command.SessionAnswerer, "answer", interrupted)
    with pytest.raises(Exception, match="interrupted"):
        command.run(config(tiny_model_folder, tmp_path / "b"), Console(json_mode=True), dry_run=False)
    resumed = command.run(config(tiny_model_folder, tmp_path / "b"), Console(json_mode=True), dry_run=False)
    assert len(asked) == 5 + 1 + 3  # five of eight were kept
    for task in ("lines", "count"):
        assert resumed["tasks"][task]["lengths"] == whole["tasks"][task]["lengths"]


def test_samples_are_written_with_rulers_fields_and_no_model_is_loaded(tiny_model_folder, tmp_path):
    out = tmp_path / "samples"
    made = config(tiny_model_folder, out, make=True, tasks=["mrcr", "vt", "niah_multikey_1"], lengths=[1500])
    result = eval_make.run(made, Console(json_mode=True), dry_run=False)
    verify_folder(out, "samples")
    assert result["tasks"]["vt"]["samples"] == 2
    assert result["tasks"]["vt"]["longest"] + 30 <= 1500
    for task in made.tasks:
        rows = [
            json.loads(line) for line in (out / "1500" / task / "validation.jsonl").read_text().splitlines()
        ]
        assert [row["index"] for row in rows] == [0, 1]
        for row in rows:
            assert set(row) >= FIELDS
            assert row["length"] <= row["length_w_model_temp"] <= row["max_length"] == 1500
            assert ("messages" in row) is (task == "mrcr")
            if task == "niah_multikey_1":
                assert row["outputs"][0] in row["input"]
                assert 0 < row["token_position_answer"] < row["length"]
    code = (
        "import sys; sys.argv = ['longlora', 'eval', '--make', '--tasks', 'vt', '--lengths', '1k', '--dry-run', "
        f"'--out', {str(tmp_path / 'x')!r}]\nfrom longlora_cli.cli import main\ntry:\n    main()\n"
        "except SystemExit as left:\n    print(left.code, 'longlora_cli.models.loading' in sys.modules)"
    )
    out_text = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out_text.splitlines()[-1] == "0 False"


def test_a_dry_run_counts_every_sample_and_writes_nothing(tiny_model_folder, tmp_path):
    for run in (command.run, eval_make.run):
        given = config(tiny_model_folder, tmp_path / "out", make=run is eval_make.run)
        counts = run(given, Console(json_mode=True), dry_run=True)["tasks"]
        assert counts["lines"]["samples"] == 4
        assert 0.98 * 900 <= counts["lines"]["longest"] + 16 <= 900
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["rular"]}, "unknown task; did you mean ruler"),
        ({"tasks": ["vt", "ppl"], "make": True}, "--make writes samples of synthetic tasks, not of ppl"),
        ({"tasks": ["vt"], "max_new_tokens": 9}, "--max-new-tokens has no effect"),
        ({"tasks": ["vt"], "needle_facts": 9}, "--needle-facts has no effect"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, changes, message):
    with pytest.raises(SettingsError) as caught:
        resolve("eval", {"out": tmp_path / "out", **changes}, None)
    assert message in f"{caught.value.message} {caught.value.rule} {caught.value.hint}"


def test_a_length_that_holds_no_sample_is_refused_before_a_model_is_loaded(
    tiny_model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    short = config(tiny_model_folder, tmp_path / "out", tasks=["vt"], lengths=[4096, 100])
    with pytest.raises(SettingsError, match="--lengths 100 is too short for vt"):
        command.run(short, Console(json_mode=True), dry_run=False)
