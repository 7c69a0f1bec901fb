"""`longlora eval` from its settings to its folder, on a real tiny model."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module

import numpy as np
import pytest

from longlora_cli.commands import eval as command
from longlora_cli.config import EvalConfig
from longlora_cli.console import Console
from longlora_cli.errors import DataError, IntegrityError, Interrupted, NotFoundError, SettingsError
from longlora_cli.options import resolve
from longlora_cli.storage import verify_folder

WORDS = [
    "river",
    "mill",
    "wind",
    "stone",
    "old",
    "quiet",
    "walked",
    "slept",
    "under",
    "over",
    "bridge",
    "they",
    "time",
    "wisdom",
    "age",
    "worst",
    "best",
]
GRID = {"lengths": [256, 400], "depths": 2, "samples": 2, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "book.txt"
    path.write_text(
        " ".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 9))).capitalize() + "." for _ in range(200))
    )
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"input": f"say {n}", "outputs": [str(n)]}) + "\n" for n in range(3)))
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is a failure of the test."""
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))


def run(config, *, dry_run=False):
    module = import_module(f"longlora_cli.commands.{config.module('eval')}")
    return module.run(config, Console(json_mode=True), dry_run=dry_run)


def without_times(value):
    if isinstance(value, dict):
        dropped = {"seconds", "tokens_per_second", "peak_bytes", "reused_tokens", "out", "settings"}
        return {k: without_times(v) for k, v in value.items() if k not in dropped}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def test_all_tasks_end_in_one_verified_folder_whose_numbers_can_be_recomputed(
    tiny_model_folder, book, rows, tmp_path
):
    out = tmp_path / "result"
    config = EvalConfig(
        beyond=True,
        model=str(tiny_model_folder),
        tasks=["ppl", "passkey", "needle", "generate"],
        out=out,
        data=[book, rows],
        haystack=[book],
        window=64,
        max_tokens=300,
        needle_facts=3,
        **GRID,
    )
    found = run(config)
    manifest = verify_folder(out, "evaluation")
    tasks = ["ppl", "passkey", "needle", "generate"]
    samples = {f"samples/{task}.jsonl" for task in tasks}
    plots = {"plots/ppl.png", "plots/passkey.png", "plots/needle.png"}
    files = {"results.json", "report.html", "nll.npy", "nll_offsets.npy"}
    assert set(manifest.files) == files | samples | plots
    assert not list(tmp_path.glob(".*"))
    stored = json.loads((out / "results.json").read_text())
    assert stored == {k: v for k, v in found.items() if k != "out"}
    assert stored["peak_bytes"] > 10_000_000
    assert stored["model"]["rope"]["parameters"]["rope_type"] == "default"

    nll, offsets = np.load(out / "nll.npy"), np.load(out / "nll_offsets.npy")
    ppl = stored["tasks"]["ppl"]
    assert (nll.dtype, len(nll), offsets.tolist()) == (np.float32, 299, [0, 299])
    assert ppl["perplexity"] == pytest.approx(np.exp(nll.mean(dtype=np.float64)))
    assert ppl["tokens_per_second"] > 0

    for task in ("passkey", "needle"):
        lines = [json.loads(line) for line in (out / f"samples/{task}.jsonl").read_text().splitlines()]
        summary = stored["tasks"][task]
        assert summary["n"] == len(lines) == 2 * 2 * 2
        assert summary["score"] == sum(line["scores"]["score"] for line in lines) / 8
        assert len(summary["cells"]) == 4
        assert all(line["new_tokens"] <= 6 for line in lines)
    assert stored["tasks"]["generate"]["n"] == 3
    assert set(stored["tasks"]["generate"]["scores"]) >= {"rougeL", "f1", "exact_match", "accuracy"}


@pytest.fixture(scope="module")
def finished(tiny_model_folder, rows, tmp_path_factory):
    """An evaluation of a grid and of rows; the tasks are not in alphabetical order."""
    out = tmp_path_factory.mktemp("finished") / "result"
    config = EvalConfig(
        beyond=True,
        model=str(tiny_model_folder),
        tasks=["passkey", "generate"],
        out=out,
        data=[rows],
        haystack=["noise"],
        **GRID,
    )
    run(config)
    return out


def test_a_report_made_anew_is_the_same_page_and_leaves_the_evaluation_as_it_is(finished, tmp_path, no_model):
    out = tmp_path / "page.html"
    found = run(EvalConfig(report=finished, out=out))
    assert out.read_bytes() == (finished / "report.html").read_bytes()
    assert found == {"report": str(out), "bytes": out.stat().st_size, "samples": 11, "left_out": 0}
    verify_folder(finished, "evaluation")
    page = out.read_text()
    assert page.index('id="task-passkey"') < page.index('id="task-generate"')


