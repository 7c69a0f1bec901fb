"""Printing: results on standard output, everything else on standard error, nothing that drives a terminal."""

from __future__ import annotations

import json
import logging

import pytest

from longlora_cli.console import Console, printable, show_log


def test_control_characters_never_reach_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b]52;c;ZXZpbA==\x07b\x1b[2Jc\x9b31md\rtab\tnew\nline"
    console = Console()
    console.print(hostile)
    console.stream(hostile)
    console.table("t", ["x"], [[hostile]])
    console.warn(hostile)
    console.error([hostile], 2)
    out, err = capsys.readouterr()
    assert not set(out + err) & {"\x1b", "\x07", "\x9b", "\r"}
    assert printable(hostile) == "a]52;c;ZXZpbA==b[2Jc31mdtab\tnew\nline"


def test_markup_in_a_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Console().print("[/foo] [bold]x[/bold] :smile:")
    assert capsys.readouterr().out == "[/foo] [bold]x[/bold] :smile:\n"


def test_json_mode_leaves_one_object_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(json_mode=True)
    console.print("seen by people")
    console.table("t", ["x"], [[1]])
    console.stream("streamed")
    console.result({"text": "quiet \x9b and é"})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"text": "quiet \x9b and é"}
    assert "\x9b" not in out
    assert "seen by people" in err


def test_an_error_is_what_rule_and_hint(capsys: pytest.CaptureFixture[str]) -> None:
    Console(json_mode=True).error(["what", "rule", "hint"], 4)
    out, err = capsys.readouterr()
    assert err == "longlora: error: what\n  rule\n  hint\n"
    assert json.loads(out) == {"error": "what", "details": ["rule", "hint"], "exit_code": 4}


def test_only_the_first_process_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    console = Console()
    console.print("x")
    console.warn("x")
    console.error(["x"], 1)
    console.result({"x": 1})
    with console.progress("x", 3) as advance:
        advance(1)
    assert capsys.readouterr() == ("", "")


def test_numbers_are_grouped_and_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table("counts", ["what", "n"], [["tokens", 1234567], ["share", 0.25]])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("1,234,567") for line in lines)
    assert any(line.endswith("     0.25") for line in lines)


def test_what_the_core_logs_is_printed_only_while_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("longlora")
    level, handlers = logger.level, list(logger.handlers)
    with show_log(Console()):
        logger.info("attention: cudnn")
    logger.info("later")
    assert capsys.readouterr().out == "attention: cudnn\n"
    assert (logger.level, logger.handlers) == (level, handlers)
