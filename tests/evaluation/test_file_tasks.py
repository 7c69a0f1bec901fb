"""Benchmarks from files: what is read, asked and refused."""

from __future__ import annotations

import csv
import json
import sys
import zipfile
from pathlib import Path

import benchmark_files as files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longlora_cli.config import EvalConfig
from longlora_cli.errors import DataError, SettingsError
from longlora_cli.evaluation.file_plan import CutCounts, plan_files
from longlora_cli.evaluation.file_scores import score_benchmark
from longlora_cli.evaluation.generation import Answer
from longlora_cli.evaluation.journal import Journal
from longlora_cli.evaluation.measure_files import measure_file_task
from longlora_cli.evaluation.scorers import words
from longlora_cli.evaluation.tasks.files.opening import open_tasks
from longlora_cli.evaluation.tasks.files.registry import FAMILIES
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.task_names import FILES

READABLE = 100_000


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return load_tokenizer(tiny_model_folder)


@pytest.fixture(scope="module")
def plain_tokenizer(tiny_model_folder):
    tokenizer = load_tokenizer(tiny_model_folder)
    tokenizer.chat_template = None
    return tokenizer


def plan_of(name, path, tokenizer, readable=READABLE, **settings):
    config = EvalConfig(out="o", tasks=[name], data=[path], **settings)
    return plan_files(config, tokenizer, readable)


def questions_of(plan, name):
    task = next(task for task in plan.tasks if task.name == name)
    return list(plan.questions(task, CutCounts()))


def prompt_text(plan, name, number=0):
    return plan.tokenizer.decode(questions_of(plan, name)[number].prompt)


class Knows:
    """Answers right, or never."""

    def __init__(self, plan, *, right):
        self._plan, self._right = plan, right
        self._questions = {
            tuple(question.prompt): question
            for task in plan.tasks
            for question in plan.questions(task, CutCounts())
        }
        for question in list(self._questions.values()):
            if question.follow_up is not None:
                self._questions[tuple(question.follow_up.ids_of(self._said(question)))] = question

    def _said(self, question):
        return files.right_answer(question) if self._right else ""

    def answer(self, ids, max_new_tokens, stop=()):
        question = self._questions[tuple(ids)]
        return Answer([1], self._said(question), "eos")

    def log_likelihoods(self, ids, continuations):
        right = [place for place in range(len(continuations)) if place == 1]
        return [-1.0 if (place in right) == self._right else -9.0 for place in range(len(continuations))]


def measured(plan, model):
    found = {}
    for task in plan.tasks:
        found[task.task] = measure_file_task(task, model, plan, Journal(), "identity")
    family = plan.tasks[0].family
    return found, score_benchmark(family, {task: result.summary for task, result in found.items()})


def test_every_family_is_known_by_name_and_has_a_maker():
    assert list(FAMILIES) == list(FILES) == list(files.MAKERS)


@pytest.mark.parametrize("name", FILES)
def test_who_knows_the_answers_gets_one_and_who_says_nothing_gets_nothing(name, tokenizer, tmp_path):
    plan = plan_of(name, files.MAKERS[name](tmp_path / "data"), tokenizer)
    for right in (True, False):
        found, whole = measured(plan, Knows(plan, right=right))
        scores = {task: result.summary["score"] for task, result in found.items()}
        # ROUGE by PyPI's `rouge` gives 0.999999995 to equal texts.
        assert scores == pytest.approx(dict.fromkeys(scores, float(right)), abs=1e-8)
        assert whole["score"] == pytest.approx(float(right), abs=1e-8)


@pytest.mark.parametrize("name", FILES)
def test_a_model_without_chat_template_can_be_asked_too(name, plain_tokenizer, tmp_path):
    plan = plan_of(name, files.MAKERS[name](tmp_path / "data"), plain_tokenizer)
    _, whole = measured(plan, Knows(plan, right=True))
    assert whole["score"] == pytest.approx(1.0, abs=1e-8)


