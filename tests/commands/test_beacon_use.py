"""`eval` and `chat` on a run with beacons, from the command line's settings to what is told."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from longlora_cli.beacon.loading import load_model
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


def test_windows_in_parallel_answer_alike(run, tmp_path):
    (tmp_path / "note.txt").write_text(TEXT * 20)
    asked = {"prompt": "who?", "file": [tmp_path / "note.txt"]}
    one, three = chat(run, **asked), chat(run, beacon_parallel_window=3, **asked)
    assert (one["text"], one["kv_bytes"]) == (three["text"], three["kv_bytes"])


def test_a_plain_model_is_read_plainly(base):
    assert past_of(ChatConfig(model=str(base)), resolve(str(base))) == Past()
