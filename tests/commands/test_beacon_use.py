"""`eval` and `chat` on a run with beacons, from the command line's settings to what is told."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from longlora_cli.beacon.loading import load_model
from longlora_cli.beacon.retrieval_session import RetrievalSession
from longlora_cli.beacon.settings import BeaconSettings
from longlora_cli.cli import main
from longlora_cli.commands import chat as chat_command
from longlora_cli.commands import eval as eval_command
from longlora_cli.commands import train
from longlora_cli.config import ChatConfig, EvalConfig, TrainConfig
from longlora_cli.console import Console
from longlora_cli.data.chat_template import encode_prompt
from longlora_cli.errors import SettingsError
from longlora_cli.generation.past import Past, past_of
from longlora_cli.generation.session import Session, stop_ids
from longlora_cli.models.source import resolve
from longlora_cli.sections import ModelSection

WINDOW, LENGTH = 64, 1024
TEXT = "The river ran past the old mill and the miller slept under the bridge. "


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer_folder) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_tiny_model(folder, tiny_tokenizer_folder, max_position_embeddings=LENGTH)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, base) -> Path:
    """A run of the command that trained beacons and nothing else, for a few steps with a large rate."""
    root = tmp_path_factory.mktemp("run")
    (root / "book.txt").write_text(TEXT * 60)
    prepare = ["prepare", root / "book.txt", "--model", base, "--max-length", "256", "--out", root / "data"]
    assert code_of(*prepare, "--json") == 0
    train.run(
        TrainConfig(
            model=str(base),
            data=[root / "data"],
            out=root / "run",
            device="cpu",
            adapter="none",
            beacon_ratio=[2, 8],
            beacon_window=WINDOW,
            steps=3,
            learning_rate=3e-2,
        ),
        Console(json_mode=True),
        dry_run=False,
    )
    return root / "run"


def code_of(*arguments) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return int(left.value.code or 0)


def evaluate(model, out, **settings):
    grid = {"tasks": ["passkey", "needle"], "lengths": [400], "depths": 2, "samples": 1, "max_new_tokens": 6}
    config = EvalConfig(model=str(model), device="cpu", out=out, **(grid | settings))
    return eval_command.run(config, Console(json_mode=True), dry_run=False)


def samples(out, task):
    return [json.loads(line) for line in (out / "samples" / f"{task}.jsonl").read_text().splitlines()]


def chat(model, *, dry_run=False, **settings):
    config = ChatConfig(model=str(model), device="cpu", **({"max_new_tokens": 8} | settings))
    return chat_command.run(config, Console(json_mode=True), dry_run=dry_run)


def test_a_run_with_beacons_is_evaluated_at_its_largest_ratio(run, tmp_path):
    results = evaluate(run, tmp_path / "out")
    assert (results["model"]["beacon"]["ratios"], results["model"]["beacon"]["window"]) == ([8], WINDOW)
    [audit] = [a for a in results["audits"] if a["name"] == "What was read is kept as"]
    assert audit["value"] == "beacons x8 of windows of 64 tokens"
    loaded = load_model(ModelSection(model=str(run), device="cpu"))
    one = Session(loaded, past=Past(beacon=BeaconSettings(window=WINDOW, ratios=(8,))))
    longest = max(samples(tmp_path / "out", "needle"), key=lambda row: row["kv_bytes"])
    assert longest["kv_bytes"] == one.kv_bytes_for(longest["prompt_tokens"] + longest["new_tokens"] - 1)


def test_ratio_0_answers_as_the_base_does(run, base, tmp_path):
    """Beacons alone were trained, so that the base is the plain session's model."""
    evaluate(base, tmp_path / "base")
    evaluate(run, tmp_path / "zero", beacon_ratio=[0])
    evaluate(run, tmp_path / "eight")
    said = {
        name: [row["prediction"] for task in ("passkey", "needle") for row in samples(tmp_path / name, task)]
        for name in ("base", "zero", "eight")
    }
    assert said["zero"] == said["base"] != said["eight"]


def test_perplexity_scores_each_token_once_and_differs_by_ratio(run, base, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT * 20)
    found = {}
    for name, model, ratio in (
        ("base", base, {}),
        ("zero", run, {"beacon_ratio": [0]}),
        ("two", run, {"beacon_ratio": [2]}),
        ("eight", run, {}),
    ):
        settings = {"tasks": ["ppl"], "data": [tmp_path / "book.txt"], "window": 300} | ratio
        config = EvalConfig(model=str(model), device="cpu", out=tmp_path / name, **settings)
        found[name] = eval_command.run(config, Console(json_mode=True), dry_run=False)["tasks"]["ppl"]
    assert len({summary["n"] for summary in found.values()}) == 1
    assert found["zero"]["perplexity"] == pytest.approx(found["base"]["perplexity"], rel=1e-5)
    assert len({round(found[name]["perplexity"], 3) for name in ("zero", "two", "eight")}) == 3