def test_longbench_prompts_are_the_published_ones_with_their_quirks(tokenizer, plain_tokenizer, tmp_path):
    folder = files.make_longbench(tmp_path)
    plan = plan_of("longbench", folder, plain_tokenizer)
    assert "Answer the question asconcisely as you can" in prompt_text(plan, "longbench.narrativeqa")
    row = files.LONGBENCH["hotpotqa"]
    rule = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    expected = (
        f"{rule}\n\nThe following are given passages.\n{row['context']}\n\n{rule}\n\n"
        f"Question: {row['input']}\nAnswer:"
    )
    assert prompt_text(plan, "longbench.hotpotqa").endswith(expected)
    code = f"Please complete the code given below. \n{files.LONGBENCH['lcc']['context']}Next line of code:\n"
    for either in (plan, plan_of("longbench", folder, tokenizer)):
        assert prompt_text(either, "longbench.lcc").endswith(code)  # no template around it


def test_few_shot_and_code_of_longbench_get_no_chat_template_and_the_others_do(tokenizer, tmp_path):
    plan = plan_of("longbench", files.make_longbench(tmp_path), tokenizer)
    with_template = {task.task for task in plan.tasks for sample in task.samples() if sample.as_chat}
    assert {task.task for task in plan.tasks} - with_template == {
        "trec",
        "triviaqa",
        "samsum",
        "lcc",
        "repobench-p",
    }


def test_samsum_ends_at_a_line_break_and_answers_have_their_published_length(tokenizer, tmp_path):
    plan = plan_of("longbench", files.make_longbench(tmp_path), tokenizer)
    samples = {task.task: next(task.samples()) for task in plan.tasks}
    assert samples["samsum"].stop == ("\n",)
    assert samples["hotpotqa"].stop == ()
    longest = {task: sample.max_new_tokens for task, sample in samples.items()}
    assert longest == {
        "narrativeqa": 128,
        "hotpotqa": 32,
        "multifieldqa_zh": 64,
        "gov_report": 512,
        "trec": 64,
        "triviaqa": 32,
        "samsum": 128,
        "passage_count": 32,
        "passage_retrieval_en": 32,
        "lcc": 64,
        "repobench-p": 64,
    }


