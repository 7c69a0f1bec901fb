"""`longlora eval --rescore`: finished predictions in, scores out; no model, no torch."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longlora_cli.cli import main

KNOWN = Path(__file__).parent.parent / "evaluation" / "known_answers"


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rescore(capsys: pytest.CaptureFixture, path: Path, scorer: str, *more: str) -> tuple[int, Any, str]:
    """Exit code, the JSON object on standard output, standard error."""
    with pytest.raises(SystemExit) as left:
        main(["eval", "--rescore", str(path), "--scorer", scorer, "--json", *more])
    out, err = capsys.readouterr()
    return int(left.value.code or 0), json.loads(out), err


def test_rows_come_out_as_scores_in_order_with_their_mean(tmp_path, capsys) -> None:
    rows = [
        {"prediction": "an apple and a pear", "references": ["Apple, pear"]},
        {"prediction": "the red house", "references": ["blue house", "a red house", "red"]},
        {"prediction": "", "references": "nothing"},
    ]
    code, found, _ = rescore(capsys, write(tmp_path / "p.jsonl", *rows), "longbench.qa_f1")
    assert code == 0
    assert found["scores"] == pytest.approx([0.8, 1.0, 0.0])
    assert found["mean"] == pytest.approx(0.6)
    assert (found["n"], found["scorer"], found["scale"]) == (3, "longbench.qa_f1@2e00731", 1.0)
    low, high = found["ci95"]
    assert 0 <= low <= found["mean"] <= high <= 1


def test_rescoring_starts_in_a_fresh_process_without_torch(tmp_path) -> None:
    path = write(tmp_path / "p.jsonl", {"prediction": "U.S.A.", "references": ["USA"], "task": "hotpotqa"})
    code = (
        "import sys\nfrom longlora_cli.cli import main\n"
        f"try:\n    main(['eval', '--rescore', {str(path)!r}, '--scorer', 'longbench', '--json'])\n"
        "except SystemExit as left:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)\n"
        "    print(left.code, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    first, last = done.stdout.splitlines()
    assert json.loads(first)["scores"] == [1.0]
    assert last == "0 []"


def test_without_json_the_mean_is_told_and_nothing_is_written(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "p.jsonl", {"prediction": "Yuki", "references": ["Yuki"]})
    for more, told in (([], "nolima@7532e4e, contains: mean 1.0000"), (["--dry-run"], "1 predictions")):
        with pytest.raises(SystemExit) as left:
            main(["eval", "--rescore", "p.jsonl", "--scorer", "nolima", *more])
        assert not left.value.code
        assert told in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]


def test_the_published_row_comes_out_of_the_published_file(capsys) -> None:
    path = KNOWN / "infinitebench_gpt4" / "preds_code_debug.jsonl.xz"
    for scorer, mean in (("infinitebench", 37.06), ("infinitebench@2024-08", 51.02)):
        code, found, _ = rescore(capsys, path, scorer)
        assert (code, found["n"]) == (0, 394)
        assert round(100 * found["mean"], 2) == mean


RULER_ROW = {"pred": "kitchen, 12", "outputs": ["Kitchen", "13"], "length": 4096, "index": 0}
LM_EVAL_ROW = {
    "doc_id": 0,
    "doc": {"outputs": ["Kitchen", "13"], "max_length": 4096},
    "target": "['Kitchen', '13']",
    "resps": [["kitchen, 12 "]],
    "filtered_resps": ["kitchen, 12"],
    "filter": "none",
}
SHAPES = [
    ("LongBench", {"pred": "Food\nx", "answers": ["Food"], "all_classes": ["Food", "Date"], "length": 5000}),
    ("InfiniteBench", {"id": 0, "prediction": "The key is 71432", "ground_truth": "71432"}),
    ("InfiniteBench's data", {"prediction": "B", "answer": ["get_x"], "options": ["get_y", "get_x"]}),
    ("RULER", RULER_ROW),
    ("lm-eval", LM_EVAL_ROW),
    (
        "LongBench v2",
        {"response": "The correct answer is (B)", "pred": "B", "answer": "B", "length": "short"},
    ),
    ("Graphwalks", {"prediction": "Final Answer: [a]", "answer_nodes": ["a"]}),
    ("MRCR", {"prediction": "KEYtext", "answer": "KEYtext", "random_string_to_prepend": "KEY"}),
    ("L-Eval", {"prediction": "AC", "reference": "A"}),
    ("ours", {"task": "generate", "prediction": "kitchen", "references": ["kitchen"], "scores": {"f1": 0.0}}),
]
EXPECTED = {
    "LongBench": ("trec.jsonl", "longbench", 1.0),
    "InfiniteBench": ("preds_passkey.jsonl", "infinitebench", 1.0),
    "InfiniteBench's data": ("code_debug.jsonl", "infinitebench@2024-08", 1.0),
    "RULER": ("niah_multikey_1.jsonl", "ruler", 50.0),
    "lm-eval": ("samples_ruler_vt_2026-01-01T00-00-00.jsonl", "ruler", 50.0),
    "LongBench v2": ("out.jsonl", "longbench2", 1.0),
    "Graphwalks": ("out.jsonl", "graphwalks", 1.0),
    "MRCR": ("out.jsonl", "mrcr", 1.0),
    "L-Eval": ("out.jsonl", "leval.exact_match", 0.0),
    "ours": ("generate.jsonl", "f1", 1.0),
}


@pytest.mark.parametrize(("shape", "row"), SHAPES, ids=[shape for shape, _ in SHAPES])
def test_files_of_other_projects_are_read_as_they_are(shape, row, tmp_path, capsys) -> None:
    name, scorer, value = EXPECTED[shape]
    code, found, err = rescore(capsys, write(tmp_path / name, row), scorer)
    assert (code, found.get("scores")) == (0, [value]), err


def test_rulers_scores_mean_and_interval_are_per_cent(tmp_path, capsys) -> None:
    rows = [{"prediction": "a", "references": ["a"]}, {"prediction": "b", "references": ["a"]}]
    found = rescore(capsys, write(tmp_path / "p.jsonl", *rows), "ruler.part")[1]
    assert (found["scores"], found["mean"], found["scale"]) == ([100.0, 0.0], 50.0, 100.0)
    assert found["ci95"] == pytest.approx([9.453120573423074, 90.54687942657693])  # Wilson's of 1 in 2


def test_babilongs_csv_is_read_and_its_task_is_in_the_files_name(tmp_path, capsys) -> None:
    path = tmp_path / "qa1_0k_instruction_yes_examples_yes_post_prompt_yes.csv"
    path.write_text(
        'target,output,question\nkitchen,"Mary, now, is in the\nkitchen.",Where is Mary?\n'
        "office,kitchen or office,Where is John?\n"
    )
    assert rescore(capsys, path, "babilong")[1]["scores"] == [1.0, 0.0]
    assert rescore(capsys, path, "babilong@lm-eval")[1]["scores"] == [1.0, 1.0]


def test_two_objects_on_a_line_are_two_rows_and_compressed_files_are_read(tmp_path, capsys) -> None:
    one = json.dumps({"prediction": "a cat", "references": ["cat"]})
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(f"{one}{one}\n\n  {one}\n".encode()))
    assert rescore(capsys, path, "f1")[1]["scores"] == [1.0, 1.0, 1.0]


def test_several_scores_tasks_and_length_buckets_are_told_apart(tmp_path, capsys) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {"prediction": "a b", "references": ["b"], "task": "qasper_e", "length": 3999},
        {"prediction": "x = 1", "references": ["x = 2"], "task": "lcc_e", "length": 8000},
    )
    _, found, _ = rescore(capsys, path, "longbench")
    assert found["tasks"]["lcc_e"]["mean"] == pytest.approx(0.8)
    assert {bucket: part["mean"] for bucket, part in found["buckets"].items()} == pytest.approx(
        {"0-4k": 1.0 * found["scores"][0], "8k+": 0.8}
    )
    _, found, _ = rescore(capsys, path, "rouge.rouge1")
    assert found["key"] == "rouge1"
    assert set(found["columns"]) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert found["columns"]["rouge1"]["scores"] == found["scores"]


def test_the_first_line_counts_for_the_four_tasks_alone(tmp_path, capsys) -> None:
    rows = [
        {"prediction": "\nParis\nRome", "references": ["Paris"], "task": t} for t in ("triviaqa", "qasper")
    ]
    found = rescore(capsys, write(tmp_path / "p.jsonl", *rows), "longbench.qa_f1")[1]
    assert found["scores"] == pytest.approx([1.0, 2 / 3])


GOOD = {"prediction": "x", "references": ["x"]}
FAULTS = [
    ("f1", [], ":1: the file holds no predictions"),
    ("f1", [GOOD, {"references": ["x"]}], ":2: prediction is missing; a row needs prediction (or response"),
    ("f1", [GOOD, {"prediction": "x"}], ":2: references is missing; a row needs references (or reference"),
    ("f1", [{"prediction": None, "references": ["x"]}], ":1: prediction is null"),
    ("f1", [{"prediction": 7, "references": ["x"]}], ":1: prediction is 7, where a text is needed"),
    ("f1", [{"prediction": "x", "references": []}], ":1: the list of references is empty"),
    ("f1", [{"prediction": "x", "references": [{"a": 1}]}], ":1: references holds {'a': 1}"),
    ("f1", [{"prediction": "", "references": ["x"]}], ":1: the only prediction is empty"),
    ("f1", [{**GOOD, "prediction": " \n"}, {**GOOD, "prediction": ""}], ":1: all 2 predictions are empty"),
    ("longbench", [GOOD], ":1: task is missing"),
    ("longbench.classification", [GOOD], ":1: all_classes is missing"),
    ("babilong", [{**GOOD, "task": "qa1"}], ":1: question is missing"),
    ("infinitebench", [{**GOOD, "task": "code_run"}], ":1: reference 'x' is not a whole number"),
    ("mrcr", [GOOD], ":1: prefix is missing"),
]


@pytest.mark.parametrize(("scorer", "rows", "fault"), FAULTS, ids=[fault for _, _, fault in FAULTS])
def test_a_row_that_cannot_be_used_is_named_with_file_and_line(scorer, rows, fault, tmp_path, capsys) -> None:
    path = write(tmp_path / "p.jsonl", *rows)
    code, found, err = rescore(capsys, path, scorer)
    assert code == 2
    assert err.splitlines()[0].startswith(f"longlora: error: {path}{fault}")
    assert set(found) == {"error", "details", "exit_code"}


def test_what_is_no_file_of_rows_is_refused(tmp_path, capsys) -> None:
    for content, fault in (
        (b"{", ":1: not JSON"),
        (b"[1]\n", ":1: a row is an object"),
        (b"\xff", ":1: not UTF-8"),
        (b"[" * 99999, ":1: not JSON"),
    ):
        path = tmp_path / "p.jsonl"
        path.write_bytes(content)
        code, _, err = rescore(capsys, path, "f1")
        assert code == 2
        assert f"{path}{fault}" in err
    for path in (tmp_path / "none.jsonl", tmp_path):
        code, _, err = rescore(capsys, path, "f1")
        assert code == 2
        assert err.startswith(f"longlora: error: {path}: cannot be read: ")


def test_all_faults_of_a_file_are_told_at_once(tmp_path, capsys) -> None:
    path = write(tmp_path / "p.jsonl", {"prediction": 1, "references": ["x"]}, GOOD, {"prediction": "x"})
    _, found, _ = rescore(capsys, path, "f1")
    assert "p.jsonl:1: prediction is 1" in found["error"]
    assert "p.jsonl:3: references is missing" in found["details"][0]


def test_an_unknown_scorer_or_version_is_refused_with_what_there_is(tmp_path, capsys) -> None:
    path = write(tmp_path / "p.jsonl", GOOD)
    code, found, _ = rescore(capsys, path, "longbench.qaf1")
    assert code == 2
    assert found["error"] == "--scorer longbench.qaf1: unknown scorer; did you mean longbench.qa_f1?"
    code, found, _ = rescore(capsys, path, "infinitebench@1")
    assert (code, found["details"]) == (2, ["Versions of infinitebench: 2024-06, 2024-08."])


def test_a_fault_inside_a_scorer_stops_the_command(tmp_path, monkeypatch) -> None:
    from longlora_cli.evaluation import rescoring
    from longlora_cli.evaluation.scorers import Choice

    def broken(self: Choice, *row: object) -> dict:
        raise RecursionError("deep")

    monkeypatch.setattr(rescoring.Choice, "score", broken)
    path = write(tmp_path / "p.jsonl", GOOD)
    with pytest.raises(RecursionError):
        main(["eval", "--rescore", str(path), "--scorer", "f1", "--json"])


def test_settings_without_effect_beside_rescore_are_refused(tmp_path, capsys) -> None:
    path = str(write(tmp_path / "p.jsonl", GOOD))
    for arguments, fault in (
        (["--rescore", path, "--scorer", "f1", "--out", "x"], "--out has no effect here"),
        (["--rescore", path, "--scorer", "f1", "--model", "builtin"], "--model has no effect here"),
        (["--rescore", path], "--rescore needs --scorer NAME"),
        (["--scorer", "f1", "--out", "x"], "--scorer has no effect here: it belongs to --rescore"),
        ([], "--out is missing"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["eval", *arguments])
        assert left.value.code == 2
        assert fault in capsys.readouterr().err
