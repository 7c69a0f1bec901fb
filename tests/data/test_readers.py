from __future__ import annotations

import codecs
import importlib.util
import io
import json
import lzma
import random
import zipfile
from pathlib import Path
from typing import Any

import input_files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from input_files import COMPRESS, epub, file_of, html, pdf, save, xhtml

from longlora_cli.data.documents import Document, find_sources, read_documents
from longlora_cli.data.readers import READERS, WHOLE_TEXTS, books, markup
from longlora_cli.errors import DataError

TEXTS = ["One, two.", "Three (four)."]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def read(*inputs: Path | str) -> list[Document]:
    return list(read_documents(find_sources([str(i) for i in inputs], split="train"), seed=0))


def fault(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path)
    return caught.value


@pytest.mark.parametrize("kind", READERS)
def test_every_kind_of_file_gives_its_texts(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / f"a{kind}", file_of(kind, TEXTS))
    assert [d.content for d in read(path)] == (["\n\n".join(TEXTS)] if kind in WHOLE_TEXTS else TEXTS)
    assert sum(d.size_bytes for d in read(path)) <= path.stat().st_size


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [k for k in READERS if k not in (".parquet", ".epub", ".pdf")])
def test_compressed_files_are_read_as_what_is_in_them(tmp_path: Path, kind: str, compression: str) -> None:
    plain = save(tmp_path / f"a{kind}", file_of(kind, TEXTS))
    packed = save(tmp_path / f"b{kind}{compression}", COMPRESS[compression](plain.read_bytes()))
    assert [d.content for d in read(packed)] == [d.content for d in read(plain)]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".html"])
