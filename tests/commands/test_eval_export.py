"""`longlora eval --report FOLDER --export`: finished evaluations as files that other programs read."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import benchmark_files as files
import pytest

from longlora_cli.cli import main
from longlora_cli.commands import eval as command
from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.evaluation.generation import Answer
from longlora_cli.models.tokenizer import load_tokenizer
from longlora_cli.storage import verify_folder

SAYINGS = ("Paris, the mill", "Food or Date", "\nx = load(path)\nmore", "Ann meets Bob.", "7 or Paragraph 12")


def measure(folder, out, answer, **settings):
    """An evaluation whose answers are given, since a tiny model's are right by chance alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.SessionAnswerer, "answer", answer)
        more = {"device": "cpu", "dtype": "fp32", "batch_size": 1}
        config = EvalConfig(beyond=True, model=str(folder), out=out, **more, **settings)
        command.run(config, Console(json_mode=True), dry_run=False)
    return out


@pytest.fixture(scope="module")
def synthetic(tiny_model_folder, tmp_path_factory):
    """Perplexity, a grid, RULER's tasks at two lengths and a group."""
    folder = tmp_path_factory.mktemp("synthetic")
    (folder / "book.txt").write_text("The mill stood by the river and the wind was old. " * 20)
    tokenizer, turn = load_tokenizer(tiny_model_folder), itertools.count()

    def answer(self, ids, limit, stop=()):
        numbers = re.findall(r"\d{5,}", tokenizer.decode(ids))
        said = f"It is {numbers[0]}." if numbers and next(turn) % 3 else "No."
        return Answer([5], said, "eos")

    return measure(
        tiny_model_folder,
        folder / "result",
        answer,
        tasks=["ppl", "passkey", "niah", "kv"],
        data=[folder / "book.txt"],
        window=64,
        compat=["lm-eval"],
        lengths=[1400, 1600],
        depths=2,
        samples=1,
    )


@pytest.fixture(scope="module")
def benchmarks(tiny_model_folder, tmp_path_factory):
    """LongBench, LongBench-E and multiple choice."""
    folder, said = tmp_path_factory.mktemp("benchmarks"), itertools.cycle(SAYINGS)
    data = [
        files.make_longbench(folder / "v1"),
        files.make_longbench_e(folder / "e"),
        files.make_choices(folder / "choices"),
    ]
    return measure(
        tiny_model_folder,
        folder / "result",
        lambda self, ids, limit, stop: Answer([5], next(said), "eos"),
        tasks=["longbench", "longbench_e", "multiple_choice"],
        data=data,
        max_prompt=400,
    )


def export(capsys, *words):
    """Exit code and the JSON object."""
    with pytest.raises(SystemExit) as left:
        main(["eval", *map(str, words), "--json"])
    return int(left.value.code or 0), json.loads(capsys.readouterr().out)


def read_lm_eval(folder):
    """The results, and the samples by task."""
    (path,) = folder.glob("*/results_*.json")
    from lm_eval.utils import get_file_task_name

    samples = {
        get_file_task_name(lines.name): [json.loads(line) for line in lines.read_text().splitlines()]
        for lines in path.parent.glob("samples_*.jsonl")
    }
    return json.loads(path.read_text()), samples


def bytes_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_lm_evals_own_code_reads_the_results_and_names_their_files(synthetic, tmp_path, capsys):
    from lm_eval.utils import get_latest_filename, get_results_filenames, make_table, sanitize_model_name

    before = bytes_of(synthetic)
    code, found = export(capsys, "--report", synthetic, "--export", "lm-eval", "--out", tmp_path / "x")
    assert (code, found["left_out"]) == (0, [])
    assert bytes_of(synthetic) == before
    verify_folder(tmp_path / "x", "export")
    results, samples = read_lm_eval(tmp_path / "x")
    ours = json.loads((synthetic / "results.json").read_text())
    assert set(samples) == set(ours["tasks"])
    folder = tmp_path / "x" / sanitize_model_name(ours["model"]["name"])
    names = get_results_filenames([str(path) for path in folder.iterdir()])
    assert json.loads(Path(get_latest_filename(names)).read_text()) == results
    table = make_table(results)
    for task, summary in ours["tasks"].items():
        assert re.search(rf"^\| *(- )?{task} *\|", table, re.MULTILINE), task
        if "scorer" in summary:
            assert summary["scorer"] in table
    assert re.search(r"^\|niah *\|", make_table(results, "groups"), re.MULTILINE)