def test_a_report_beside_another_evaluation_begins_with_both(finished, tmp_path, no_model):
    out = tmp_path / "page.html"
    run(EvalConfig(report=finished, compare=finished, out=out))
    page = out.read_text()
    assert page.index("<h2>Before and after</h2>") < page.index('id="task-passkey"')
    cells = json.loads((finished / "results.json").read_text())["tasks"]["passkey"]["cells"]
    shown = re.findall(r"<td>(\d+) → (\d+)</td>", page)
    assert sorted(shown) == sorted((f"{100 * c['score']:.0f}",) * 2 for c in cells)
    verify_folder(finished, "evaluation")
    with pytest.raises(SettingsError, match="--compare has no effect"):
        resolve(
            "eval",
            {"report": finished, "compare": finished, "export": "lm-eval", "out": tmp_path / "x"},
            None,
        )
    with pytest.raises(NotFoundError, match="there is no evaluation"):
        run(EvalConfig(report=finished, compare=tmp_path / "none", out=tmp_path / "other.html"))


def test_a_report_needs_no_torch(finished, tmp_path):
    code = (
        "import sys\nfrom longlora_cli.cli import main\ntry:\n"
        f"    main(['eval', '--report', {str(finished)!r}, '--out', {str(tmp_path / 'page.html')!r}])\n"
        "except SystemExit as left:\n    print(left.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] in ("0 False False", "None False False")


def test_a_dry_run_of_a_report_writes_nothing(finished, tmp_path, no_model):
    found = run(EvalConfig(report=finished, out=tmp_path / "page.html"), dry_run=True)
    assert (found["dry_run"], found["samples"]) == (True, 11)
    assert not list(tmp_path.iterdir())


def test_a_report_of_what_is_no_evaluation_is_refused(finished, tmp_path):
    (tmp_path / "taken.html").touch()
    cases = [
        (tmp_path / "no", "page.html", DataError, "--report .*no does not exist"),
        (tmp_path, "page.html", DataError, "is not a finished evaluation"),
        (finished, "page", SettingsError, "page is not an .html file"),
        (finished, "taken.html", SettingsError, "exists already"),
    ]
    for folder, out, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            run(EvalConfig(report=folder, out=tmp_path / out))
        assert caught.value.exit_code == 2
    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    with (damaged / "results.json").open("a") as file:
        file.write(" ")
    with pytest.raises(IntegrityError, match=r"results\.json has \d+ bytes"):
        run(EvalConfig(report=damaged, out=tmp_path / "page.html"))


def test_a_dry_run_counts_with_the_tokenizer_alone_and_writes_nothing(
    tiny_model_folder, book, rows, tmp_path, no_model
):
    config = EvalConfig(
        beyond=True,
        model=str(tiny_model_folder),
        tasks=["ppl", "needle", "generate"],
        out=tmp_path / "result",
        data=[book, rows],
        haystack=[book],
        max_tokens=100,
        needle_facts=3,
        **GRID,
    )
    found = run(config, dry_run=True)
    assert found["tasks"]["ppl"] == {"samples": 1, "tokens": 100, "longest": 100}
    assert found["tasks"]["needle"]["samples"] == 8
    assert 380 <= found["tasks"]["needle"]["longest"] + 6 <= 400
    assert found["tasks"]["generate"]["samples"] == 3
    assert not list(tmp_path.iterdir())


def test_bad_input_is_refused_before_a_model_is_loaded(tiny_model_folder, book, tmp_path, no_model):
    bad_row, empty = tmp_path / "bad.jsonl", tmp_path / "empty.txt"
    bad_row.write_text('{"input": "a", "outputs": "b"}\n{"inptu": "a"}\n')
    empty.write_text("")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    cases = [
        ({"tasks": ["generate"], "data": [bad_row]}, DataError, "bad.jsonl:2: unknown key 'inptu'"),
        ({"tasks": ["generate"], "data": [tmp_path / "no.jsonl"]}, DataError, "no.jsonl: no such file"),
        ({"tasks": ["generate"], "data": [book]}, DataError, "jsonl"),
        ({"tasks": ["ppl"], "data": [tmp_path / "no.txt"]}, DataError, "no.txt: no such file"),
        ({"tasks": ["ppl"], "data": [empty]}, DataError, "empty"),
        ({"tasks": ["passkey"], "lengths": [20], "haystack": [book]}, SettingsError, "--lengths 20"),
        ({"tasks": ["needle"], "lengths": [60], "haystack": [book]}, SettingsError, "--lengths 60"),
        ({"tasks": ["ppl"], "data": [book], "out": taken}, SettingsError, "exists already"),
    ]
    for changes, kind, message in cases:
        settings = {"model": str(tiny_model_folder), "out": tmp_path / "result", **changes}
        with pytest.raises(kind, match=message) as caught:
            run(EvalConfig(beyond=True, **settings))
        assert caught.value.exit_code == 2
    config = EvalConfig(
        beyond=True,
        model=str(tiny_model_folder),
        out=tmp_path / "result",
        tasks=["generate"],
        data=[bad_row],
        metrics=["rogue"],
    )
    with pytest.raises(SettingsError, match=r"did you mean rouge\?"):
        run(config)
    assert not (tmp_path / "result").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tasks": ["niddle"]}, "niddle"),
        ({"tasks": ["ppl"], "needle_wording": "eval"}, "--needle-wording has no effect"),
        ({"tasks": ["ppl"], "max_new_tokens": "4"}, "--max-new-tokens has no effect"),
        ({"tasks": ["needle"], "split": "train"}, "--split has no effect"),
        ({"tasks": ["needle"], "depths": "9"}, "--needle-facts 8 is below --depths 9"),
        ({"report": "result", "model": "builtin"}, "--model has no effect here: --report reads a finished"),
        ({"report": "result", "tasks": ["ppl"]}, "--tasks has no effect here: --report reads a finished"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path, flags, message):
    with pytest.raises(SettingsError, match=message):
        resolve("eval", {"out": str(tmp_path / "o"), **flags})


@pytest.mark.parametrize(
    "asked", [{"tasks": ["passkey"], "lengths": [200]}, {"tasks": ["ppl"], "window": 256}]
)
@pytest.mark.usefixtures("no_model")
def test_lengths_beyond_the_model_are_refused_before_it_is_loaded(tiny_model_folder, book, tmp_path, asked):
    data = {"data": [book]} if asked["tasks"] == ["ppl"] else {"haystack": ["noise"]}
    config = EvalConfig(model=str(tiny_model_folder), out=tmp_path / "result", **asked, **data)
    with pytest.raises(SettingsError, match=r"up to \d+ tokens would be read, .* is made for 128"):
        run(config)
    assert not list(tmp_path.iterdir())


def test_lengths_beyond_the_model_are_measured_with_a_warning(tiny_model_folder, book, tmp_path, capsys):
    config = EvalConfig(
        beyond=True,
        model=str(tiny_model_folder),
        tasks=["passkey"],
        out=tmp_path / "result",
        haystack=["noise"],
        lengths=[200],
        depths=1,
        samples=1,
        max_new_tokens=2,
    )
    assert run(config)["tasks"]["passkey"]["n"] == 1
    assert "up to 200 tokens are read, the model is made for 128" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_finished(tiny_model_folder, book, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    config = EvalConfig(
        beyond=True,
        model=str(tiny_model_folder), tasks=["ppl", "passkey"], out=tmp_path / "result", data=[book], haystack=[book],
        window=64, max_tokens=100, **GRID,
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(command.SessionAnswerer, "answer", interrupt)
        patch.setattr(command.SessionAnswerer, "answer_together", interrupt)
        with pytest.raises(Interrupted) as caught:
            run(config)
    assert caught.value.exit_code == 130
    assert not (tmp_path / "result").exists()
    journal = tmp_path / ".result.partial" / "journal.jsonl"
    assert len(journal.read_text().splitlines()) == 1  # the text that was scored


def test_a_killed_evaluation_goes_on_to_the_result_of_an_uninterrupted_one(
    tiny_model_folder, book, tmp_path, server
):
    def config(name):
        return EvalConfig(
            beyond=True,
            model=str(tiny_model_folder), tasks=["passkey"], out=tmp_path / name, haystack=[book],
            lengths=[400, 800], depths=3, samples=8, max_new_tokens=12, device="cpu",
        )  # fmt: skip

    (program := tmp_path / "program.py").write_text(
        "import sys; from longlora_cli.commands.eval import run; from longlora_cli.config import EvalConfig;"
        "from longlora_cli.console import Console;"
        "run(EvalConfig.model_validate_json(sys.argv[1]), Console(json_mode=True), dry_run=False)"
    )
    process = server.start(config("killed").model_dump_json(exclude_unset=True), script=program)
    journal = tmp_path / ".killed.partial" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = [json.loads(line) for line in journal.read_text().split("\n")[:-1]]
    assert 3 <= len(kept) < 48

    resumed, whole = run(config("killed")), run(config("whole"))
    assert without_times(resumed) == without_times(whole)
    lines = [
        json.loads(line) for line in (tmp_path / "killed/samples/passkey.jsonl").read_text().splitlines()
    ]
    by_key = {line["key"]: line for line in lines}
    assert all(by_key[row["key"]]["seconds"] == row["seconds"] for row in kept)  # not asked again
    assert (tmp_path / "killed/plots/passkey.png").read_bytes() == (
        tmp_path / "whole/plots/passkey.png"
    ).read_bytes()