def test_prompts_of_a_file_go_before_the_published_ones_and_results_say_so(tokenizer, tmp_path):
    folder = files.make_longbench(tmp_path / "data")
    own = tmp_path / "mine.json"
    own.write_text(json.dumps({"hotpotqa": "Read {context} and say: {input}"}))
    plan = plan_of("longbench", folder, tokenizer, prompts=own)
    assert f"and say: {files.LONGBENCH['hotpotqa']['input']}" in prompt_text(plan, "longbench.hotpotqa")
    found, _ = measured(plan, Knows(plan, right=True))
    assert found["hotpotqa"].summary["prompts"] == {"--prompts": 2}
    assert found["trec"].summary["prompts"] == {"published": 2}
    (folder / "config").mkdir()
    (folder / "config" / "dataset2prompt.json").write_text(json.dumps({"hotpotqa": "Found: {input}"}))
    assert "Found: What" in prompt_text(plan_of("longbench", folder, tokenizer), "longbench.hotpotqa")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not an object of prompts"),
        ('{"hotpotqa": 3}', "not a text"),
        ('{"hotpotqa": "{context"}', "no template"),
        ('{"hotpotqa": "{context.__class__}"}', "not the name of a field"),
        ('{"other": "{context}"}', "no prompt of longbench.hotpotqa"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_refused(content, message, tokenizer, tmp_path):
    folder = files.make_longbench(tmp_path / "data")
    own = tmp_path / "mine.json"
    own.write_text(content)
    with pytest.raises(DataError, match=message):
        plan_of("longbench.hotpotqa", folder, tokenizer, prompts=own)


NEEDED = {
    "longbench": ("hotpotqa.jsonl", ["context", "input", "answers", "length"]),
    "longbench_e": ("trec_e.jsonl", ["context", "input", "answers", "length", "all_classes"]),
    "longbench_v2": (
        "data.json",
        ["context", "question", "choice_B", "answer", "difficulty", "length", "domain"],
    ),
    "infinitebench": ("code_debug.jsonl", ["context", "input", "answer", "options"]),
    "ruler_files": ("256/qa_1/validation.jsonl", ["input", "outputs"]),
    "babilong": ("0k/qa1.json", ["input", "question", "target"]),
    "longmemeval": (
        "longmemeval_s.json",
        ["question_id", "question_type", "question", "answer", "question_date", "haystack_dates"],
    ),
    "graphwalks": ("walks.jsonl", ["prompt", "answer_nodes"]),
    "mrcr_files": ("2needle.jsonl", ["prompt", "answer", "random_string_to_prepend"]),
    "qmsum": ("meetings.jsonl", ["context", "questions"]),
    "longchat": ("5_topics.jsonl", ["prompt", "topics"]),
    "multiple_choice": ("test.jsonl", ["question", "choices", "answer"]),
}


@pytest.mark.parametrize(
    ("name", "file", "field"), [(name, file, f) for name, (file, fields) in NEEDED.items() for f in fields]
)
def test_a_missing_field_is_refused_by_its_name_and_line(name, file, field, tokenizer, tmp_path):
    folder = files.MAKERS[name](tmp_path)
    path = folder / file
    text = path.read_text()
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    del rows[0][field]
    path.write_text(
        json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    )
    with pytest.raises(DataError, match=rf"{path.name}:1: {field} is missing") as refused:
        plan_of(name, path, tokenizer)
    assert name in refused.value.hint


@pytest.mark.parametrize(
    ("name", "file", "field", "value", "message"),
    [
        ("longbench", "hotpotqa.jsonl", "answers", [], "answers is an empty list"),
        ("longbench", "hotpotqa.jsonl", "context", 3, "context is 3, where a text is needed"),
        ("longbench", "hotpotqa.jsonl", "context", "  ", "context is empty"),
        ("longbench", "hotpotqa.jsonl", "length", "long", "length is 'long', where a number"),
        ("infinitebench", "code_debug.jsonl", "answer", ["get_q"], "none of the options"),
        ("infinitebench", "code_debug.jsonl", "options", ["a"], "options are 1, where four"),
        ("infinitebench", "code_run.jsonl", "input", "What is it?", "no a call|holds no"),
        ("graphwalks", "walks.jsonl", "answer_nodes", [{}], "answer_nodes holds"),
        ("mrcr_files", "2needle.jsonl", "prompt", "[", "no JSON text of a chat"),
        ("mrcr_files", "2needle.jsonl", "answer", "y", "does not begin with"),
        ("multiple_choice", "test.jsonl", "answer", 4, "none of the 4 choices"),
        ("multiple_choice", "test.jsonl", "choices", ["one"], "choices are 1"),
        ("longchat", "200_lines.jsonl", "expected_number", None, "expected_number is null"),
        ("ruler_files", "512/lines/validation.jsonl", "scorer", "nope", "scorer nope is unknown"),
    ],
)
def test_a_wrong_value_is_refused_with_its_line(name, file, field, value, message, tokenizer, tmp_path):
    path = files.MAKERS[name](tmp_path) / file
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows.append(rows[0] | {field: value})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=rf"{path.name}:{len(rows)}: .*({message})"):
        plan_of(name, path, tokenizer)


@pytest.mark.parametrize(
    ("name", "file", "field", "value", "message"),
    [
        ("longbench", "passage_retrieval_en.jsonl", "answers", ["Page 3"], "does not name a paragraph"),
        ("infinitebench", "math_find.jsonl", "answer", ["many"], "is not a number"),
        ("longchat", "200_lines.jsonl", "expected_number", "some", "is no whole number"),
    ],
)
def test_a_reference_that_no_answer_could_be_judged_by_is_told_before_any_is_given(
    name, file, field, value, message, tokenizer, tmp_path
):
    path = files.MAKERS[name](tmp_path) / file
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    files.write_lines(path, [*rows, rows[0] | {field: value}])
    with pytest.raises(DataError, match=rf"{path.name}:{len(rows) + 1} .*{message}"):
        plan_of(name, path, tokenizer)