def test_a_compressed_file_that_is_cut_off_is_told(tmp_path: Path, kind: str, compression: str) -> None:
    whole = COMPRESS[compression](file_of(kind, [f"text {n * 7919 % 1000}" for n in range(3000)]))
    path = save(tmp_path / f"a{kind}{compression}", whole[: len(whole) * 2 // 3])
    error = fault(path)
    assert str(path) in error.message
    assert f"{error.message} {error.rule}".count("cut off or damaged") == 1


@pytest.mark.parametrize(
    ("library", "kind"), [("selectolax", ".html"), ("selectolax", ".epub"), ("pypdfium2", ".pdf")]
)
def test_a_parser_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, kind: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    save(tmp_path / f"a{kind}", file_of(kind, TEXTS))
    with pytest.raises(DataError, match=f"{kind} files are read with {library}") as caught:
        find_sources([str(tmp_path)], split="train")
    assert caught.value.hint == "pip install 'longlora-cli[documents]'"


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, lost and added, or the end cut off."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        at, what = rng.randrange(len(data) or 1), rng.random()
        if what < 0.5 and data:
            data[at] = rng.randrange(256)
        elif what < 0.7:
            del data[at : at + rng.randint(1, 30)]
        elif what < 0.9:
            data[at:at] = rng.randbytes(rng.randint(1, 10))
        else:
            del data[at + 1 :]
    return bytes(data)


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_was_damaged_anywhere_is_read_or_told_in_one_line(tmp_path: Path, kind: str) -> None:
    rng = random.Random(kind)
    whole = file_of(kind, [f"text {n} {'' if kind == '.pdf' else 'äö'}" for n in range(20)])
    errors = []
    for _ in range(50):
        path = save(tmp_path / f"a{kind}", damaged(whole, rng))
        try:
            read(path)
        except DataError as error:  # any other error fails
            errors.append(error)
    assert errors
    assert all(error.message.startswith(str(path)) and "\n" not in error.message for error in errors)


# --- encodings


@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".html"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_are_told_by_their_byte_order_mark(tmp_path: Path, kind: str, encoding: str) -> None:
    path = save(tmp_path / f"a{kind}", file_of(kind, TEXTS).decode().encode(encoding))
    error = fault(path)
    assert error.message.startswith(
        f"{path}:1: the file begins with the byte order mark of {encoding.upper()},"
    )
    assert error.hint == f"Convert it: iconv -f {encoding.upper()} -t UTF-8 {path} > utf-8.txt"


@pytest.mark.parametrize("kind", [".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".html"])
def test_the_byte_order_mark_of_utf8_is_no_part_of_the_text(tmp_path: Path, kind: str) -> None:
    plain = save(tmp_path / f"a{kind}", file_of(kind, TEXTS))
    marked = save(tmp_path / f"b{kind}", codecs.BOM_UTF8 + plain.read_bytes())
    assert [d.content for d in read(marked)] == [d.content for d in read(plain)]


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".html"])
def test_a_byte_that_is_not_utf8_is_told_by_line_and_offset(tmp_path: Path, kind: str) -> None:
    content = file_of(kind, ["häuser", "text", "tür"])
    if kind in (".jsonl", ".json"):
        content = content.replace(rb"t\u00fcr", "tür".encode())
    at = content.index("ü".encode())
    content = content[:at] + b"\xff" + content[at:]
    path = save(tmp_path / f"a{kind}", content)
    assert fault(path).message == f"{path}:{content.count(10, 0, at) + 1}: byte {at} is not UTF-8"


def test_all_faults_of_a_text_are_told_with_line_and_byte(tmp_path: Path) -> None:
    path = save(tmp_path / "a.txt", b"ab\xffc\nd\0e\n\xed\xa0\x80f \xc3\nlast \xe2\x82")
    error = fault(path)
    assert error.message == f"{path}:1: byte 2 is not UTF-8"
    assert (error.rule or "").splitlines() == [
        f"{path}:2: byte 6 is NUL",
        f"{path}:3: byte 9 is half a surrogate pair (U+D800), not UTF-8",
        *(f"{path}:3: byte {byte} is not UTF-8" for byte in (10, 11, 14)),
        f"{path}:4: byte 21 is not UTF-8",
    ]


def test_a_text_of_many_faults_is_told_for_the_first_twenty(tmp_path: Path) -> None:
    path = save(tmp_path / "a.txt", b"good\n" * 300_000 + b"\xff\n" * 100)
    error = fault(path)
    assert error.message == f"{path}:300001: byte 1500000 is not UTF-8"
    assert error.rule is not None
    assert error.rule.count("not UTF-8") == 19
    assert error.rule.endswith(f"{path}:300020: byte 1500038 is not UTF-8\nreading stopped after 20 faults")


def test_characters_may_lie_across_the_blocks_of_a_text(tmp_path: Path) -> None:
    text = "a" + "漢🙂" * 700_000
    assert [d.content for d in read(save(tmp_path / "a.txt", text.encode()))] == [text]


# --- JSON


def json_file(path: Path, text: str) -> Path:
    return save(path / "a.json", text.encode())


def test_objects_in_a_json_file_are_rows_without_an_array(tmp_path: Path) -> None:
    path = json_file(tmp_path, '{"text": "one"}\n{"text":\n"two"} {"text": "three"}')
    assert [(d.source, d.content) for d in read(path)] == [
        (f"{path}:1", "one"),
        (f"{path}:2", "two"),
        (f"{path}:3", "three"),
    ]


def test_rows_of_any_length_are_found_in_an_array(tmp_path: Path) -> None:
    texts = ["x" * 1_048_560, "y" * 3_000_000, "z", '\\"]},{[' * 200_000, "é🙂" * 400_000, "end"]
    for ascii_only in (True, False):
        path = json_file(tmp_path, json.dumps([{"text": t} for t in texts], ensure_ascii=ascii_only))
        assert [d.content for d in read(path)] == texts


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "there is no row in the file"),
        ("[]", 1, "there is no row in the file"),
        ('[{"text": "a"},]', 1, "not JSON: a comma before the end of the array"),
        ('[{"text": "a"}\n\n', 3, "not JSON: the array of rows is not closed, the file ends here"),
        ('[{"text": "a"}\n{"text": "b"}]', 2, "not JSON: '{' where a comma or ] is needed"),
        ('[{"text": "a"}]\n[1]', 2, "not JSON: '[' after the end of the array"),
        ('[{"text": "a"},\n{"text": "b}]\n', 2, "not JSON: Invalid control character"),
        ('[{"text": "a"},\n{"text" "b"}]', 2, "not JSON: Expecting ':' delimiter"),
        ('[{"text": "a"},\n7,\n{"text": "a"}]', 2, "a row is a JSON object, not a number"),
        ('[{"text": "a"},\n{"text": "b", "text": "c"}]', 2, "the key 'text' is there twice in one object"),
        (
            '[{"text": "a"},\n{"text": "b", "x": [{"score": NaN}]}]',
            2,
            "NaN is no JSON value; a missing value is null",
        ),
        ('[{"text": "a", "n": -Infinity}]', 1, "-Infinity is no JSON value; a missing value is null"),
        ("[" * 100_000, 1, "not JSON that can be read: nested too deeply"),
        ('{"text": "a"}\nnull', 2, "a row is a JSON object, not null"),
    ],
)
def test_each_fault_of_a_json_file_has_its_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    path = json_file(tmp_path, text)
    assert fault(path).message == f"{path}:{line}: {reason}"


