"""One question, a piped conversation and a real terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
import torch
from input_files import file_of

from longlora_cli.cli import main
from longlora_cli.commands import chat as command
from longlora_cli.commands import chat_turns
from longlora_cli.config import ChatConfig
from longlora_cli.console import Console, printable
from longlora_cli.data.chat_template import encode_prompt
from longlora_cli.errors import Interrupted, SettingsError
from longlora_cli.generation.session import Session, stop_ids
from longlora_cli.models.loading import load_model
from longlora_cli.sections import ModelSection

LENGTH = 4096


@pytest.fixture(scope="module")
def talkative(request, tmp_path_factory, tiny_tokenizer_folder) -> Path:
    """A tiny model of 4,096 tokens that never ends an answer: its end tokens' logits are 0."""
    return changed_model(request, tmp_path_factory, tiny_tokenizer_folder, silence_end_tokens)


@pytest.fixture(scope="module")
def escaping(request, tmp_path_factory, tiny_tokenizer_folder) -> Path:
    """A tiny model that says nothing but ESC and BEL."""
    return changed_model(
        request, tmp_path_factory, tiny_tokenizer_folder, say_escapes, tie_word_embeddings=False
    )


def changed_model(request, tmp_path_factory, tokenizer_folder, change, **settings):
    from transformers import AutoModelForCausalLM

    root = request.config.pluginmanager.get_plugin(str(Path(__file__).parents[1] / "conftest.py"))
    folder = tmp_path_factory.mktemp("model")
    root.make_tiny_model(folder, tokenizer_folder, max_position_embeddings=LENGTH, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model, folder)
    model.save_pretrained(folder)
    return folder


def silence_end_tokens(model, folder):
    model.get_input_embeddings().weight[:3] = 0


def say_escapes(model, folder):
    from transformers import AutoTokenizer

    # Byte-level BPE writes the bytes 0x1b and 0x07 as the characters 256 + 0x1b and 256 + 0x07.
    escape, bell = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(
        [chr(256 + 0x1B), chr(256 + 7)]
    )
    head = model.get_output_embeddings().weight
    head.zero_()
    head[escape], head[bell] = torch.ones(head.shape[1]), -torch.ones(head.shape[1])


@pytest.fixture
def stdin(monkeypatch):
    """Pipe bytes into the command."""

    def give(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give


def chat(folder, *, json_mode=False, dry_run=False, **settings):
    config = ChatConfig(model=str(folder), device="cpu", **({"max_new_tokens": 12} | settings))
    console = Console(json_mode=json_mode)
    return command.run(config, console, dry_run=dry_run)


def exit_code(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["chat", "--device", "cpu", *map(str, arguments)])
    return int(caught.value.code or 0)


def no_weights(*args, **kwargs):
    pytest.fail("weights were loaded")


def test_one_question_reports_text_counts_timings_and_kv_bytes(talkative):
    result = chat(talkative, prompt="hello", json_mode=True)
    loaded = load_model(ModelSection(model=str(talkative), device="cpu"))
    ids = encode_prompt(loaded.tokenizer, [{"role": "user", "content": "hello"}])
    answer = Session(loaded).answer(ids, max_new_tokens=12, stop_ids=stop_ids(loaded))
    assert result["text"] == answer.text
    assert (result["prompt_tokens"], result["new_tokens"], result["reused_tokens"]) == (len(ids), 12, 0)
    assert (result["finish"], result["context_length"]) == ("length", LENGTH)
    assert result["kv_bytes"] == (len(ids) + 11) * loaded.facts.kv_bytes_per_token(4)
    assert min(result["timings"].values()) > 0


def test_a_pipe_gets_the_answer_alone(talkative, capsys):
    expected = chat(talkative, prompt="hello", json_mode=True)["text"]
    capsys.readouterr()
    chat(talkative, prompt="hello")
    streams = capsys.readouterr()
    assert streams.out == printable(expected) + "\n"
    assert "prompt tokens" in streams.err
    assert "new at" in streams.err


def test_the_budget_is_told_before_a_token_is_run(talkative, capsys, monkeypatch):
    told = []
    monkeypatch.setattr(
        Session, "answer", lambda self, ids, **_: told.append(capsys.readouterr().err) or stop()
    )

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat(talkative, prompt="hello")
    assert "prompt tokens + up to 12 new of 4,096" in told[0]
    assert "fits" in told[0]


def test_standard_input_is_a_question_byte_for_byte(talkative, stdin):
    text = "línea\r\n😀 \t end\n"
    stdin(text.encode())
    result = chat(talkative, prompt="-", json_mode=True)
    loaded = load_model(ModelSection(model=str(talkative), device="cpu"))
    assert result["prompt_tokens"] == len(
        encode_prompt(loaded.tokenizer, [{"role": "user", "content": text}])
    )


def test_standard_input_that_is_not_utf8_is_told_by_its_byte(talkative, stdin, capsys):
    stdin(b"hello\xff")
    assert exit_code("-m", talkative, "-p", "-") == 2
    assert capsys.readouterr().err == "longlora: error: standard input: byte 5 is not UTF-8\n"


@pytest.mark.parametrize("name", ["book.txt", "code.py"])
def test_a_file_that_is_not_utf8_is_told_in_one_line_by_its_byte(talkative, tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"a" * 1000 + b"\xe9")
    assert exit_code("-m", talkative, "-p", "hi", "-f", tmp_path / name) == 2
    error = capsys.readouterr().err
    assert "byte 1000 is not UTF-8" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "is_raw"), [(".pdf", False), (".epub", False), (".txt", False), (".html", True)]
)
def test_a_book_is_read_for_its_text_and_a_page_for_its_source(tmp_path, kind, is_raw):
    path = tmp_path / f"a{kind}"
    path.write_bytes(file_of(kind, ["The miller slept."]))
    [(name, text)] = chat_turns.read_texts(path)
    assert name == path.name
    assert text == (path.read_text() if is_raw else "The miller slept.")