def test_a_scorers_missing_package_is_told_before_anything_is_asked(tokenizer, tmp_path, monkeypatch):
    path = files.write_lines(tmp_path / "multifieldqa_zh.jsonl", [files.LONGBENCH["multifieldqa_zh"]])
    monkeypatch.setitem(sys.modules, "jieba", None)
    monkeypatch.setattr(words, "_segmenter", words._segmenter.__wrapped__)  # it may be held from another test
    with pytest.raises(SettingsError, match="needs the package jieba") as refused:
        plan_of("longbench", path, tokenizer)
    assert "pip install" in refused.value.hint


def test_folders_and_files_without_a_benchmark_are_refused(tokenizer, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"empty: no file of longbench is there") as refused:
        plan_of("longbench", empty, tokenizer)
    assert "hotpotqa.jsonl" in refused.value.rule
    with pytest.raises(DataError, match="no such file or folder"):
        plan_of("longbench", tmp_path / "nowhere", tokenizer)
    text = tmp_path / "x.txt"
    text.write_text("x")
    with pytest.raises(DataError, match="not a kind of file that holds rows"):
        plan_of("longbench", text, tokenizer)
    longbench = files.make_longbench(tmp_path / "lb")
    with pytest.raises(DataError, match="no file of infinitebench is there"):
        plan_of("infinitebench", longbench, tokenizer)
    with pytest.raises(SettingsError, match=r"unknown task; did you mean hotpotqa\?"):
        plan_of("longbench.hotpotq", longbench, tokenizer)
    with pytest.raises(DataError, match=r"no file of longbench.musique"):
        plan_of("longbench.musique", longbench, tokenizer)
    (longbench / "hotpotqa.jsonl").write_text("")
    with pytest.raises(DataError, match="the file holds no rows"):
        plan_of("longbench.hotpotqa", longbench, tokenizer)


def test_a_path_that_nothing_reads_and_two_files_of_one_task_are_refused(tokenizer, tmp_path):
    first, second = files.make_longbench(tmp_path / "a"), files.make_babilong(tmp_path / "b")
    with pytest.raises(DataError, match=r"b: no task of --tasks longbench has a file there"):
        open_tasks(["longbench"], [first, second], as_chat=True)
    with pytest.raises(DataError, match=r"two files of longbench.hotpotqa"):
        open_tasks(["longbench.hotpotqa"], [first, files.make_longbench(tmp_path / "c")], as_chat=True)
    assert {t.family.name for t in open_tasks(["longbench", "babilong"], [first, second], as_chat=True)} == {
        "longbench",
        "babilong",
    }


def test_a_file_with_another_name_is_known_by_its_fields(tokenizer, tmp_path):
    path = files.write_lines(tmp_path / "mine.jsonl", [files.LONGBENCH["hotpotqa"]])
    assert [task.name for task in plan_of("longbench", path, tokenizer).tasks] == ["longbench.hotpotqa"]
    path.write_text(json.dumps({"input": "x"}) + "\n")
    with pytest.raises(DataError, match=r"mine.jsonl: its name is no task of longbench"):
        plan_of("longbench", path, tokenizer)