def test_faulty_rows_of_an_array_are_told_together(tmp_path: Path) -> None:
    path = json_file(tmp_path, '[{"text": 1},\n{"text": "a", "text": "b"},\n{"text": "c"},\n{"txet": "d"}]')
    error = fault(path)
    assert error.message == f"{path}:1: text is a number, a text is needed"
    assert error.rule == (
        f"{path}:2: the key 'text' is there twice in one object\n{path}:4: unknown key 'txet'; did you mean text?"
    )


def test_a_line_of_json_lines_that_is_null_is_a_fault(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jsonl", b'{"text": "a"}\nnull\n')
    assert fault(path).message == f"{path}:2: a row is a JSON object, not null"


# --- tables


def test_cells_of_several_lines_and_other_columns_are_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.csv", b'id,text\r\n1,"a\n""b"", c"\r\n\r\n2,d\r\n')
    assert [(d.source, d.content) for d in read(path)] == [(f"{path}:2", 'a\n"b", c'), (f"{path}:5", "d")]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("", 1, "the file is empty"),
        ("text\n", 1, "the table has no rows"),
        ("txet\na\n", 1, "unknown key 'txet'; did you mean text?"),
        ("text,text\na,b\n", 1, "the column 'text' is there twice"),
        ("id,text\n1,a\n2,b,c\n", 3, "the row has 3 cells, the header 2"),
        ('id,text\n1,a\n2,"b\n3,c\n', 3, "a quotation mark in this row is never closed"),
        ('id,text\n1,"a"b\n', 2, "not CSV: ',' expected after '\"'"),
        ("id,text\n1,\n", 2, "text is empty"),
        ("prompt,completion\na,\n", 2, "completion is empty"),
    ],
)
def test_each_fault_of_a_table_has_its_line(tmp_path: Path, text: str, line: int, reason: str) -> None:
    path = save(tmp_path / "a.csv", text.encode())
    assert fault(path).message == f"{path}:{line}: {reason}"


def test_chats_and_nulls_in_parquet_are_read(tmp_path: Path) -> None:
    rows = [{"messages": CHAT, "text": None, "id": 1}, {"messages": None, "text": "t", "id": None}]
    path = save(tmp_path / "a.parquet", input_files.parquet(rows))
    assert [d.content for d in read(path)] == [CHAT, "t"]


@pytest.mark.parametrize(
    ("rows", "row", "reason"),
    [
        ([{"text": "a"}, {"text": None}], 2, "text is null, a text is needed"),
        ([{"text": 1.5}], 1, "text is a number, a text is needed"),
        ([{"text": float("nan")}], 1, "text is NaN, a text is needed"),
        ([{"prompt": "a", "completion": None}], 1, "completion is null, a text is needed"),
        ([{"prompt": "a", "complétion": "b"}], 1, "unknown key 'complétion'; did you mean completion?"),
        (
            [{"messages": CHAT[:1]}],
            1,
            "the chat does not end with the assistant, so its last turn teaches nothing",
        ),
    ],
)
def test_each_fault_of_a_parquet_file_has_its_row(
    tmp_path: Path, rows: list[dict[str, Any]], row: int, reason: str
) -> None:
    path = save(tmp_path / "a.parquet", input_files.parquet(rows))
    assert fault(path).message == f"{path}:{row}: {reason}"


