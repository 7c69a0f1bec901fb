"""`longlora eval` with benchmarks from files, from the command line to the folder."""

from __future__ import annotations

import json

import benchmark_files as files
import pytest

from longlora_cli.cli import main
from longlora_cli.commands import eval as command
from longlora_cli.commands import eval_compare, eval_make
from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.errors import Interrupted
from longlora_cli.evaluation.file_plan import CutCounts
from longlora_cli.evaluation.generation import Answer
from longlora_cli.evaluation.plan import make_plan
from longlora_cli.evaluation.rescoring import rescore
from longlora_cli.evaluation.scorers import find_scorer
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.storage import verify_folder


def config(model, out, tasks, data, **changes):
    values = {"model": str(model), "out": out, "tasks": tasks, "data": data, "device": "cpu", "dtype": "fp32"}
    return EvalConfig(beyond=True, **{**values, "max_new_tokens": 8, **changes})


def run(settings, *, dry_run=False):
    return command.run(settings, Console(json_mode=True), dry_run=dry_run)


def without_times(value):
    if isinstance(value, dict):
        dropped = {"seconds", "tokens_per_second", "peak_bytes", "reused_tokens", "out", "settings"}
        return {k: without_times(v) for k, v in value.items() if k not in dropped}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.fixture
def data(tmp_path):
    return files.make_longbench(tmp_path / "longbench"), files.make_choices(tmp_path / "choices")