def test_archives_parquet_csv_and_compressed_files_give_the_same_questions(tokenizer, tmp_path):
    folder = files.make_longbench(tmp_path / "data")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"data/{path.name}")
        archive.writestr("__MACOSX/data/._hotpotqa.jsonl", "junk")

    def prompts(name, path):
        plan = plan_of(name, path, tokenizer)
        return {task.name: [q.prompt for q in questions_of(plan, task.name)] for task in plan.tasks}

    assert prompts("longbench", tmp_path / "data.zip") == prompts("longbench", folder)
    rows = json.loads((files.make_babilong(tmp_path / "babi") / "0k" / "qa1.json").read_text())
    expected = prompts("babilong", tmp_path / "babi" / "0k" / "qa1.json")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "qa1_0k.parquet")
    assert prompts("babilong", tmp_path / "qa1_0k.parquet") == expected
    rows[0]["input"] = rows[0]["input"] + "x" * 200_000  # longer than Python's csv reads by itself
    with (tmp_path / "qa1_64k.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert len(prompts("babilong", tmp_path / "qa1_64k.csv")["babilong.qa1"][0]) > 10_000


def test_a_damaged_archive_and_a_line_that_is_no_json_are_refused(tokenizer, tmp_path):
    broken = tmp_path / "data.zip"
    broken.write_bytes(b"PK\x03\x04 nothing more")
    with pytest.raises(DataError, match="cannot be read as a zip archive"):
        plan_of("longbench", broken, tokenizer)
    path = files.write_lines(tmp_path / "hotpotqa.jsonl", [files.LONGBENCH["hotpotqa"]])
    path.write_text(path.read_text() + "{oops\n")
    with pytest.raises(DataError, match=r"hotpotqa.jsonl:2: .*not JSON"):
        plan_of("longbench", path, tokenizer)


def test_v2_texts_that_look_like_marks_stay_as_they_are(plain_tokenizer, tmp_path):
    plan = plan_of("longbench_v2", files.make_longbench_v2(tmp_path), plain_tokenizer)
    text = prompt_text(plan, "longbench_v2.all")
    assert "question: What costs $Q$?" in text
    assert "(B) wine, $C_A$\n(C) oil" in text
    assert "$C_D$\n</text>" in text


def test_infinitebench_asks_base_models_with_an_unfinished_sentence(tokenizer, plain_tokenizer, tmp_path):
    folder = files.make_infinitebench(tmp_path)
    assert prompt_text(plan_of("infinitebench", folder, plain_tokenizer), "infinitebench.passkey").endswith(
        "What is the pass key?\n\nThe pass key is"
    )
    chat = plan_of("infinitebench", folder, tokenizer)
    assert "The pass key is" not in prompt_text(chat, "infinitebench.passkey")
    assert "The value" in prompt_text(chat, "infinitebench.kv_retrieval")
    assert "value of func_1(-3)." in prompt_text(chat, "infinitebench.code_run")
    assert "What is the largest number in the following list?" in prompt_text(chat, "infinitebench.math_find")


def test_ruler_files_open_the_assistants_turn_with_their_prefix(tokenizer, plain_tokenizer, tmp_path):
    folder = files.make_ruler(tmp_path)
    for each in (tokenizer, plain_tokenizer):
        text = prompt_text(plan_of("ruler_files", folder, each), "ruler_files.niah_multivalue")
        assert text.endswith("The special magic numbers are")


def test_longmemeval_tells_the_sessions_by_date(plain_tokenizer, tmp_path):
    text = prompt_text(
        plan_of("longmemeval", files.make_longmemeval(tmp_path), plain_tokenizer), "longmemeval.s"
    )
    assert text.index("### Session 1:\nSession Date: 2023/05/10") < text.index("### Session 2:")
    assert "\n\nuser: I have 2 cats." in text
    assert text.endswith("Current Date: 2023/05/30\nQuestion: How many cats have I?\nAnswer:")


def test_mrcr_is_asked_as_a_chat_of_its_turns(tokenizer, tmp_path):
    plan = plan_of("mrcr_files", files.make_mrcr(tmp_path), tokenizer)
    sample = next(plan.tasks[0].samples())
    assert [message["role"] for message in sample.messages] == ["user", "assistant", "user"]


def test_qmsum_asks_the_questions_of_one_split_only(tokenizer, tmp_path):
    folder = files.make_qmsum(tmp_path)
    assert plan_of("qmsum", folder, tokenizer).counts == {"qmsum.all": 4}
    assert plan_of("qmsum", folder, tokenizer, split="train").counts == {"qmsum.all": 2}
    with pytest.raises(DataError, match=r"nothing to ask for qmsum.all") as refused:
        plan_of("qmsum", folder, tokenizer, split="val")
    assert "--split" in refused.value.hint


def test_at_most_max_samples_of_each_task_are_asked(tokenizer, tmp_path):
    plan = plan_of("longbench", files.make_longbench(tmp_path), tokenizer, max_samples=1)
    assert set(plan.counts.values()) == {1}


def test_the_prompts_that_are_shipped_name_their_source_and_licence():
    folder = Path(files.__file__).parent.parent / "longlora_cli/evaluation/tasks/files/prompts"
    notice = (folder / "NOTICE.txt").read_text()
    assert "Permission is hereby granted" in notice
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["source"]
        assert content["license"].split(",")[0] in ("MIT", "Apache-2.0")