def test_parquet_text_that_is_not_utf8_has_its_row(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\x02\0\0\0\x04\0\0\0"), pa.py_buffer(b"okb\xff")]
    )
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": text}), sink)
    path = save(tmp_path / "a.parquet", sink.getvalue())
    assert fault(path).message == f"{path}:2: byte 1 of a value is not UTF-8"


# --- marked-up


def test_html_becomes_paragraphs_without_scripts_and_tags(tmp_path: Path) -> None:
    body = (
        "<h1>A  title</h1>\n<p>one <b>b</b>old\n line<br>break<script>no()</script><!-- no -->"
        "<pre>x\n  y\n</pre><button>no</button><ul><li>1<li>2</ul>"
        "<table><tr><td>a<td>b<tr><td>c</table>tail&nbsp;&amp; soft&shy;ly"
    )
    path = save(tmp_path / "a.html", html(body))
    [document] = read(path)
    assert document.content == (
        "A title\n\none bold line\nbreak\n\nx\n  y\n\n1\n2\n\na\tb\nc\n\ntail & softly"
    )


def test_html_is_read_in_the_encoding_that_it_declares(tmp_path: Path) -> None:
    page = '<meta http-equiv="Content-Type" content="text/html; charset=ISO-8859-1"><p>Tür – “zu”</p>'
    [document] = read(save(tmp_path / "a.html", page.encode("cp1252")))
    assert document.content == "Tür – “zu”"
    page = '<meta charset="shift_jis"><p>漢字</p>'
    [document] = read(save(tmp_path / "b.htm", page.encode("shift_jis")))
    assert document.content == "漢字"


def test_a_page_nested_deeply_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "a.html", b"<div>" * 20_000 + b"deep")
    assert [d.content for d in read(path)] == ["deep"]


def test_the_pages_of_an_epub_come_in_the_order_of_its_spine(tmp_path: Path) -> None:
    pages = {name: xhtml(name) for name in ("b c.xhtml", "a.xhtml", "nav.xhtml", "unread.xhtml")}
    path = save(tmp_path / "a.epub", epub(pages, spine=["nav.xhtml", "a.xhtml", "b c.xhtml"]))
    assert [d.content for d in read(path)] == ["a.xhtml\n\nb c.xhtml"]


def test_elements_closed_in_their_own_tag_do_not_swallow_an_epubs_page(tmp_path: Path) -> None:
    page = xhtml('one<a id="x"/> two<script src="no.js"/></p><p>three<br/>four')
    [document] = read(save(tmp_path / "a.epub", epub({"a.xhtml": page})))
    assert document.content == "one two\n\nthree\nfour"


