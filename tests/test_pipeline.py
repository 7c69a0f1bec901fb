"""The main job on the embedded model: prepare, train, eval, chat, merge, and what each leaves fits the next."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from longlora_cli.cli import main
from longlora_cli.models.source import base_folder

CHANGED = "Elementary, my dear Watson: the numbers were hidden in the lamp."


def call(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([*words, "--json"])
    out = capsys.readouterr().out
    content: dict[str, Any] = json.loads(out)
    content["exit"] = left.value.code or 0
    return content


def test_five_commands_make_a_longer_model_that_plain_transformers_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    book = (base_folder("builtin") / "book.txt").read_text(encoding="utf-8")
    Path("book.txt").write_text(book[:40_000])
    prepared = call(
        capsys, "prepare", "book.txt", "--max-length", "1k", "--synthetic", "needle=8", "--out", "data"
    )
    assert prepared["exit"] == 0
    trained = call(
        capsys,
        *[
            "train",
            "--data",
            "data",
            "--rope",
            "theta",
            "--steps",
            "2",
            "--also-train",
            "norms",
            "--out",
            "run",
        ],
    )
    assert trained["exit"] == 0
    assert trained["context_length"] == 1024
    grid = [
        "--tasks",
        "needle",
        "--haystack",
        "book.txt",
        "--lengths",
        "512",
        "--depths",
        "2",
        "--samples",
        "1",
    ]
    by_run = call(capsys, "eval", "--model", "run", *grid, "--out", "by-run")
    assert by_run["tasks"]["needle"]["n"] == 2
    said = call(capsys, "chat", "--model", "run", "-p", "The secret code?", "--max-new-tokens", "8")
    merged = call(capsys, "merge", "run", "--out", "model")
    assert merged["exit"] == 0
    same = call(capsys, "chat", "--model", "model", "-p", "The secret code?", "--max-new-tokens", "8")
    assert same["text"] == said["text"]
    by_model = call(capsys, "eval", "--model", "model", *grid, "--out", "by-model")
    assert by_model["tasks"]["needle"]["score"] == by_run["tasks"]["needle"]["score"]
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained("model")
    assert config.max_position_embeddings == 1024
    assert config.rope_parameters == trained["rope"]["parameters"]


def test_the_embedded_model_finds_facts_within_its_trained_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["--tasks", "needle", "--lengths", "512", "--depths", "2", "--samples", "8", "--needle-facts", "2"]
    result = call(capsys, "eval", *grid, "--out", str(tmp_path / "e"))
    assert result["tasks"]["needle"]["score"] >= 0.75
    assert result["tasks"]["needle"]["n"] == 16


def test_the_embedded_model_and_its_book_stay_below_5_mb() -> None:
    assert sum(path.stat().st_size for path in base_folder("builtin").iterdir()) <= 5_000_000


BAD_INPUT = {
    "a missing file": ("prepare nothing.txt --out x", 2, "nothing.txt"),
    "an empty file": ("prepare empty.txt --out x", 2, "empty.txt"),
    "broken JSON": ("prepare broken.jsonl --out x", 2, "broken.jsonl:7"),
    "roles in the wrong order": ("prepare roles.jsonl --out x", 2, "roles.jsonl:1"),
    "an unknown key": ("prepare keys.jsonl --out x", 2, "did you mean"),
    "a length of zero": ("prepare book.txt --max-length 0 --out x", 2, "--max-length 0"),
    "an unknown flag": ("train --dta d --out x", 2, "--dta"),
    "missing data": ("train --data nothing --out x", 2, "nothing: no such folder"),
    "texts in place of prepared data": ("train --data full --out x", 2, "full is not prepared data"),
    "no model folder": ("chat --model ./nothing -p hi", 3, "nothing"),
    "an existing folder": ("prepare book.txt --out full", 2, "full exists already"),
    "an unknown recipe": ("train --recipe no.yaml --data d --out x", 3, "no.yaml"),
}


@pytest.mark.parametrize("name", sorted(BAD_INPUT))
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(CHANGED)
    Path("empty.txt").write_text("")
    good = json.dumps({"text": CHANGED}) + "\n"
    Path("broken.jsonl").write_text(good * 6 + '{"text": "unfinished\n' + good)
    turn = {"role": "assistant", "content": "a"}
    Path("roles.jsonl").write_text(json.dumps({"messages": [turn, turn]}) + "\n")
    Path("keys.jsonl").write_text(json.dumps({"mesages": [turn]}) + "\n")
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    line, code, words = BAD_INPUT[name]
    with pytest.raises(SystemExit) as left:
        main(line.split())
    err = capsys.readouterr().err
    assert left.value.code == code, err
    assert words in err.splitlines()[0], err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_an_error_is_one_json_object_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = call(capsys, "prepare", str(tmp_path / "no.txt"), "--out", str(tmp_path / "x"))
    assert result["exit_code"] == result["exit"] == 2
    assert "no.txt" in result["error"]


def test_an_adapter_on_another_base_is_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_folder: Path, tiny_data_folder: Path
) -> None:
    run = tmp_path / "run"
    words = [
        "--model",
        str(tiny_model_folder),
        "--data",
        str(tiny_data_folder),
        "--steps",
        "1",
        "--out",
        str(run),
    ]
    assert call(capsys, "train", *words)["exit"] == 0
    other = Path(shutil.copytree(base_folder("builtin"), tmp_path / "other"))
    said = call(
        capsys, "chat", "--model", str(other), "--adapter", str(run), "-p", "hi", "--max-new-tokens", "4"
    )
    assert said["exit"] == 2
    assert "another base" in said["error"]
