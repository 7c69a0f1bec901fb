"""`longlora eval` with its audits, `--control` and `--train-data`, from settings to folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import benchmark_files as files
import pytest

from longlora_cli.commands import eval as command
from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.errors import DataError, Interrupted, SettingsError
from longlora_cli.evaluation.answerer import SessionAnswerer
from longlora_cli.evaluation.generation import Answer
from longlora_cli.options import resolve

TASKS = ["ppl", "passkey", "needle", "generate", "lines", "mrcr"]


@pytest.fixture(scope="module")
def settings(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "a.txt").write_text("The old river was slow. They walked over the bridge. " * 60)
    asked = [{"input": "What is blue?", "answers": ["mill"]}, {"input": "What is it?", "answers": ["blue"]}]
    rows = [
        {"input": "say one", "outputs": ["one"]},
        {"context": "The mill is blue.", "questions": asked},
        {"context": "The mill is blue. The mill is old.", "input": "What is it?", "answers": ["a mill"]},
    ]
    files.write_lines(folder / "rows.jsonl", rows)
    return {
        "model": str(tiny_model_folder), "dtype": "fp32", "device": "cpu", "tasks": TASKS,
        "haystack": [folder / "a.txt"], "data": [folder / "a.txt", folder / "rows.jsonl"],
        "lengths": [600], "depths": 2, "samples": 2, "max_new_tokens": 4, "needle_facts": 3, "window": 64,
        "max_tokens": 200, "control": "no-context",
    }  # fmt: skip


def run(settings: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    return command.run(
        EvalConfig(beyond=True, **{**settings, **more}, out=out), Console(json_mode=True), dry_run=False
    )


def samples(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples" / f"{task}.jsonl").read_text().splitlines()]


def without_costs(value: Any) -> Any:
    if isinstance(value, dict):
        dropped = {"seconds", "tokens_per_second", "reused_tokens"}
        return {key: without_costs(part) for key, part in value.items() if key not in dropped}
    return [without_costs(part) for part in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, run(settings, out)


def test_each_task_has_its_control_beside_its_score(whole):
    out, found = whole
    for task in ("passkey", "needle", "lines", "mrcr"):
        control = found["tasks"][task]["control"]
        assert (control["n"], control["left_out"]) == (4, 0)
        assert {"score", "ci95"} <= set(control)
        assert all({"prediction", "finish", "scores"} == set(row["control"]) for row in samples(out, task))
    assert found["tasks"]["generate"]["control"]["n"] == 3
    assert found["tasks"]["generate"]["control"]["left_out"] == 1


def test_what_has_no_control_is_named(whole):
    assert whole[1]["control"] == {
        "name": "no-context",
        "left_out": {
            "ppl": "it asks nothing",
            "generate": "1 of 4 questions: what is context is not told apart",
        },
    }


def test_the_report_shows_audits_and_scores_without_context(whole):
    page = (whole[0] / "report.html").read_text()
    assert page.count("without context") >= 4
    for name in ("BOS tokens", "Positions (RoPE)", "Numbers that linear layers hold", "Attention"):
        assert name in page


def test_every_audit_is_there_and_says_whether_it_is_ok(whole):
    audits = {one["name"]: one["ok"] for one in whole[1]["audits"]}
    assert audits == {
        "BOS tokens that a prompt begins with": True,
        "Share of answers that ended by EOS, stop string, limit": False,
        "Prompts cut or left out for their length": True,
        "Samples that an earlier one of their task equals": True,
        "Positions (RoPE)": False,
        "Chat template": None,
        "Numbers that linear layers hold": True,
        "Adapter": None,
        "Attention": None,
        "What was read is kept as": None,
    }


def test_scores_are_the_same_with_and_without_a_control(settings, whole, tmp_path):
    plain = run(settings, tmp_path / "out", control="none")
    for task, summary in plain["tasks"].items():
        controlled = {key: part for key, part in whole[1]["tasks"][task].items() if key != "control"}
        assert without_costs(summary) == without_costs(controlled)
    assert plain["control"] == {}


def test_three_shares_put_together_have_the_same_controls_and_audits_and_ask_nothing_again(
    settings, whole, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    for number in (2, 3, 1):
        run(settings, out, shard=f"{number}/3")
    for name in ("answer", "answer_together"):
        monkeypatch.setattr(SessionAnswerer, name, lambda *_: pytest.fail("asked again"))
    found = run(settings, out)
    for part in ("tasks", "audits", "control"):
        assert without_costs(found[part]) == without_costs(whole[1][part])


def test_a_run_that_was_stopped_among_its_controls_goes_on_there(settings, whole, tmp_path, monkeypatch):
    out, asked, answer = tmp_path / "out", [], SessionAnswerer.answer
    only = {**settings, "tasks": ["passkey"], "data": [], "batch_size": 1}
    for name in ("needle_facts", "window", "max_tokens", "data"):
        del only[name]

    def stopping(self, ids, max_new_tokens, stop):
        asked.append(len(ids))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return answer(self, ids, max_new_tokens, stop)

    monkeypatch.setattr(SessionAnswerer, "answer", stopping)
    with pytest.raises(Interrupted):
        run(only, out)
    assert asked[3] > 4 * asked[4]  # four whole questions, then the bare ones
    found = run(only, out)
    # Two samples may have drawn other keys, so each bare question is its own.
    assert len(asked) == 4 + 4 + 1
    assert without_costs(found["tasks"]["passkey"]) == without_costs(whole[1]["tasks"]["passkey"])


def test_choices_are_weighed_again_without_their_text(tiny_model_folder, tmp_path):
    rows = [
        {"question": "Which colour?", "choices": ["blue", "red"], "answer": 0, "context": files.LONG},
        {"question": "Which number?", "choices": ["one", "two"], "answer": 0},
    ]
    path = files.write_lines(tmp_path / "choices.jsonl", rows)
    values = {"model": str(tiny_model_folder), "dtype": "fp32", "device": "cpu", "control": "no-context"}
    values |= {"tasks": ["multiple_choice_cloze"], "data": [path], "out": tmp_path / "out"}
    found = command.run(EvalConfig(beyond=True, **values), Console(json_mode=True), dry_run=False)
    control = found["tasks"]["multiple_choice_cloze.all"]["control"]
    assert (control["n"], control["left_out"]) == (1, 1)
    first, second = samples(tmp_path / "out", "multiple_choice_cloze.all")
    assert first["control"]["prediction"] in ("A", "B")
    assert "control" not in second


def test_training_data_that_hold_the_text_are_an_audit_that_is_not_ok(settings, tmp_path):
    found = run(settings, tmp_path / "out", control="none", train_data=[settings["haystack"][0]])
    told = {one["name"]: one for one in found["audits"]}["Share of what is asked that training data hold"]
    assert told["ok"] is False
    assert told["value"]["ppl"] == 1.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tasks": ["ppl"]}, "control has no effect here"),
        ({"tasks": ["lines"], "make": True}, "control has no effect here"),
    ],
)
def test_a_control_of_what_asks_no_model_anything_is_refused(changes, reason):
    with pytest.raises(SettingsError, match=reason):
        resolve("eval", {"out": "o", "control": "no-context", **changes})


def test_missing_training_data_are_refused_before_a_model_is_loaded(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(DataError, match="no such file"):
        run(settings, tmp_path / "out", train_data=[tmp_path / "nowhere"])


def test_groups_and_benchmarks_have_the_mean_of_their_controls(
    tiny_model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(SessionAnswerer, "answer", lambda self, ids, limit, stop: Answer([5], "Paris", "eos"))
    values = {"model": str(tiny_model_folder), "dtype": "fp32", "device": "cpu", "control": "no-context"}
    values |= {
        "tasks": ["niah", "longbench"],
        "data": [files.make_longbench(tmp_path / "d")],
        "batch_size": 1,
    }
    values |= {"lengths": [1400], "depths": 1, "samples": 1, "out": tmp_path / "out", "max_prompt": 400}
    found = command.run(EvalConfig(beyond=True, **values), Console(), dry_run=False)
    niah, longbench = found["groups"]["niah"], found["benchmarks"]["longbench"]
    assert niah["control"]["n"] + niah["control"]["left_out"] == 8
    controls = [found["tasks"][f"longbench.{task}"]["control"] for task in longbench["tasks"]]
    assert longbench["control"]["score"] == pytest.approx(sum(c["score"] for c in controls) / len(controls))
    assert longbench["control"]["score"] > 0
    assert longbench["control"]["n"] == sum(c["n"] for c in controls)
    assert "longbench (mean)" in " ".join("".join(capsys.readouterr()).split())
    assert next(iter(found["tasks"])).startswith("niah"), (
        "in the order asked for, though files are read first"
    )
