"""Memory over imports, in real processes: rows cost a row, whatever the file; a document that must be held, itself."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

READ = """
import sys
import datasets, pyarrow.parquet, selectolax.lexbor, pypdfium2
from longlora_cli.data.documents import find_sources, read_documents

def peak_bytes():
    # Not ru_maxrss: it begins with what the process had before it became this one, and that is pytest's.
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

before = peak_bytes()
characters = 0
for document in read_documents(find_sources(sys.argv[1:], split="train"), seed=0):
    characters += len(document.content)
    del document
print(characters, peak_bytes() - before)
"""
PARAGRAPH = "".join(f"word{n} " for n in range(1200))[:8191] + "."  # 8 KiB
ROWS = 16_384  # of a paragraph: 128 MiB
TEXT_CHARACTERS = 100_000_000


def read(path: Path) -> tuple[int, int]:
    """Characters read and bytes of memory taken over imports, by a process of its own."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], check=True, capture_output=True, text=True)
    characters, peak_bytes = done.stdout.split()
    return int(characters), int(peak_bytes)


def refused(path: Path) -> tuple[str, int]:
    """The message, and bytes of memory taken over imports until then, by a process of its own."""
    head, loop = READ.split("characters = 0\n")
    loop = loop.replace("print(characters, peak_bytes() - before)", "").replace("\n", "\n    ")
    code = f"""{head}
from longlora_cli.errors import DataError
characters = 0
try:
    {loop}
except DataError as error:
    print(peak_bytes() - before, error.message)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    peak_bytes, _, message = done.stdout.partition(" ")
    return message, int(peak_bytes)


def json_lines(path: Path) -> None:
    path.write_bytes((json.dumps({"text": PARAGRAPH}) + "\n").encode() * ROWS)


def json_array(path: Path) -> None:
    row = json.dumps({"text": PARAGRAPH}).encode()
    path.write_bytes(b"[" + (row + b",\n") * (ROWS - 1) + row + b"]")


def compressed(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write((json.dumps({"text": PARAGRAPH}) + "\n").encode() * ROWS)


def table(path: Path) -> None:
    path.write_bytes(b"id,text\n" + f"1,{PARAGRAPH}\n".encode() * ROWS)


def parquet(path: Path) -> None:
    texts = pa.array([f"{n:07} {PARAGRAPH[8:]}" for n in range(ROWS)])
    pq.write_table(pa.table({"text": texts}), path, row_group_size=ROWS, use_dictionary=False)


def folder(path: Path) -> None:
    path.mkdir()
    for number in range(128):
        (path / f"{number}.txt").write_text(PARAGRAPH * (ROWS // 128))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.jsonl", json_lines),
        ("a.json", json_array),
        ("a.jsonl.gz", compressed),
        ("a.csv", table),
        ("a.parquet", parquet),
        ("folder", folder),
    ],
)
def test_rows_and_files_are_read_one_at_a_time(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / name)
    characters, peak_bytes = read(tmp_path / name)
    assert characters == ROWS * len(PARAGRAPH)
    assert peak_bytes < characters / 2


def plain(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def one_line(path: Path, text: str) -> None:
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + '\n{"text": "x"}\n', encoding="utf-8")


def in_an_array(path: Path, text: str) -> None:
    path.write_text(
        '[{"text": "x"},\n' + json.dumps({"text": text}, ensure_ascii=False) + "]", encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("name", "write", "character"),
    [
        ("a.txt", plain, "é"),
        ("a.txt", plain, "🙂"),
        ("a.jsonl", one_line, "é"),
        ("a.jsonl", one_line, "🙂"),
        ("a.json", in_an_array, "é"),
    ],
)
def test_a_document_of_100_mb_takes_less_than_a_gigabyte(
    tmp_path: Path, name: str, write: Callable[[Path, str], None], character: str
) -> None:
    # One emoji makes each of a text's characters four bytes in memory: the worst that 100 MB can be.
    text = (PARAGRAPH[:-1] + "\n") * (TEXT_CHARACTERS // len(PARAGRAPH)) + character
    write(tmp_path / name, text)
    characters, peak_bytes = read(tmp_path / name)
    assert characters >= len(text)
    assert peak_bytes < 1e9


def chat_line(path: Path, text: str) -> None:
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]}
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")


def lists(path: Path, text: str) -> None:
    """33 million empty lists, 100 MB that would become 2.4 GB."""
    path.write_text('{"text": "x", "more": [' + "[]," * (len(text) // 3) + "[]]}")


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("a.jsonl", chat_line, ":1: the chat has more than 10 MiB of text"),
        ("a.jsonl", lists, ":1: the line takes "),
        pytest.param("a.json", lists, ":1: a row takes more than 960 MB of memory", marks=pytest.mark.slow),
        ("b.json", in_an_array, ":2: a row takes more than 960 MB of memory"),
        ("a.html", plain, ": a page of 100 MB and 0 tags takes more than 960 MB of memory"),
    ],
)
def test_what_would_take_more_than_a_gigabyte_is_refused_before_it_does(
    tmp_path: Path, name: str, write: Callable[[Path, str], None], reason: str
) -> None:
    # The last emoji makes the text 400 MB, and all of its copies.
    write(tmp_path / name, "word " * (TEXT_CHARACTERS // 5) + "🙂")
    message, peak_bytes = refused(tmp_path / name)
    assert message.startswith(f"{tmp_path / name}{reason}")
    assert peak_bytes < 1e9


PAGE = """
import sys
import selectolax.lexbor
from longlora_cli.data.readers.markup import html_text, decode_markup, page_bytes
from longlora_cli.data.faults import Faults
unit = sys.argv[1].encode()
raw = b"<html><body>" + unit * (4_000_000 // len(unit))

def peak_bytes():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

said = page_bytes(raw, 1 << 60)
before = peak_bytes()
html_text(decode_markup(raw, Faults("a")))
print(peak_bytes() - before, said)
"""


@pytest.mark.parametrize(
    "unit",
    [
        "<b>x</b>",
        "<b>",
        "<p>a",
        "<p> a \n",
        "<td>",
        "<!---->",
        "<p a b c d>",
        "<br/>",
        "word &amp; ",
        "<p>" + "🙂" * 500,
    ],
)
def test_a_page_takes_no_more_memory_than_was_said(unit: str) -> None:
    done = subprocess.run([sys.executable, "-c", PAGE, unit], check=True, capture_output=True, text=True)
    peak_bytes, said_bytes = map(int, done.stdout.split())
    assert peak_bytes <= said_bytes
