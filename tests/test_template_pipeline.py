"""A chosen chat template from prepare to the merged model: each step keeps it, and another one is refused or told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from longlora_cli.cli import main
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.models.tokenizer import load_tokenizer, template_sha256

CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The miller slept."}]
PLAIN = "Who?\n\nThe miller slept.<|im_end|>"


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main([*words, "--json"])
    return int(left.value.code or 0)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path) -> str:
    """Chats prepared with `--chat-template none` for the tiny model, whose own template is ChatML."""
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 8)
    words = [
        "--model",
        str(tiny_model_folder),
        "--chat-template",
        "none",
        "--max-length",
        "64",
        "--out",
        "data",
    ]
    assert call("prepare", "chats.jsonl", *words) == 0
    return "data"


def train(model: Path, *more: str) -> int:
    return call("train", "--model", str(model), "--data", "data", "--steps", "1", "--out", "run", *more)


def test_a_run_and_what_is_merged_from_it_keep_the_template(
    data: str, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_model_folder, "--chat-template", "none") == 0
    assert yaml.safe_load(Path("run/recipe.yaml").read_text())["train"]["chat_template"] == "none"
    digest = template_sha256(load_tokenizer(tiny_model_folder, "none"))
    assert json.loads(Path("run/run.json").read_text())["facts"]["chat_template"] == f"none {digest}"
    assert template_sha256(load_tokenizer("run")) == digest
    assert call("merge", "run", "--out", "merged") == 0
    for folder in ("run/adapter", "merged"):  # by transformers alone, as a server would
        assert AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False) == PLAIN
    capsys.readouterr()
    tokens = []
    for model in ("run", "merged"):
        assert call("chat", "--model", model, "-p", "Who?", "--dry-run", "--max-new-tokens", "8") == 0
        shown = capsys.readouterr()
        tokens.append(json.loads(shown.out)["prompt_tokens"])
        assert "another chat template" not in shown.err
    expected = load_tokenizer("run").apply_chat_template(CHAT[:1], return_dict=False)
    assert tokens == [len(expected)] * 2


def test_another_template_than_a_runs_is_told(
    data: str, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tiny_model_folder, "--chat-template", "none") == 0
    capsys.readouterr()
    chatml = ["--model", "run", "--chat-template", "chatml", "--dry-run"]
    assert call("chat", *chatml, "-p", "Who?", "--max-new-tokens", "8") == 0
    assert "run was trained with another chat template than chatml" in capsys.readouterr().err
    Path("rows.jsonl").write_text(json.dumps({"input": "Who?", "outputs": ["x"]}) + "\n")
    assert call("eval", *chatml, "--beyond", "--tasks", "generate", "--data", "rows.jsonl", "--out", "e") == 0
    assert "run was trained with another chat template than chatml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "difference", "remedy"),
    [
        (
            [],
            "--chat-template none (",
            "Add --chat-template none. Or: Run longlora prepare again with this --model.",
        ),
        (
            ["--chat-template", "chatml"],
            "not --chat-template chatml (",
            "Add --chat-template none. Or: Run longlora prepare again with --chat-template chatml.",
        ),
    ],
)
def test_train_refuses_data_of_another_template_and_says_what_to_type(
    data: str,
    tiny_model_folder: Path,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    difference: str,
    remedy: str,
) -> None:
    assert train(tiny_model_folder, *given) == 4
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    text = json.dumps(shown)
    assert "data was prepared with another chat template" in text
    assert difference in text
    assert remedy in text
    assert not Path("run").exists()


def test_data_of_the_models_own_template_need_no_flag(
    data: str, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("prepare", "chats.jsonl", "--model", str(tiny_model_folder), "--out", "own") == 0
    words = ["train", "--model", str(tiny_model_folder), "--data", "own", "--steps", "1", "--out", "run"]
    capsys.readouterr()
    assert call(*words, "--chat-template", "none") == 4
    assert "Leave --chat-template out." in capsys.readouterr().out
    assert call(*words) == 0


def test_a_template_file_that_changed_is_told(
    data: str, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Path("mine.jinja")
    mine.write_text("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    words = ["--model", str(tiny_model_folder), "--chat-template", "mine.jinja"]
    assert call("prepare", "chats.jsonl", *words, "--out", "other") == 0
    mine.write_text(mine.read_text() + "\n")
    capsys.readouterr()
    assert call("train", *words, "--data", "other", "--steps", "1", "--out", "run") == 4
    assert "mine.jinja has changed since: put it back." in capsys.readouterr().out
    assert (
        call("prepare", "chats.jsonl", *words, "--out", "other") == 2
    )  # and prepare does not take it for the same
    assert "made with other chat template" in capsys.readouterr().out


def test_labels_last_learns_the_last_answer_alone(tmp_path: Path, tiny_model_folder: Path) -> None:
    rounds = [
        *CHAT,
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "It was the age."},
    ]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": rounds}) + "\n")
    words = ["--model", str(tiny_model_folder), "--max-length", "128", "--labels", "last"]
    assert call("prepare", str(tmp_path / "chats.jsonl"), *words, "--out", str(tmp_path / "data")) == 0
    [chunk] = ChunkDataset.open(tmp_path / "data")
    learnt = chunk.input_ids[chunk.labels >= 0]
    assert load_tokenizer(tiny_model_folder).decode(learnt) == "It was the age.<|im_end|>"


def test_a_template_of_another_family_is_refused_before_anything_is_read(
    tmp_path: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chats.jsonl").write_text("not JSON")
    words = ["--model", str(tiny_model_folder), "--chat-template", "llama-3", "--out", str(tmp_path / "data")]
    assert call("prepare", str(tmp_path / "chats.jsonl"), *words) == 2
    assert "which this model's tokenizer has not as control tokens" in capsys.readouterr().out


def test_a_merged_model_stops_where_the_template_ends_an_answer(data: str, tiny_model_folder: Path) -> None:
    Path("mine.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|endoftext|>{% endfor %}")
    words = ["--model", str(tiny_model_folder), "--chat-template", "mine.jinja"]
    assert call("prepare", "chats.jsonl", *words, "--out", "other") == 0
    assert call("train", *words, "--data", "other", "--steps", "1", "--out", "run") == 0
    assert call("merge", "run", "--out", "merged") == 0
    before = json.loads((tiny_model_folder / "generation_config.json").read_text())
    after = json.loads(Path("merged/generation_config.json").read_text())
    tokenizer = load_tokenizer(tiny_model_folder)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert after == before | {"eos_token_id": [tokenizer.eos_token_id, end]}