def test_a_missing_file_is_told(talkative, tmp_path, capsys):
    assert exit_code("-m", talkative, "-p", "hi", "-f", tmp_path / "none.txt") == 2
    assert "none.txt" in capsys.readouterr().err


def test_a_missing_model_is_told(tmp_path):
    assert exit_code("-m", tmp_path / "none", "-p", "hi") == 3


def test_a_megabyte_is_counted_without_weights(talkative, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_model", no_weights)
    text = "The river ran past the mill and the miller slept. 😀 中文\n" * 17000
    assert len(text.encode()) > 1_000_000
    (tmp_path / "book.txt").write_text(text)
    plan = chat(talkative, prompt="who?", file=[tmp_path / "book.txt"], dry_run=True)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(talkative)
    content = f"File: book.txt\n\n{text}\n\nwho?"
    assert plan["prompt_tokens"] == len(encode_prompt(tokenizer, [{"role": "user", "content": content}]))
    assert plan["files"] == {"book.txt": len(tokenizer.encode(text, add_special_tokens=False))}
    assert not plan["fits_context"]
    assert plan["kv_bytes"] == plan["needed_tokens"] * 2 * 2 * 2 * 16 * 4


def test_what_is_too_long_is_refused_before_weights_are_loaded(talkative, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_model", no_weights)
    (tmp_path / "book.txt").write_text("the mill " * 3000)
    assert exit_code("-m", talkative, "-p", "hi", "-f", tmp_path / "book.txt") == 2
    error = capsys.readouterr().err
    assert "the context has 4,096" in error
    assert "tokens less" in error


def test_a_given_length_is_the_limit(talkative):
    with pytest.raises(SettingsError, match="the context has 20"):
        chat(talkative, prompt="hello there, who are you?", max_length=20)
    assert chat(talkative, prompt="hi", max_length=9000, json_mode=True)["context_length"] == 9000


def test_too_little_memory_is_refused(talkative, monkeypatch):
    for module in (command, chat_turns):
        monkeypatch.setattr(module, "free_bytes", lambda device: 1000)
    assert exit_code("-m", talkative, "-p", "hi") == 5


def test_json_needs_a_question(talkative, capsys):
    assert exit_code("-m", talkative, "--json") == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


def test_an_empty_question_is_refused(talkative, stdin):
    stdin(b"\n")
    assert exit_code("-m", talkative, "-p", "-") == 2


def test_the_seed_decides_the_answer(talkative):
    def said(seed):
        return chat(talkative, prompt="hi", temperature=1.0, top_p=0.9, seed=seed, json_mode=True)["text"]

    assert said(1) == said(1) != said(2)


def test_the_system_message_is_read(talkative):
    plain = chat(talkative, prompt="hi", dry_run=True)["prompt_tokens"]
    assert chat(talkative, prompt="hi", system="be brief", dry_run=True)["prompt_tokens"] > plain


def test_no_escape_reaches_the_output(escaping, capsys):
    result = chat(escaping, prompt="hi", json_mode=True)
    assert set(result["text"]) <= {"\x1b", "\x07"}
    assert len(result["text"]) == 12
    chat(escaping, prompt="hi")
    assert exit_code("-m", escaping, "-p", "hi", "--json", "--max-new-tokens", "5") == 0
    streams = capsys.readouterr()
    assert not {"\x1b", "\x07"} & set(streams.out + streams.err)


def test_ctrl_c_shows_what_was_said_and_ends_with_130(talkative, capsys, monkeypatch):
    pieces = []

    def stream(self, piece):
        sys.stdout.write(piece)
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Console, "stream", stream)
    with pytest.raises(Interrupted, match="after 3 tokens"):
        chat(talkative, prompt="hi")
    assert capsys.readouterr().out.strip() == "".join(pieces[:3]).strip()


def talk(folder, stdin, capsys, *lines, **settings):
    stdin("".join(line + "\n" for line in lines).encode())
    capsys.readouterr()
    result = chat(folder, **settings)
    return result, capsys.readouterr()


def test_a_piped_conversation_reuses_what_was_read(talkative, stdin, capsys):
    result, streams = talk(talkative, stdin, capsys, "hello", "and?")
    assert result == {"turns": 2}
    first, second = [line for line in streams.err.splitlines() if line.startswith("[context")]
    assert "reused 0 of" in first
    prompt = int(first.split("reused 0 of ")[1].split(",")[0])
    assert f"reused {prompt + 11} of" in second  # the prompt and the answer but its last token


def test_undo_retry_and_save(talkative, stdin, capsys, tmp_path):
    saved = tmp_path / "chat.jsonl"
    talk(talkative, stdin, capsys, "one", "two", "/undo", "three", "/retry", f"/save {saved}")
    messages = json.loads(saved.read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["one", "three"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2


def test_save_overwrites_nothing(talkative, stdin, capsys, tmp_path):
    saved = tmp_path / "chat.jsonl"
    saved.write_text("mine")
    with pytest.raises(SettingsError, match="exists already"):
        talk(talkative, stdin, capsys, "one", f"/save {saved}")
    assert saved.read_text() == "mine"


def test_a_file_is_read_with_the_next_question_and_undone_alone(talkative, stdin, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("apples")
    saved = tmp_path / "chat.jsonl"
    lines = [f"/file {tmp_path}/a.txt", "one", f"/file {tmp_path}/a.txt", "/undo", "two", f"/save {saved}"]
    talk(talkative, stdin, capsys, *lines)
    users = [m["content"] for m in json.loads(saved.read_text())["messages"] if m["role"] == "user"]
    assert users == ["File: a.txt\n\napples\n\none", "two"]


def test_a_file_that_is_too_long_is_not_attached(talkative, stdin, capsys, tmp_path):
    (tmp_path / "book.txt").write_text("the mill " * 3000)
    with pytest.raises(SettingsError, match="the context has 4,096"):
        talk(talkative, stdin, capsys, f"/file {tmp_path}/book.txt")


def test_a_system_message_can_be_set_and_removed(talkative, stdin, capsys, tmp_path):
    saved = [tmp_path / "with.jsonl", tmp_path / "without.jsonl"]
    lines = ["/system be brief", "one", f"/save {saved[0]}", "/system", "two", f"/save {saved[1]}"]
    talk(talkative, stdin, capsys, *lines)
    first, second = (json.loads(path.read_text())["messages"] for path in saved)
    assert first[0] == {"role": "system", "content": "be brief"}
    assert second[0]["role"] == "user"


def test_a_block_of_lines_is_one_question(talkative, stdin, capsys, tmp_path):
    saved = tmp_path / "chat.jsonl"
    talk(talkative, stdin, capsys, '"""/not a command', "second", 'third"""', f"/save {saved}")
    assert json.loads(saved.read_text())["messages"][0]["content"] == "/not a command\nsecond\nthird"


def test_stats_and_help_are_told(talkative, stdin, capsys):
    _, streams = talk(talkative, stdin, capsys, "/help", "hello", "/stats", "/quit", "never asked")
    assert "/retry" in streams.err
    assert "KV " in streams.err
    assert streams.err.count("[context") == 1


def test_an_unknown_command_is_told_and_not_sent(talkative, stdin, capsys):
    with pytest.raises(SettingsError, match="did you mean /stats"):
        talk(talkative, stdin, capsys, "/stat")


def test_a_process_without_a_terminal_prints_one_object(talkative, tmp_path):
    (tmp_path / "notes.txt").write_text("the miller slept")
    arguments = ["-m", talkative, "-p", "-", "-f", tmp_path / "notes.txt", "--json", "--max-new-tokens", "5"]
    done = subprocess.run(
        [sys.executable, "-m", "longlora_cli", "chat", *map(str, arguments)],
        input="who slept?",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert {"text", "prompt_tokens", "new_tokens", "reused_tokens", "timings", "kv_bytes", "finish"} <= set(
        json.loads(line)
    )


def spawn(folder, *arguments):
    child = pexpect.spawn(
        sys.executable,
        ["-m", "longlora_cli", "chat", "-m", str(folder), *map(str, arguments)],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "200"},
        encoding="utf-8",
        timeout=60,
        dimensions=(40, 200),
    )
    child.expect("> ")
    return child


def test_ctrl_c_in_a_terminal_stops_the_answer_and_keeps_the_conversation(talkative, tmp_path):
    (tmp_path / "book.txt").write_text("the mill " * 300)
    child = spawn(talkative, "--max-new-tokens", "2500", "-f", tmp_path / "book.txt")
    child.sendline("hello")
    child.expect("Reading")
    child.expect_exact("\x1b[?25h")  # the bar gives the cursor back when the answer begins
    child.sendintr()
    child.expect(r"(\d+) new at .* tok/s, stopped\]")
    assert 0 < int(child.match[1].replace(",", "")) < 2500
    child.expect("> ")
    child.sendline(f"/save {tmp_path}/chat.jsonl")
    child.expect("2 messages")
    child.sendintr()
    child.expect("Ctrl-C again")
    child.expect("> ")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
    assert json.loads((tmp_path / "chat.jsonl").read_text())["messages"][1]["content"]


def test_a_long_line_arrives_whole_in_a_terminal_and_ctrl_d_leaves(talkative):
    """A terminal that edits lines itself keeps 4,095 bytes; these 6,000 letters are more tokens than fit."""
    from transformers import AutoTokenizer

    child = spawn(talkative)
    line = "xq" * 3000
    tokenizer = AutoTokenizer.from_pretrained(talkative)
    tokens = len(encode_prompt(tokenizer, [{"role": "user", "content": line}]))
    assert tokens > 4096
    child.sendline(line)
    child.expect(f"the prompt has {tokens:,} tokens")
    child.expect("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_fewer_bits_are_told_with_their_bytes_and_what_they_change(talkative, tmp_path, capsys):
    (tmp_path / "note.txt").write_text("the mill by the river " * 60)
    asked = {"prompt": "who?", "file": [tmp_path / "note.txt"]}
    planned = chat(talkative, dry_run=True, kv_bits=8, **asked)
    full, found = chat(talkative, **asked), chat(talkative, kv_bits=8, **asked)
    assert (found["kv_bits"], planned["kv_bits"], full["kv_bits"]) == (8, 8, 16)
    assert full["prompt_tokens"] > 256
    assert found["kv_bytes"] < full["kv_bytes"]
    # The plan counts the last token of the answer too, which is never run.
    assert found["kv_bytes"] == planned["kv_bytes"] - full["kv_bytes"] // (full["prompt_tokens"] + 11)
    assert full["kv_divergence"] is None
    assert 0 < found["kv_divergence"]["kl"] < 1e-3
    assert "KV in 8 bits: KL" in capsys.readouterr().err


def test_stats_tell_the_bits_and_bytes_of_a_token(talkative, stdin, capsys):
    stdin(b"hello\n/stats\n")
    chat(talkative, kv_bits=4)
    told = capsys.readouterr().err
    # 128 numbers: half a byte each and 48 bytes of scales and offsets, in place of 4 bytes each.
    assert "0.1 KiB a token, in 4 bits" in told


def test_a_command_line_takes_the_bits(talkative, capsys):
    assert exit_code("-m", talkative, "-p", "hi", "--kv-bits", "8", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kv_bits"] == 8
    assert exit_code("-m", talkative, "-p", "hi", "--kv-bits", "7", "--dry-run") == 2
    assert "--kv-bits" in capsys.readouterr().err