def test_the_results_have_lm_evals_keys_and_our_numbers(synthetic, tmp_path, capsys):
    export(capsys, "--report", synthetic, "--export", "lm-eval", "--out", tmp_path / "x")
    results, samples = read_lm_eval(tmp_path / "x")
    ours = json.loads((synthetic / "results.json").read_text())
    assert set(results) == {
        *("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better"),
        *("n-samples", "config", "transformers_version", "task_hashes", "model_source", "model_name"),
        *("model_name_sanitized", "chat_template_sha", "total_evaluation_time_seconds"),
    }
    single = {key: value for key, value in results["results"]["niah_single_1"].items() if "stderr" not in key}
    lengths = {f"{part['length']},none": part["score"] for part in ours["tasks"]["niah_single_1"]["lengths"]}
    assert single == {"alias": "niah_single_1", "sample_len": 4, **lengths}
    assert results["n-samples"]["niah_single_1"] == {"original": 4, "effective": 4}
    assert results["groups"]["niah"]["1600,none"] == ours["groups"]["niah"]["lengths"][1]["score"]
    assert results["results"]["passkey"]["contains,none"] == pytest.approx(
        ours["tasks"]["passkey"]["contains"]
    )
    ppl, exact = results["results"]["ppl"], ours["tasks"]["ppl"]
    for key in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert ppl[f"{key},none"] == exact[key]
        assert ppl[f"{key},lm-eval"] == exact["compat"]["lm-eval"][key]
        assert results["higher_is_better"]["ppl"][key] is False
    (nats, words) = map(sum, zip(*(row["word_perplexity"] for row in samples["ppl"]), strict=True))
    assert math.exp(-nats / words) == pytest.approx(exact["word_perplexity"], rel=1e-5)


def test_lm_eval_judges_the_exported_ruler_samples_as_they_say(synthetic, tmp_path, capsys):
    from lm_eval.api.metrics import mean_stderr
    from lm_eval.tasks.ruler.common_utils import aggregate_metrics, process_results

    export(capsys, "--report", synthetic, "--export", "lm-eval", "--out", tmp_path / "x")
    results, samples = read_lm_eval(tmp_path / "x")
    values = {"1400": [], "1600": []}
    for sample in samples["niah_single_1"] + samples["niah_multivalue"]:
        length = str(sample["doc"]["max_length"])
        theirs = process_results(sample["doc"], sample["filtered_resps"])[length]
        assert sample[length] == pytest.approx(theirs)
        assert {sample[other] for other in values if other != length} == {-1.0}
        values[length].append(theirs)
    assert len({value for found in values.values() for value in found}) > 1
    task = samples["niah_single_1"]
    for length in values:
        told = results["results"]["niah_single_1"][f"{length},none"]
        assert told == pytest.approx(aggregate_metrics([row[length] for row in task]))
    kv = [row["score"] for row in samples["kv"]]
    assert results["results"]["kv"]["score_stderr,none"] == pytest.approx(mean_stderr(kv))


def test_hashes_are_those_that_lm_eval_takes(synthetic, tiny_model_folder, tmp_path, capsys):
    from lm_eval.utils import hash_string

    export(capsys, "--report", synthetic, "--export", "lm-eval", "--out", tmp_path / "x")
    results, samples = read_lm_eval(tmp_path / "x")
    for sample in samples["niah_multikey_1"]:
        assert sample["doc_hash"] == hash_string(json.dumps(sample["doc"], indent=2, ensure_ascii=False))
        assert sample["target_hash"] == hash_string(sample["target"])
    joined = "".join(row["doc_hash"] + row["target_hash"] for row in samples["kv"])
    assert results["task_hashes"]["kv"] == hash_string(joined)
    template = load_tokenizer(tiny_model_folder).chat_template
    assert results["chat_template_sha"] == hashlib.sha256(template.encode()).hexdigest()


def test_exported_lm_eval_samples_are_rescored_to_the_same_scores(synthetic, benchmarks, tmp_path, capsys):
    export(capsys, "--report", synthetic, "--export", "lm-eval", "--out", tmp_path / "s")
    export(capsys, "--report", benchmarks, "--export", "lm-eval", "--out", tmp_path / "b")
    judged = 0
    for folder, source in (("s", synthetic), ("b", benchmarks)):
        for task, summary in json.loads((source / "results.json").read_text())["tasks"].items():
            if task in ("ppl", "passkey"):  # one is not judged, the other by its own task's rule
                continue
            (path,) = (tmp_path / folder).glob(f"*/samples_{task}_*.jsonl")
            code, found = export(capsys, "--rescore", path, "--scorer", summary["scorer"])
            rows = [json.loads(line) for line in (source / f"samples/{task}.jsonl").read_text().splitlines()]
            assert code == 0, found
            shares = [score / found["scale"] for score in found["scores"]]
            assert shares == pytest.approx([row["scores"]["score"] for row in rows], abs=1e-12), task
            judged += 0 < sum(shares) < len(shares)
    assert judged > 10