def test_a_length_beyond_the_positions_is_read_with_beacons_and_refused_without(run, base, tmp_path):
    long = {"tasks": ["passkey"], "lengths": [2000], "depths": 1}
    assert evaluate(run, tmp_path / "beacons", **long)["tasks"]["passkey"]["n"] == 1
    with pytest.raises(SettingsError, match="made for 1,024"):
        evaluate(run, tmp_path / "zero", beacon_ratio=[0], **long)


def test_chat_answers_from_beacons_and_tells_their_bytes(run, tmp_path):
    (tmp_path / "note.txt").write_text(TEXT * 20)
    asked = {"prompt": "who?", "file": [tmp_path / "note.txt"]}
    planned, found = chat(run, dry_run=True, **asked), chat(run, **asked)
    loaded = load_model(ModelSection(model=str(run), device="cpu"))
    content = f"File: note.txt\n\n{TEXT * 20}\n\nwho?"
    ids = encode_prompt(loaded.tokenizer, [{"role": "user", "content": content}])
    one = Session(loaded, past=Past(beacon=BeaconSettings(window=WINDOW, ratios=(8,))))
    answer = one.answer(ids, max_new_tokens=8, stop_ids=stop_ids(loaded))
    assert (found["text"], found["kv_bytes"]) == (answer.text, answer.kv_bytes)
    assert found["beacon"] == planned["beacon"]
    assert found["beacon"]["ratios"] == [8]
    assert planned["context_length"] == found["context_length"] == one.context_length > 1000
    assert planned["kv_bytes"] == one.kv_bytes_for(len(ids) + 8)
    assert found["kv_bytes"] < 0.4 * len(ids) * loaded.facts.kv_bytes_per_token(4)


def test_a_second_turn_reads_only_what_is_new_and_stats_tell_the_windows(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "note.txt").write_text(TEXT * 20)
    lines = b"who?\nwhere?\n/stats\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    config = ChatConfig(model=str(run), device="cpu", max_new_tokens=8, file=[tmp_path / "note.txt"])
    chat_command.run(config, Console(), dry_run=False)
    told = capsys.readouterr().err
    assert "beacons x8 of windows of 64 tokens" in told
    second = [line for line in told.splitlines() if line.startswith("[context")][1]
    read = int(second.split("read ")[1].split()[0].replace(",", ""))
    assert read < 30


