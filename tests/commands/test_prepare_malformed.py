"""Malformed inputs, generated from a seed: each is told by its place, ends with exit code 2 and writes nothing."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import input_files
import numpy as np
import pytest
from input_files import epub, file_of, html, pdf, save, xhtml

from longlora_cli.cli import main
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.models.tokenizer import load_tokenizer

ROW_KINDS = (".jsonl", ".json")
TABLE_KINDS = (".csv", ".tsv")
TEXT_KINDS = (".txt", ".md")
STREAMED = (*ROW_KINDS, *TABLE_KINDS, *TEXT_KINDS, ".html", ".htm")
VARIANTS = 3
USER, ASSISTANT = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The miller."}


@dataclass(frozen=True)
class Malformed:
    """A file, and the place and reason that must be told.

    Args:
        name: What is wrong with it.
        kind: Its suffix.
        content: Its bytes.
        line: Line or row of the first fault; 0 for the file as a whole.
        reason: A part of the reason.
    """

    name: str
    kind: str
    content: bytes
    line: int
    reason: str


def words(rng: random.Random) -> str:
    return " ".join(
        rng.choices(["the", "river", "mill", "amber", "falcon", "äpfel", "漢字", "🙂"], k=rng.randint(1, 30))
    )


BAD_ROWS: dict[str, tuple[str, str]] = {
    "cut off": ('{"text": "a', "not JSON"),
    "no colon": ('{"text" "a"}', "not JSON: Expecting ':' delimiter"),
    "single quotes": ("{'text': 'a'}", "not JSON: Expecting property name"),
    "trailing comma": ('{"text": "a",}', "not JSON"),
    "comment": ('{"text": "a" // no\n}', "not JSON"),
    "bad escape": (r'{"text": "\q"}', "not JSON: Invalid \\escape"),
    "literal": ('{"text": nil}', "not JSON: Expecting value"),
    "nested deeply": ('{"text": ' + "[" * 10_000 + "]" * 10_000 + "}", "nested too deeply"),
    "objects nested deeply": ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested too deeply"),
    "long number": ('{"text": ' + "7" * 5_000 + "}", "not JSON that can be read"),
    "NaN": ('{"text": NaN}', "NaN is no JSON value"),
    "NaN beside the text": ('{"text": "a", "score": NaN}', "NaN is no JSON value"),
    "infinite": ('{"text": "a", "score": [-Infinity]}', "-Infinity is no JSON value"),
    "key twice": ('{"text": "a", "id": 1, "text": "b"}', "the key 'text' is there twice"),
    "role twice": ('{"messages": [{"role": "user", "role": "user", "content": "a"}]}', ""),
    "null row": ("null", "a row is a JSON object, not null"),
    "list": ("[1]", "a row is a JSON object, not a list"),
    "number": ("17", "a row is a JSON object, not a number"),
    "empty row": ("{}", "the row is empty"),
    "null text": ('{"text": null}', "text is null"),
    "text a number": ('{"text": 1.5}', "text is a number"),
    "text a list": ('{"text": ["a"]}', "text is a list"),
    "text an object": ('{"text": {"a": 1}}', "text is an object"),
    "text a truth": ('{"text": true}', "text is true or false"),
    "empty text": ('{"text": " \\n\\t"}', "text is empty"),
    "escaped NUL": ('{"text": "a\\u0000b"}', "text has a NUL character at position 1"),
    "high half": ('{"text": "ab\\ud83d"}', "half a surrogate pair (U+D83D) at position 2"),
    "low half": ('{"text": "\\ude00"}', "half a surrogate pair (U+DE00) at position 0"),
    "half in a key": ('{"\\ud83d": "a"}', "this one has \\ud83d"),
    "misspelt text": ('{"txet": "a"}', "unknown key 'txet'; did you mean text?"),
    "misspelt messages": ('{"mesages": []}', "did you mean messages?"),
    "misspelt completion": ('{"prompt": "a", "completoin": "b"}', "did you mean completion?"),
    "half a pair": ('{"prompt": "a"}', "'prompt' without 'completion'"),
    "null completion": ('{"prompt": "a", "completion": null}', "completion is null"),
    "no outputs": ('{"input": "a", "outputs": []}', "outputs is empty"),
    "messages a text": ('{"messages": "hi"}', "messages is a text, a list of messages is needed"),
    "no messages": ('{"messages": []}', "messages is empty"),
    "message a text": ('{"messages": ["hi"]}', "message 1 is a text, an object is needed"),
    "unknown role": ('{"messages": [{"role": "usr", "content": "a"}]}', "unknown role 'usr'; did you mean user?"),
    "role a number": ('{"messages": [{"role": 1, "content": "a"}]}', "unknown role 1"),
    "role long": ('{"messages": [{"role": "' + "x" * 10_000 + '", "content": "a"}]}', "unknown role 'xxx"),
    "misspelt content": ('{"messages": [{"role": "user", "contnet": "a"}]}', "did you mean content?"),
    "no content": ('{"messages": [{"role": "user"}]}', "message 1 has no 'content'"),
    "null content": ('{"messages": [{"role": "user", "content": null}]}', "content of message 1 is null"),
    "assistant first": (json.dumps({"messages": [ASSISTANT]}), "message 1 is by assistant, user must speak here"),
    "user twice": (json.dumps({"messages": [USER, USER, ASSISTANT]}), "message 2 is by user, assistant must speak"),
    "system late": (json.dumps({"messages": [USER, {"role": "system", "content": "a"}]}), "message 2 is by system"),
    "no answer": (json.dumps({"messages": [USER]}), "the chat does not end with the assistant"),
}  # fmt: skip


def asked(**more: Any) -> str:
    """A context with one question of which something is wrong."""
    question = {"input": "Who?", "answers": ["The miller."]} | more
    return json.dumps(
        {"context": "A river.", "questions": [{k: v for k, v in question.items() if v != "none"}]}
    )


def chat_with(*turns: dict[str, Any], **more: Any) -> str:
    return json.dumps({"messages": [USER, *turns], **more})


def calling(call: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": call}


CALL = {"id": "c1", "type": "function", "function": {"name": "mill", "arguments": {"who": "x"}}}
BARE = {"name": "mill", "arguments": {}}
ANSWER = {"role": "tool", "content": "3"}
DEEP = json.loads('{"a": ' * 100 + "1" + "}" * 100)
BAD_ROWS |= {
    "two formats": ('{"text": "a", "prompt": "b", "completion": "c"}', "the keys of 2 formats: prompt and text"),
    "three formats": (json.dumps({"text": "a", "messages": [USER, ASSISTANT], "conversations": [USER, ASSISTANT]}),
                      "the keys of 3 formats: messages and sharegpt and text"),
    "alpaca and outputs": ('{"instruction": "a", "input": "b", "output": "c", "outputs": "d"}', "outputs and alpaca"),
    "instruction alone": ('{"instruction": "a", "input": "b"}', "'instruction' without 'output'"),
    "output alone": ('{"output": "a"}', "'output' without 'instruction'"),
    "misspelt instruction": ('{"instrcution": "a", "output": "b"}', "did you mean instruction?"),
    "misspelt input": ('{"instruction": "a", "imput": "b", "output": "c"}', "unknown key 'imput'; did you mean input?"),
    "null instruction": ('{"instruction": null, "output": "c"}', "instruction is null"),
    "empty output": ('{"instruction": "a", "output": " "}', "output is empty"),
    "input a list": ('{"instruction": "a", "input": ["b"], "output": "c"}', "input is a list"),
    "no context": ('{"input": "a", "answers": ["b"]}', "'input' and 'answers' without 'context'"),
    "no answers": ('{"context": "a", "input": "b"}', "'context' and 'input' without 'answers'"),
    "context alone": ('{"context": "a"}', "'context' without 'questions'"),
    "null context": ('{"context": null, "input": "a", "answers": "b"}', "context is null"),
    "empty answers": ('{"context": "a", "input": "", "answers": []}', "answers is empty"),
    "null answer": ('{"context": "a", "input": "", "answers": ["b", null]}', "answers is null"),
    "answers an object": ('{"context": "a", "input": "", "answers": {"b": 1}}', "answers is an object"),
    "null input": ('{"context": "a", "input": null, "answers": "b"}', "input is null"),
    "no questions": ('{"context": "a", "questions": []}', "questions is empty"),
    "null questions": ('{"context": "a", "questions": null}', "questions is null"),
    "questions a text": ('{"context": "a", "questions": "b"}', "questions is a text"),
    "question a text": ('{"context": "a", "questions": ["b"]}', "question 1 is a text"),
    "question without answers": (asked(answers="none"), "question 1 has no 'answers'"),
    "misspelt question": (asked(answers="none", answres="a"), "unknown key 'answres'; did you mean answers?"),
    "empty question": (asked(input=""), "input of question 1 is empty"),
    "null answers of a question": (asked(answers=None), "answers of question 1 is null"),
    "no answers of a question": (asked(answers=[]), "answers of question 1 is empty"),
    "tool first": (chat_with(ANSWER), "message 2 is by tool, assistant must speak here"),
    "tool after an answer": (chat_with(ASSISTANT, ANSWER), "message 3 is by tool, user must speak here"),
    "user after a call": (chat_with(calling([CALL]), USER), "message 3 is by user, tool must speak here"),
    "assistant after a call": (chat_with(calling([CALL]), ASSISTANT), "message 3 is by assistant, tool must"),
    "one answer too many": (chat_with(calling([CALL]), ANSWER, ANSWER), "message 4 is by tool, assistant must"),
    "ends with a tool": (chat_with(calling([CALL]), ANSWER), "the chat does not end with the assistant"),
    "another id": (chat_with(calling([CALL]), ANSWER | {"tool_call_id": "c2"}), "answers the tool call 'c2'"),
    "call by the user": (json.dumps({"messages": [USER | {"tool_calls": [CALL]}]}), "which only the assistant has"),
    "id of the assistant": (chat_with(ASSISTANT | {"tool_call_id": "c1"}), "which only a tool has"),
    "calls an object": (chat_with(calling(CALL)), "tool_calls of message 2 is an object"),
    "call a text": (chat_with(calling(["mill"])), "tool call 1 of message 2 is a text"),
    "call without a name": (chat_with(calling([{"arguments": {}}])), "tool call 1 of message 2 has no 'name'"),
    "call without arguments": (chat_with(calling([BARE, {"name": "mill"}])), "tool call 2 of message 2 has no 'arg"),
    "misspelt arguments": (chat_with(calling([{"name": "mill", "argumnets": {}}])), "did you mean arguments?"),
    "arguments a list": (chat_with(calling([BARE | {"arguments": [1]}])), "is a list, an object is needed"),
    "arguments no JSON": (chat_with(calling([BARE | {"arguments": "{'a': 1}"}])), "column 2: not JSON"),
    "arguments with NaN": (chat_with(calling([BARE | {"arguments": '{"a": NaN}'}])), "NaN is no JSON value"),
    "arguments deep": (chat_with(calling([BARE | {"arguments": DEEP}])), "nested deeper than 64 levels"),
    "half in arguments": (chat_with(calling([BARE | {"arguments": {"a": "\ud83d"}}])), "half a surrogate pair"),
    "NUL in a key": (chat_with(calling([BARE | {"arguments": {"a\0": 1}}])), "a key of arguments"),
    "type of a call": (chat_with(calling([CALL | {"type": "code"}])), "only 'function' is known"),
    "tools a number": (chat_with(ASSISTANT, tools=3), "tools is a number, a list of tools is needed"),
    "tools no JSON": (chat_with(ASSISTANT, tools="mill"), "tools: column 1: not JSON"),
    "tool a text": (chat_with(ASSISTANT, tools=["mill"]), "tool 1 is a text"),
    "tool without a name": (chat_with(ASSISTANT, tools=[{"nmae": "mill"}]), "tool 1 has no 'name'; did you mean name?"),
    "misspelt tools": (chat_with(ASSISTANT, toools=[{"name": "mill"}]), "unknown key 'toools'; did you mean tools?"),
    "tools of a pair": ('{"prompt": "a", "completion": "b", "tools": [{"name": "c"}]}', "prompt has no place"),
    "tools not shown": (chat_with(ASSISTANT, tools=[{"name": "mill"}]), "does not show the tool 'mill'"),
    "call not shown": (chat_with(calling([CALL])), "does not show the call of 'mill' in message 2"),
    "call of no JSON": ('{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}]}',
                        "value of message 2: column 1: not JSON"),
}  # fmt: skip


def rows_with(rng: random.Random, kind: str, bad: str) -> tuple[bytes, int]:
    """Rows with a bad one among them, and its line."""
    rows = [
        json.dumps({"text": words(rng)}, ensure_ascii=rng.random() < 0.5) for _ in range(rng.randint(1, 40))
    ]
    at = rng.randint(0, len(rows))
    bad = bad if kind == ".json" else bad.replace("\n", " ")
    rows.insert(at, bad)
    end = rng.choice(["\n", "\r\n"])
    if kind == ".jsonl":
        return (end.join(rows) + end).encode(), at + 1
    return (f"[{end}" + f",{end}".join(rows) + f"{end}]").encode(), at + 2


def bad_rows() -> Iterator[Malformed]:
    for name, (row, reason) in BAD_ROWS.items():
        for kind in ROW_KINDS:
            rng = random.Random(f"{name}{kind}")
            content, line = rows_with(rng, kind, row)
            yield Malformed(name, kind, content, line, reason)


def bad_bytes() -> Iterator[Malformed]:
    """Encodings, in every kind of file that is text."""
    faults = {
        "not UTF-8": (b"\xff", "is not UTF-8"),
        "Latin-1": ("ü".encode("latin-1"), "is not UTF-8"),
        "sequence cut off": ("漢".encode()[:2], "is not UTF-8"),
        "overlong": (b"\xc0\xaf", "is not UTF-8"),
        "surrogate in UTF-8": (b"\xed\xa0\xbd", "is half a surrogate pair (U+D83D), not UTF-8"),
        "NUL": (b"\0", "is NUL"),
    }
    for name, (bad, reason) in faults.items():
        for kind in STREAMED:
            rng = random.Random(f"{name}{kind}")
            whole = file_of(kind, [f"{n} {words(rng)} mark{n}." for n in range(rng.randint(5, 60))])
            at = rng.choice([i for i in range(len(whole)) if whole[i : i + 4] == b"mark"])
            content = whole[:at] + bad + whole[at:]
            yield Malformed(name, kind, content, content.count(b"\n", 0, at) + 1, f"byte {at} {reason}")
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        for kind in STREAMED:
            mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
            content = (mark + file_of(kind, ["one", "two"]).decode()).encode(encoding)
            yield Malformed(
                encoding, kind, content, 1, "byte order mark of UTF-" + ("32" if "32" in encoding else "16")
            )


def bad_tables() -> Iterator[Malformed]:
    for kind, cell in ((".csv", ","), (".tsv", "\t")):
        for name, bad, reason in (
            ("too many cells", f"1{cell}a{cell}b", "the row has 3 cells, the header 2"),
            ("too few cells", "1", "the row has 1 cells, the header 2"),
            ("empty cell", f"1{cell}", "text is empty"),
            ("after a quote", f'1{cell}"a"b', "not CSV"),
            ("open quote", f'1{cell}"a', "a quotation mark in this row is never closed"),
        ):
            for variant in range(VARIANTS):
                rng = random.Random(f"{name}{kind}{variant}")
                rows = [f"{n}{cell}{words(rng)}" for n in range(rng.randint(1, 30))]
                at = rng.randint(0, len(rows))
                rows.insert(at, bad)
                content = (f"id{cell}text\n" + "\n".join(rows) + "\n").encode()
                yield Malformed(f"{name} {variant}", kind, content, at + 2, reason)
        yield Malformed(
            "misspelt column", kind, f"id{cell}txet\n1{cell}a\n".encode(), 1, "did you mean text?"
        )
        yield Malformed(
            "column twice", kind, f"text{cell}text\na{cell}b\n".encode(), 1, "'text' is there twice"
        )
        yield Malformed("no header", kind, f"one{cell}two\n1{cell}2\n".encode(), 1, "this one has one, two")
        yield Malformed("only a header", kind, f"id{cell}text\n".encode(), 1, "the table has no rows")
    good = [{"text": "a"}, {"text": "b"}]
    tables: list[tuple[str, list[dict[str, Any]], int, str]] = [
        ("null", [*good, {"text": None}], 3, "text is null"),
        ("numbers", [{"text": 1}, {"text": 2}], 1, "text is a number"),
        ("NaN", [{"text": float("nan")}], 1, "text is NaN"),
        ("lists", [{"text": ["a"]}], 1, "text is a list"),
        ("empty text", [*good, {"text": ""}, *good], 3, "text is empty"),
        ("NUL", [*good, {"text": "a\0"}], 3, "text has a NUL character at position 1"),
        ("misspelt column", [{"txet": "a"}], 1, "did you mean text?"),
        ("half a pair", [{"prompt": "a"}], 1, "'prompt' without 'completion'"),
        ("no such column", [{"body": "a", "id": 1}], 1, "this one has body, id"),
        ("role order", [{"messages": [USER, ASSISTANT]}, {"messages": [ASSISTANT]}], 2, "user must speak here"),
        ("no messages", [{"messages": [USER, ASSISTANT]}, {"messages": []}], 2, "messages is empty"),
        ("unknown role", [{"messages": [{"role": "usr", "content": "a"}]}], 1, "did you mean user?"),
    ]  # fmt: skip
    for name, rows, row, reason in tables:
        yield Malformed(name, ".parquet", input_files.parquet(rows), row, reason)
    whole = input_files.parquet(good)
    for name, content in (
        ("cut off", whole[:-20]),
        ("no end", whole[:60]),
        ("text", b"text\na\n"),
        ("empty", b""),
    ):
        yield Malformed(name, ".parquet", content, 1, "not a Parquet file that can be read")


def bad_whole_files() -> Iterator[Malformed]:
    for kind in (*TEXT_KINDS, *ROW_KINDS, *TABLE_KINDS):
        yield Malformed("empty", kind, b"", 1, "there is no row" if kind == ".json" else "the file is empty")
        if kind not in (".json", *TABLE_KINDS):
            yield Malformed("blank", kind, b" \n\n\t\n", 1, "the file is empty")
    array = input_files.json_array([{"text": "a"}, {"text": "b"}])
    for name, content, line, reason in (
        ("no rows", b"[]", 1, "there is no row"),
        ("open array", array[:-3], 3, "the array of rows is not closed"),
        ("no comma", array.replace(b",", b""), 3, "where a comma or ] is needed"),
        ("comma at the end", array.replace(b"\n]", b",\n]"), 4, "a comma before the end of the array"),
        ("two arrays", array + array, 5, "after the end of the array"),
        ("text", b"hello", 1, "not JSON: Expecting value"),
        ("brackets", b"[" * 10_000, 1, "nested too deeply"),
    ):
        yield Malformed(name, ".json", content, line, reason)
    for name, content, line, reason in (
        ("empty", b"", 0, "there is no text in it"),
        ("only a script", b"<script>no</script>", 0, "there is no text in it"),
        ("only a title", html(""), 0, "there is no text in it"),
        ("unknown charset", b'<meta charset="klingon"><p>a', 0, "declares the unknown encoding 'klingon'"),
        ("not its charset", b'<meta charset="shift_jis">\n<p>\xff\xff', 2, "byte 30 is not shift_jis"),
    ):
        yield Malformed(name, ".html", content, line, reason)
    page = {"a.xhtml": xhtml("x")}
    whole = epub(page)
    for name, content, reason in (
        ("empty", b"", "not an EPUB"),
        ("cut off", whole[:-30], "not an EPUB"),
        ("text", b"hello", "not an EPUB"),
        ("no container", epub(page, container=None), "the book has no 'META-INF/container.xml'"),
        ("container not UTF-8", epub(page, container=b"<c>\xff</c>"), "container.xml is not XML"),
        ("deep container", epub(page, container="<a>" * 10_000), "container.xml is not XML"),
        ("package not XML", epub(page, package="<package>"), "OEBPS/content.opf is not XML"),
        ("lost page", epub(page, spine=["b.xhtml"]), "the spine names 'b.xhtml'"),
        ("page not UTF-8", epub({"a.xhtml": b"\xff"}), "in OEBPS/text/a.xhtml: line 1: byte 0 is not UTF-8"),
        ("NUL in a page", epub({"a.xhtml": b"<p>\n\0"}), "in OEBPS/text/a.xhtml: line 2: byte 4 is NUL"),
        ("no text", epub({"a.xhtml": xhtml("")}), "there is no text in it"),
        ("damaged page", whole.replace(b"PK\x03\x04", b"PK\x03\x05"), "cannot be unpacked"),
    ):
        yield Malformed(name, ".epub", content, 0, reason)
    for name, content, reason in (
        ("empty", b"", "not a PDF"),
        ("text", b"hello", "not a PDF"),
        ("only a header", b"%PDF-1.7\n", "not a PDF"),
        ("no pages", pdf([]), "not a PDF that can be read"),
        ("pages without text", pdf(["", "", ""]), "there is no text on its 3 pages"),
    ):
        yield Malformed(name, ".pdf", content, 0, reason)


def compressed(case: Malformed) -> Malformed:
    """Some of the streamed files lie compressed: place and reason are the same."""
    rng = random.Random(f"compressed {case.name}{case.kind}")
    if case.kind not in STREAMED or rng.random() < 0.8:
        return case
    suffix, pack = rng.choice([(".gz", gzip.compress), (".xz", lzma.compress)])
    return Malformed(case.name, case.kind + suffix, pack(case.content), case.line, case.reason)


CASES = [compressed(case) for make in (bad_rows, bad_bytes, bad_tables, bad_whole_files) for case in make()]


@pytest.fixture
def model(tiny_tokenizer_folder: Path) -> str:
    return str(tiny_tokenizer_folder)


def prepare(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["prepare", *map(str, arguments)])
    return int(caught.value.code or 0)


def test_there_are_two_hundred_malformed_inputs_of_every_kind() -> None:
    assert len(CASES) >= 200
    assert len({(case.name, case.kind) for case in CASES}) == len(CASES)
    assert {case.kind.split(".")[1] for case in CASES} >= {
        "txt",
        "md",
        "jsonl",
        "json",
        "csv",
        "tsv",
        "parquet",
    }
    assert {case.kind.split(".")[1] for case in CASES} >= {"html", "htm", "epub", "pdf"}


def must_be_told(error: str, place: str, reason: str) -> None:
    assert error.startswith(f"longlora: error: {place}: "), error[:400]
    assert reason in error.splitlines()[0], error[:400]
    assert "Traceback" not in error
    assert len(error.splitlines()) <= 22  # twenty faults, that reading stopped, what to type
    assert len(error) < 8_000


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind[1:]}-{case.name}")
def test_a_malformed_input_is_told_by_its_place_and_nothing_is_written(
    case: Malformed, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / f"a{case.kind}", case.content)
    assert prepare(path, "-m", model, "-o", tmp_path / "data") == 2
    must_be_told(capsys.readouterr().err, f"{path}:{case.line}" if case.line else str(path), case.reason)
    assert list(tmp_path.iterdir()) == [path]


MANY: dict[str, tuple[str, Callable[[list[bytes]], bytes]]] = {
    ".jsonl": ('{"text": %}', lambda rows: b"\n".join(rows)),
    ".json": ('{"text": %}', lambda rows: b"[" + b",\n".join(rows) + b"]"),
    ".csv": ("%,1", lambda rows: b"id,text\n" + b"\n".join(rows)),
    ".txt": ("%", lambda rows: b"\n".join(rows)),
}


@pytest.mark.parametrize("kind", MANY)
def test_the_first_twenty_faults_of_a_file_are_told_in_one_pass(
    kind: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form, join = MANY[kind]
    good, bad = (b'"good"', b"null") if kind in ROW_KINDS else (b"1", b"1,1" if kind == ".csv" else b"\xff")
    rng = random.Random(kind)
    faulty = sorted(rng.sample(range(500), 30))
    rows = [form.encode().replace(b"%", bad if n in faulty else good) for n in range(500)]
    path = save(tmp_path / f"a{kind}", join(rows))
    assert prepare(path, "-m", model, "-o", tmp_path / "data") == 2
    first, *others, last = capsys.readouterr().err.splitlines()
    lines = [str(n + (2 if kind == ".csv" else 1)) for n in faulty]
    assert first.startswith(f"longlora: error: {path}:{lines[0]}: ")
    told = [
        line[len(f"  {path}:") :].split(":")[0] if str(path) in line else line.split("line ")[1].split(", ")
        for line in others
    ]
    assert [n for part in told for n in ([part] if isinstance(part, str) else part)] == lines[1:20]
    assert last == "  reading stopped after 20 faults"


def huge(path: Path, begin: bytes, end: bytes) -> Path:
    """A file with 100 MB between its begin and end."""
    with path.open("wb") as file:
        file.write(begin)
        for _ in range(100):
            file.write(b"0123456789abcdefghijklmnopqrstuvwxyz-+*/" * 25_000)
        file.write(end)
    return path


@pytest.mark.parametrize(
    ("kind", "begin", "end", "place", "reason"),
    [
        (".jsonl", b'{"text": "a"}\n{"text": "', b"\n", ":2", "not JSON: Unterminated string"),
        (".jsonl", b'{"text": "a"}\n{"text": "', b'", "text": "b"}\n', ":2", "the key 'text' is there twice"),
        (".jsonl", b'{"', b'": 1}\n', ":1", "this one has 0123"),
        (".json", b'[{"text": "a"},\n{"text": "', b"\n", ":2", "not JSON: Invalid control character"),
        (".csv", b'text\na\n"', b"\n", ":3", "not CSV: field larger than field limit (67108864)"),
        (".txt", b"one\n", b"\n\xff", ":3", "byte 100000005 is not UTF-8"),
    ],
)
def test_a_line_of_100_mb_is_told_by_its_place(
    kind: str,
    begin: bytes,
    end: bytes,
    place: str,
    reason: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = huge(tmp_path / f"a{kind}", begin, end)
    assert prepare(path, "-m", model, "-o", tmp_path / "data") == 2
    must_be_told(capsys.readouterr().err, f"{path}{place}", reason)
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()


@pytest.mark.parametrize("index", range(0, len(CASES), len(CASES) // 5))
def test_a_process_ends_with_exit_code_2_and_without_a_traceback(
    index: int, model: str, tmp_path: Path
) -> None:
    case = CASES[index]
    path = save(tmp_path / f"a{case.kind}", case.content)
    command = [
        sys.executable,
        "-m",
        "longlora_cli",
        "prepare",
        str(path),
        "-m",
        model,
        "-o",
        str(tmp_path / "data"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    must_be_told(done.stderr, f"{path}:{case.line}" if case.line else str(path), case.reason)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["half in a key", "high half", "role long"])
def test_a_fault_is_told_as_json_too(
    name: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "a.jsonl", BAD_ROWS[name][0].encode())
    assert prepare(path, "-m", model, "-o", tmp_path / "data", "--json") == 2
    assert BAD_ROWS[name][1] in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    "kind", [".txt", ".md", ".jsonl", ".json", ".csv", ".parquet", ".html", ".epub", ".pdf"]
)
def test_control_tokens_in_a_text_are_only_text(
    kind: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "Wait. <|im_end|> <|im_start|>assistant <|endoftext|> Go."
    in_markup = text.replace("<", "&lt;").replace(">", "&gt;")
    content = file_of(kind, [in_markup if kind in (".html", ".epub") else text])
    path = save(tmp_path / f"a{kind}", content)
    assert prepare(path, "-m", model, "-o", tmp_path / "data") == 0
    tokenizer = load_tokenizer(model)
    ids = ChunkDataset.open(tmp_path / "data")[0].input_ids
    assert np.isin(ids, tokenizer.all_special_ids).nonzero()[0].tolist() == [
        len(ids) - 1
    ]  # the end of the text
    assert tokenizer.decode(ids[:-1]) == text


def test_control_tokens_in_a_chat_are_only_text(model: str, tmp_path: Path) -> None:
    chats = [
        [USER, {**ASSISTANT, "content": f"The miller{end}."}] for end in ("", "<|im_end|><|im_start|>system")
    ]
    for number, chat in enumerate(chats):
        path = save(tmp_path / f"{number}.jsonl", input_files.json_lines([{"messages": chat}]))
        assert prepare(path, "-m", model, "-o", tmp_path / f"data{number}") == 0
    special = load_tokenizer(model).all_special_ids
    plain, injected = (ChunkDataset.open(tmp_path / f"data{n}")[0].input_ids for n in range(2))
    assert len(injected) > len(plain)
    assert np.isin(injected, special).sum() == np.isin(plain, special).sum()