def test_benchmarks_end_in_one_folder_with_scores_of_tasks_and_of_each_benchmark(
    tiny_model_folder, data, tmp_path
):
    out = tmp_path / "result"
    found = run(config(tiny_model_folder, out, ["longbench", "multiple_choice"], list(data)))
    verify_folder(out, "evaluation")
    stored = json.loads((out / "results.json").read_text())
    assert stored == {key: value for key, value in found.items() if key != "out"}
    assert set(stored["benchmarks"]) == {"longbench", "multiple_choice"}
    whole = stored["benchmarks"]["longbench"]
    assert len(whole["tasks"]) == 11
    assert whole["n"] == 22
    assert set(whole["categories"]) == {
        *("single-document QA", "multi-document QA", "summarization", "few-shot", "synthetic", "code"),
    }
    for task in whole["tasks"]:
        summary = stored["tasks"][f"longbench.{task}"]
        lines = (out / "samples" / f"longbench.{task}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["row"] for row in rows] == [f"{task}.jsonl:1", f"{task}.jsonl:2"]
        assert summary["score"] == sum(row["scores"]["score"] for row in rows) / 2
        assert sum(row["n_truncated"] for row in rows) == summary["lost_tokens"]
    choices = stored["tasks"]["multiple_choice.all"]
    assert (choices["n"], choices["scorer"]) == (3, "multiple_choice@1")
    assert set(choices["parts"]["subject"]) == {"food", "other"}


def test_the_second_question_about_a_text_does_not_read_it_again(tiny_model_folder, tmp_path):
    context = files.LONG * 3
    rows = [files.LONGBENCH["hotpotqa"] | {"context": context, "input": f"Number {n}?"} for n in range(2)]
    path = files.write_lines(tmp_path / "hotpotqa.jsonl", rows)
    run(config(tiny_model_folder, tmp_path / "out", ["longbench"], [path], max_prompt=2000))
    lines = (tmp_path / "out/samples/longbench.hotpotqa.jsonl").read_text().splitlines()
    reused = [json.loads(line)["reused_tokens"] for line in lines]
    assert reused[0] == 0
    assert reused[1] > len(context) // 6


def test_an_interrupted_benchmark_goes_on_and_gives_the_same(tiny_model_folder, data, tmp_path, monkeypatch):
    tasks = ["longbench.hotpotqa", "longbench.trec", "longbench.triviaqa"]
    whole = run(config(tiny_model_folder, tmp_path / "whole", tasks, [data[0]]))
    asked = []
    answer = command.SessionAnswerer.answer

    def dies(self, ids, limit, stop):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(ids)
        return answer(self, ids, limit, stop)

    monkeypatch.setattr(command.SessionAnswerer, "answer", dies)
    with pytest.raises(Interrupted):
        run(config(tiny_model_folder, tmp_path / "killed", tasks, [data[0]], batch_size=1))

    def counts(self, ids, limit, stop):
        asked.append(ids)
        return answer(self, ids, limit, stop)

    monkeypatch.setattr(command.SessionAnswerer, "answer", counts)
    resumed = run(config(tiny_model_folder, tmp_path / "killed", tasks, [data[0]], batch_size=1))
    assert without_times(resumed) == without_times(whole)
    assert len(asked) == 6


def test_shares_of_benchmarks_put_together_are_the_whole(tiny_model_folder, data, tmp_path, monkeypatch):
    tasks = ["longbench.hotpotqa", "longbench.trec", "multiple_choice"]
    whole = run(config(tiny_model_folder, tmp_path / "whole", tasks, list(data)))
    for number in (1, 2, 3):
        run(config(tiny_model_folder, tmp_path / "shares", tasks, list(data), shard=f"{number}/3"))
    for name in ("answer", "log_likelihoods"):
        monkeypatch.setattr(command.SessionAnswerer, name, lambda *a: pytest.fail("asked again"))
    assert without_times(
        run(config(tiny_model_folder, tmp_path / "shares", tasks, list(data)))
    ) == without_times(whole)


def test_a_dry_run_counts_what_would_be_asked_and_loads_no_model(
    tiny_model_folder, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    found = run(config(tiny_model_folder, tmp_path / "out", ["longbench.trec"], [data[0]]), dry_run=True)
    counts = found["tasks"]["longbench.trec"]
    assert counts["samples"] == 2
    assert 0 < counts["longest"] <= counts["tokens"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "longbench"], "--tasks longbench needs --data FOLDER"),
        (["--tasks", "longbench", "--data", "EMPTY"], "no file of longbench is there"),
        (["--tasks", "longbench", "--data", "NOWHERE"], "no such file or folder"),
        (["--tasks", "longbench.nope", "--data", "DATA"], "unknown task"),
        (["--tasks", "longbanch", "--data", "DATA"], "did you mean longbench"),
        (["--tasks", "babilong", "--data", "DATA"], "no file of babilong is there"),
        (["--tasks", "longbench,ppl", "--data", "DATA"], "read --data in different ways"),
        (["--tasks", "longbench", "--data", "BROKEN"], "hotpotqa.jsonl:2: answers is missing"),
        (["--tasks", "longbench", "--data", "DATA", "--truncate", "error", "--max-prompt", "16"], "are read"),
        (["--tasks", "longbench", "--data", "DATA", "--rope", "yarn"], "say it with --max-prompt"),
        (["--tasks", "ppl", "--truncate", "skip"], "--truncate has no effect here"),
        (["--tasks", "ppl", "--max-prompt", "4k"], "--max-prompt has no effect here"),
        (["--tasks", "ppl", "--prompts", "x.json"], "--prompts has no effect here"),
        (["--tasks", "longbench", "--data", "DATA", "--lengths", "4k"], "--lengths has no effect here"),
        (["--tasks", "longbench", "--data", "DATA", "--make"], "--make writes samples of synthetic tasks"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_before_a_model_is_loaded(
    tiny_model_folder, data, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    (tmp_path / "EMPTY").mkdir()
    rows = [
        files.LONGBENCH["hotpotqa"],
        {k: v for k, v in files.LONGBENCH["hotpotqa"].items() if k != "answers"},
    ]
    files.write_lines(tmp_path / "BROKEN" / "hotpotqa.jsonl", rows)
    data[0].rename(tmp_path / "DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["eval", "--model", str(tiny_model_folder), "--out", "out", *arguments])
    assert left.value.code == 2
    told = " ".join(capsys.readouterr().err.split())
    assert message in told
    assert not (tmp_path / "out").exists()


def test_samples_that_were_written_are_read_back_as_the_same_questions(tiny_model_folder, tmp_path):
    made = EvalConfig(
        model=str(tiny_model_folder), out=tmp_path / "made", make=True, tasks=["niah_single_1", "lines"],
        lengths=[1200], depths=2, samples=1,
    )  # fmt: skip
    eval_make.run(made, Console(json_mode=True), dry_run=False)
    tokenizer = load_tokenizer(tiny_model_folder)
    original = make_plan(made, tokenizer)
    plan = make_plan(
        config(tiny_model_folder, tmp_path / "o", ["ruler_files"], [made.out], max_prompt=2000), tokenizer
    )
    assert plan.files is not None
    for task in plan.files.tasks:
        asked = list(plan.files.questions(task, CutCounts()))
        meant = list(original.sample_questions(task.task))
        assert [list(question.prompt) for question in asked] == [list(question.prompt) for question in meant]
        assert [question.references for question in asked] == [question.references for question in meant]
        assert [question.scorer for question in asked] == [question.scorer for question in meant]
        assert [q.facts["length"] for q in asked] == [1200, 1200]


@pytest.mark.parametrize("task", list(files.LONGBENCH))
def test_the_rows_of_a_benchmark_can_be_scored_again(tiny_model_folder, data, tmp_path, monkeypatch, task):
    said = f"{files.LONGBENCH[task]['answers'][0]} 2, or so"
    monkeypatch.setattr(
        command.SessionAnswerer, "answer", lambda self, ids, limit, stop: Answer([5], said, "eos")
    )
    found = run(config(tiny_model_folder, tmp_path / "out", [f"longbench.{task}"], [data[0]], batch_size=1))
    path = tmp_path / "out" / "samples" / f"longbench.{task}.jsonl"
    again = rescore(path, find_scorer("longbench@2e00731"))
    assert again["mean"] > 0
    assert again["mean"] == pytest.approx(found["tasks"][f"longbench.{task}"]["score"], abs=1e-12)


def test_two_evaluations_of_a_benchmark_are_compared_by_every_rule(tiny_model_folder, tmp_path, monkeypatch):
    folder = files.make_infinitebench(tmp_path / "data")
    for name, said in (("a", "get_x"), ("b", "nothing")):
        monkeypatch.setattr(
            command.SessionAnswerer,
            "answer",
            lambda self, ids, limit, stop, said=said: Answer([5], said, "eos"),
        )
        run(config(tiny_model_folder, tmp_path / name, ["infinitebench.code_debug"], [folder], batch_size=1))
    found = eval_compare.run(
        EvalConfig(out=tmp_path / "a", compare=tmp_path / "b"),
        Console(json_mode=True),
        dry_run=False,
    )
    cells = {cell["score"]: cell for cell in found["comparison"]["cells"]}
    assert cells["score"]["difference"] == 0.0
    assert cells["infinitebench@2024-08"]["difference"] == 1.0


def test_tables_show_every_rule_and_what_was_cut(tiny_model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        command.SessionAnswerer,
        "answer",
        lambda self, ids, limit, stop: Answer([5] * limit, "get_x", "length"),
    )
    folder = files.make_infinitebench(tmp_path / "data")
    settings = config(
        tiny_model_folder, tmp_path / "out", ["infinitebench.code_debug"], [folder], max_prompt=100
    )
    command.run(settings, Console(), dry_run=False)
    told = " ".join("".join(capsys.readouterr()).split())
    assert "@2024-08" in told
    assert "1 of 1 prompts were cut" in told
    assert "answers that ended at their limit: code_debug 100 %" in told
    assert "prompts are published" in told