REFUSED = {
    "bits": (["--kv-bits", "8"], "--kv-bits 8 has no effect here"),
    "bits and a ratio": (["--beacon-ratio", "8", "--kv-bits", "8"], "--kv-bits has no effect here"),
    "a chunk": (["--prefill-chunk", "64"], "--prefill-chunk has no effect here"),
    "dynamic positions": (["--beacon-ratio", "8", "--rope", "dynamic"], "--rope dynamic"),
    "a ratio that does not divide the window": (["--beacon-ratio", "7"], "7 does not divide"),
    "retrieval with three ratios": (
        ["--retrieval-method", "bm25", "--beacon-ratio", "2,4,8"],
        "--retrieval-method takes at most two",
    ),
    "retrieval of what is not compressed": (
        ["--retrieval-method", "bm25", "--beacon-ratio", "0"],
        "--beacon-ratio 0 with retrieval",
    ),
    "spans without a method": (
        ["--beacon-ratio", "8", "--retrieval-topk", "2"],
        "--retrieval-topk has no effect",
    ),
    "an encoder that is not there": (["--retrieval-method", "no-such-folder"], "no-such-folder"),
    "a mix of one ratio": (["--beacon-ratio", "8", "--beacon-ratio-mix", "sequence"], "--beacon-ratio-mix"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("command", ["eval", "chat"])
def test_what_cannot_work_with_beacons_is_refused_in_one_line(run, tmp_path, capsys, command, name):
    flags, told = REFUSED[name]
    own = (
        ["-p", "hi"]
        if command == "chat"
        else ["--tasks", "passkey", "--lengths", "300", "--out", tmp_path / "o"]
    )
    assert code_of(command, "--device", "cpu", "-m", run, *own, *flags) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert told in errors[0]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "flags", [["--beacon-ratio", "8"], ["--beacon-ratio", "0,8"], ["--beacon-parallel-window", "2"]]
)
def test_beacons_of_a_model_without_any_are_refused_before_it_is_loaded(base, capsys, monkeypatch, flags):
    monkeypatch.setattr(chat_command, "load_model", lambda *a, **k: pytest.fail("weights were loaded"))
    assert code_of("chat", "--device", "cpu", "-m", base, "-p", "hi", *flags) == 2
    assert "has no beacons" in capsys.readouterr().err


def test_every_setting_of_use_changes_how_the_past_is_kept(run):
    source = resolve(str(run))

    def past(**settings):
        return past_of(ChatConfig(model=str(run), **settings), source).beacon

    assert past().ratios == (8,)
    assert past(beacon_ratio=[2]).ratios == (2,)
    assert past(beacon_ratio=[2, 8], beacon_ratio_mix="adapt-64").reserve == 64
    assert past(beacon_parallel_window=4).parallel == 4
    assert past(beacon_parallel_window=4).window == WINDOW


def test_every_setting_of_retrieval_changes_how_the_past_is_searched(run):
    source = resolve(str(run))

    def past(**settings):
        return past_of(ChatConfig(model=str(run), retrieval_method="bm25", **settings), source)

    assert (past().retrieval.method, past().beacon.ratios, past().fine_ratio) == ("bm25", (8,), 0)
    assert (past(beacon_ratio=[2, 8]).beacon.ratios, past(beacon_ratio=[2, 8]).fine_ratio) == ((8,), 2)
    assert past(retrieval_topk=5).retrieval.topk == 5
    assert past(retrieval_key_length=32).retrieval.key_length == 32
    assert past(retrieval_topk=5).readable(1024, 1024) < past().readable(1024, 1024)


RETRIEVE = {"retrieval_method": "bm25", "retrieval_topk": 2, "retrieval_key_length": 16}


def test_retrieval_in_an_evaluation_is_told_and_takes_its_bytes(run, tmp_path):
    plain = evaluate(run, tmp_path / "plain", tasks=["needle"])
    found = evaluate(run, tmp_path / "found", tasks=["needle"], **RETRIEVE)
    assert found["model"]["retrieval"] == {"method": "bm25", "topk": 2, "key_length": 16, "fine_ratio": 0}
    assert found["tasks"]["needle"]["kv_bytes"] > plain["tasks"]["needle"]["kv_bytes"]
    [audit] = [a for a in found["audits"] if a["name"] == "What was read is kept as"]
    assert audit["value"].endswith("2 spans of 16 found by bm25 in full")
    keys = [{row["key"] for row in samples(tmp_path / name, "needle")} for name in ("plain", "found")]
    assert not keys[0] & keys[1]


def test_two_ways_to_keep_the_past_are_compared_question_by_question(run, tmp_path):
    evaluate(run, tmp_path / "full", tasks=["needle"], beacon_ratio=[0])
    found = evaluate(run, tmp_path / "found", tasks=["needle"], compare=tmp_path / "full", **RETRIEVE)
    assert found["comparison"]["tasks"]["needle"]["pairs"] == 2
    assert found["comparison"]["left_out"] == []


def test_retrieval_has_no_query_for_perplexity(run, tmp_path):
    with pytest.raises(ValueError, match="ppl asks none"):
        EvalConfig(model=str(run), tasks=["ppl"], out=tmp_path / "out", **RETRIEVE)


def test_chat_searches_by_the_newest_question(run, tmp_path, monkeypatch):
    asked, own = [], RetrievalSession.answering
    monkeypatch.setattr(
        RetrievalSession, "answering", lambda self, query: asked.append(query) or own(self, query)
    )
    (tmp_path / "note.txt").write_text(TEXT * 20)
    lines = b"who slept?\nwhere is the mill?\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    config = ChatConfig(
        model=str(run), device="cpu", max_new_tokens=8, file=[tmp_path / "note.txt"], **RETRIEVE
    )
    assert chat_command.run(config, Console(), dry_run=False) == {"turns": 2}
    assert asked == ["who slept?", "where is the mill?"]


def test_windows_in_parallel_answer_alike(run, tmp_path):
    (tmp_path / "note.txt").write_text(TEXT * 20)
    asked = {"prompt": "who?", "file": [tmp_path / "note.txt"]}
    one, three = chat(run, **asked), chat(run, beacon_parallel_window=3, **asked)
    assert (one["text"], one["kv_bytes"]) == (three["text"], three["kv_bytes"])


def test_a_plain_model_is_read_plainly(base):
    assert past_of(ChatConfig(model=str(base)), resolve(str(base))) == Past()