def test_longbenchs_files_have_its_fields_and_its_numbers(benchmarks, tmp_path, capsys):
    before = bytes_of(benchmarks)
    code, found = export(capsys, "--report", benchmarks, "--export", "longbench", "--out", tmp_path / "x")
    assert (code, found["left_out"]) == (0, ["multiple_choice.all"])
    assert bytes_of(benchmarks) == before
    ours = json.loads((benchmarks / "results.json").read_text())["tasks"]
    (folder,) = (tmp_path / "x" / "pred").iterdir()
    (e_folder,) = (tmp_path / "x" / "pred_e").iterdir()
    numbers = json.loads((folder / "result.json").read_text())
    assert set(numbers) == set(files.LONGBENCH)
    assert len(set(numbers.values())) > 3
    for task, number in numbers.items():
        assert number == round(100 * ours[f"longbench.{task}"]["score"], 2)
    rows = [json.loads(line) for line in (folder / "trec.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"pred", "answers", "all_classes", "length"}] * 2
    assert rows[0]["all_classes"] == files.LONGBENCH["trec"]["all_classes"]
    by_bucket = json.loads((e_folder / "result.json").read_text())
    assert set(by_bucket) == {"hotpotqa", "trec", "lcc", "gov_report"}
    for task, buckets in by_bucket.items():
        parts = ours[f"longbench_e.{task}"]["parts"]["bucket"]
        assert buckets == {bucket: round(100 * part["score"], 2) for bucket, part in parts.items()}


def test_exported_longbench_predictions_are_rescored_to_the_same_scores(benchmarks, tmp_path, capsys):
    export(capsys, "--report", benchmarks, "--export", "longbench", "--out", tmp_path / "x")
    for path in (tmp_path / "x").glob("pred*/*/*.jsonl"):
        code, found = export(capsys, "--rescore", path, "--scorer", "longbench")
        family = "longbench_e" if path.parts[-3] == "pred_e" else "longbench"
        lines = (benchmarks / f"samples/{family}.{path.stem}.jsonl").read_text().splitlines()
        assert code == 0, found
        assert found["scores"] == [json.loads(line)["scores"]["score"] for line in lines]


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("missing", 2, "does not exist"),
        ("empty", 2, "is not a finished evaluation"),
        ("changed", 4, "differs from its manifest"),
        ("other tasks", 2, "--export longbench does not know ppl, passkey, niah_single_1,"),
        ("taken", 2, "exists already"),
        ("model", 2, "--model has no effect here: --report reads a finished evaluation"),
        ("alone", 2, "--export has no effect here: it belongs to --report"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    synthetic, tmp_path, capsys, fault, code, message
):
    folder, out = tmp_path / "evaluation", tmp_path / "x"
    if fault == "empty":
        folder.mkdir()
    elif fault == "changed":
        shutil.copytree(synthetic, folder)
        path = folder / "samples" / "kv.jsonl"
        path.write_bytes(path.read_bytes().replace(b"No.", b"Yes", 1))
    elif fault != "missing":
        folder = synthetic
    if fault == "taken":
        out.mkdir()
        (out / "mine").write_text("mine")
    words = ["--export", "longbench", "--out", out]
    words += ["--model", "builtin"] if fault == "model" else []
    words += [] if fault == "alone" else ["--report", folder]
    left, found = export(capsys, *words)
    assert left == code
    assert message in found["error"]
    assert "\n" not in found["error"]
    assert [path.name for path in tmp_path.glob("x/*")] == (["mine"] if fault == "taken" else [])


def test_a_dry_run_names_the_files_and_writes_none(synthetic, tmp_path, capsys):
    words = ["--report", synthetic, "--export", "lm-eval", "--out", tmp_path / "x"]
    code, told = export(capsys, *words, "--dry-run")
    assert code == 0
    assert told["dry_run"] is True
    assert not (tmp_path / "x").exists()
    assert told["files"] == export(capsys, *words)[1]["files"]


def test_exporting_needs_no_torch(synthetic, tmp_path):
    words = ["eval", "--report", str(synthetic), "--export", "lm-eval", "--out", str(tmp_path / "x")]
    code = (
        f"import sys\nfrom longlora_cli.cli import main\ntry:\n    main({words!r})\n"
        "except SystemExit as left:\n    print(left.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] in ("0 False False", "None False False")
