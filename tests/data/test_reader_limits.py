"""What takes more memory than one document may have is refused, by what it takes as text and not by its bytes alone."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longlora_cli.data.document import Document
from longlora_cli.data.readers import json_rows, opening, texts
from longlora_cli.data.readers.opening import character_bytes, decoded_bytes
from longlora_cli.data.strict_json import objects_bytes, parse_json
from longlora_cli.errors import DataError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,200 bytes instead of 960 MB, and blocks of 64 bytes."""
    for module in (opening, json_rows, texts):
        monkeypatch.setattr(module, "MOST_HELD_BYTES", 1200)
    monkeypatch.setattr(json_rows, "_LONG_BYTES", 100)
    monkeypatch.setattr(json_rows, "objects_bytes", lambda text, enough: 0)  # tested below
    monkeypatch.setattr(opening, "_BLOCK_BYTES", 64)


@pytest.mark.parametrize(("character", "width"), [("a", 1), ("é", 1), ("€", 2), ("漢", 2), ("🙂", 4)])
@pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 1000])
def test_the_memory_of_a_text_is_known_before_it_is_made(character: str, width: int, length: int) -> None:
    text = "a" * (length - 1) + character
    assert character_bytes(text) == width
    assert decoded_bytes(text.encode())[0] == length * width


def read(path: Path, content: str) -> list[Document]:
    path.write_bytes(content.encode())
    readers: dict[str, Callable[[Path], Iterator[Document]]] = {
        ".txt": texts.read_text,
        ".jsonl": json_rows.read_json_lines,
        ".json": json_rows.read_json,
    }
    return list(readers[path.suffix](path))


def row(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    ("fits", "not_any_more"),
    [
        ("x" * 590, "x" * 610),
        ("é" * 500, "é" * 610),
        ("x" * 200 + "🙂", "x" * 300 + "🙂"),
        ("🙂" * 145, "🙂" * 155),
    ],
)
def test_a_text_file_may_have_half_of_the_memory(tmp_path: Path, fits: str, not_any_more: str) -> None:
    [document] = read(tmp_path / "a.txt", fits)
    assert document.content == fits
    with pytest.raises(DataError, match=r"a\.txt:1: the file takes more than .* of memory while it is read"):
        read(tmp_path / "a.txt", not_any_more)


@pytest.mark.parametrize(
    ("fits", "not_any_more"),
    [
        ("x" * 580, "x" * 600),
        ("x" * 100 + "🙂", "x" * 150 + "🙂"),
        ("🙂" * 135, "🙂" * 145),
        ("x" * 380 + "\n", "x" * 400 + "\n"),
        ("🙂" * 85 + "\n", "🙂" * 95 + "\n"),
        ("ab\n" * 25 + "🙂", "ab\n" * 35 + "🙂"),  # its parts take a byte a character
    ],
)
def test_a_line_of_json_may_have_half_of_the_memory_and_a_third_with_escapes(
    tmp_path: Path, fits: str, not_any_more: str
) -> None:
    documents = read(tmp_path / "a.jsonl", row("first") + row(fits))
    assert [document.content for document in documents] == ["first", fits]
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.jsonl", row("first") + row(not_any_more))
    assert caught.value.message.startswith(f"{tmp_path / 'a.jsonl'}:2: the line ")


@pytest.mark.parametrize(
    "text", ["ab\\c" * 100, "🙂" * 50 + "\\" + "a" * 100, "a" * 100 + "\\" + "a" * 90 + "🙂", "\\🙂" * 100]
)
def test_what_parts_take_is_never_more_than_was_said(text: str) -> None:
    parts = sum(len(part) * character_bytes(part) for part in text.split("\\"))
    assert decoded_bytes(text.encode())[1] >= parts


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_line_is_read_without_its_mark_and_its_end(tmp_path: Path, end: str, mark: str) -> None:
    documents = read(tmp_path / "a.jsonl", mark + row("one").rstrip() + "\r\n" + row("two").rstrip() + end)
    assert [document.content for document in documents] == ["one", "two"]


def test_a_byte_that_is_not_utf_8_has_its_place_behind_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: byte 14 is not UTF-8"):
        list(json_rows.read_json_lines(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("fits", "not_any_more"),
    [("x" * 300, "x" * 400), ("x" * 60 + "🙂", "x" * 90 + "🙂"), ("🙂" * 60, "🙂" * 90)],
)
def test_a_row_of_an_array_may_have_a_third_of_the_memory(
    tmp_path: Path, fits: str, not_any_more: str
) -> None:
    documents = read(tmp_path / "a.json", "[" + row("first") + "," + row(fits) + "]")
    assert [document.content for document in documents] == ["first", fits]
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.json", "[" + row("first") + "," + row(not_any_more) + "]")
    assert caught.value.message.startswith(f"{tmp_path / 'a.json'}:2: a row takes more than ")
    assert caught.value.hint


STRUCTURES = [
    "[]",
    "{}",
    "1.5",
    "[[1]]",
    '{"a":1}',
    '{"a":[{}],"b":"x"}',
    '"text"',
    '{"a b":"c, d: {e} [f]"}',
]


@pytest.mark.parametrize("value", STRUCTURES)
def test_a_value_takes_no_more_memory_than_was_said(value: str) -> None:
    text = '{"more": [' + ",".join([value] * 20_000) + "]}"
    said_bytes = objects_bytes(text, 1 << 60)
    assert objects_bytes(text.encode(), 1 << 60) == said_bytes
    tracemalloc.start()
    parsed = parse_json(text)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(parsed["more"]) == 20_000
    assert peak_bytes <= said_bytes + len(text)


def test_an_object_with_many_keys_takes_no_more_than_was_said() -> None:
    text = "{" + ",".join(f'"{number:x}":{number}' for number in range(100_000)) + "}"
    tracemalloc.start()
    parse_json(text)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes <= objects_bytes(text, 1 << 60) + len(text)


def test_commas_and_brackets_of_texts_do_not_count_where_that_matters() -> None:
    prose = 'So, [he] said: {no}, "yes", \\ and, '
    text = json.dumps({"text": prose * 1000})
    for json_text in (text, text.encode(), text[:-9]):
        assert objects_bytes(json_text, 1 << 60) > 700_000
        assert objects_bytes(json_text, 1000) < 1000
    # And what follows a text does.
    assert objects_bytes('["a, b", ' + "[], " * 1000 + "1]", 1000) > 1000


def test_rows_are_refused_by_what_their_objects_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "objects_bytes", objects_bytes)
    many = '{"text": "x", "more": [' + "[]," * 40 + "[]]}"
    for name, content, reason in (
        ("a.jsonl", row("one") + many, "the line takes"),
        ("a.json", f"[{row('one')}, {many}]", "a row takes"),
    ):
        with pytest.raises(DataError, match=rf"{name}:2: {reason}"):
            read(tmp_path / name, content)