LOCK = (
    '<encryption xmlns:enc="http://www.w3.org/2001/04/xmlenc#"><enc:EncryptedData><enc:CipherData>'
    '<enc:CipherReference URI="OEBPS/text/a.xhtml"/></enc:CipherData></enc:EncryptedData></encryption>'
)
BOMB = '<!DOCTYPE c [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><container>&b;</container>'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a zip", "not an EPUB that can be read: File is not a zip file"),
        (epub({"a.xhtml": xhtml("x")}, container=None), "the book has no 'META-INF/container.xml'"),
        (epub({"a.xhtml": xhtml("x")}, container="<container>"), "META-INF/container.xml is not XML"),
        (epub({"a.xhtml": xhtml("x")}, container="<container/>"), "META-INF/container.xml names no package"),
        (epub({"a.xhtml": xhtml("x")}, container=BOMB), "META-INF/container.xml declares entities"),
        (
            epub({"a.xhtml": xhtml("x")}, spine=["b.xhtml"]),
            "the spine names 'b.xhtml', which the book does not have",
        ),
        (
            epub({"a.xhtml": xhtml("x")}, more={"META-INF/encryption.xml": LOCK}),
            r"the book is encrypted \(DRM\)",
        ),
        (epub({"a.xhtml": b"<p>\n\xff"}), "in OEBPS/text/a.xhtml: line 2: byte 4 is not UTF-8"),
        (epub({"a.xhtml": xhtml("")}), "there is no text in it"),
        (epub({"a.xhtml": b" " * 170_000_000}), "OEBPS/text/a.xhtml unpacks to more than 160 MB"),
        (
            epub({"a.xhtml": xhtml("x")}, package=" " * 17_000_000),
            "OEBPS/content.opf unpacks to more than 16 MB",
        ),
    ],
)
def test_each_unusable_epub_is_told_why(tmp_path: Path, content: bytes, reason: str) -> None:
    path = save(tmp_path / "a.epub", content)
    with pytest.raises(DataError, match=f"a.epub: {reason}"):
        read(path)


@pytest.mark.parametrize(
    ("files", "name_bytes", "reason"), [(70_000, 8, "more than 65,534 files"), (300, 60_000, "the list of")]
)
def test_a_book_whose_list_of_files_would_fill_the_memory_is_refused_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int, name_bytes: int, reason: str
) -> None:
    path = tmp_path / "a.epub"
    with zipfile.ZipFile(path, "w") as book:
        for number in range(files):
            book.writestr(f"{number:0{name_bytes}d}", b"")
    monkeypatch.setattr(zipfile, "ZipFile", None)  # would be called
    with pytest.raises(DataError, match=f"a.epub: .*{reason}"):
        read(path)


def test_fonts_that_are_obfuscated_do_not_lock_a_book(tmp_path: Path) -> None:
    lock = LOCK.replace("text/a.xhtml", "fonts/a.otf")
    path = save(tmp_path / "a.epub", epub({"a.xhtml": xhtml("x")}, more={"META-INF/encryption.xml": lock}))
    assert [d.content for d in read(path)] == ["x"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a PDF that can be read"),
        (b"%PDF-1.4\nnonsense", "not a PDF that can be read"),
        (pdf(["", ""]), "there is no text on its 2 pages; pictures of text need OCR first"),
    ],
)
def test_each_unusable_pdf_is_told_why(tmp_path: Path, content: bytes, reason: str) -> None:
    path = save(tmp_path / "a.pdf", content)
    assert fault(path).message.startswith(f"{path}: {reason}")


def test_a_books_page_that_takes_too_much_memory_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(markup, "MOST_HELD_BYTES", 20_000)
    pages = {"a.xhtml": xhtml("x " * 100), "b.xhtml": xhtml("<b>x</b>" * 100)}
    path = save(tmp_path / "a.epub", epub(pages))
    assert fault(path).message.startswith(f"{path}: in OEBPS/text/b.xhtml: a page of 0 MB and 210 tags takes")
    page = save(tmp_path / "a.html", xhtml("<b>x</b>" * 100))
    assert fault(page).message.startswith(f"{page}: a page of 0 MB and 210 tags takes more than")


@pytest.mark.parametrize("kind", [".epub", ".pdf"])
def test_books_whose_text_takes_too_much_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(books, "MOST_HELD_BYTES", 2_000)
    texts = ["x" * 90] * 10
    assert len(read(save(tmp_path / f"a{kind}", file_of(kind, ["\n\n".join(texts)])))) == 1
    pages = {f"{number}.xhtml": xhtml(text) for number, text in enumerate(texts * 2)}
    path = save(tmp_path / f"b{kind}", epub(pages) if kind == ".epub" else pdf(texts * 2))
    assert "the book's text takes more than" in fault(path).message


def test_a_compressed_pdf_is_no_kind(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pdf.xz", lzma.compress(pdf(["x"])))
    with pytest.raises(DataError, match=r"a\.pdf\.xz: \.xz is not a kind of document"):
        find_sources([str(path)], split="train")
