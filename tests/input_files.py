"""Small input files of every kind that can be read, made without the libraries that read them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def json_lines(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def json_array(rows: Sequence[Any]) -> bytes:
    return ("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n").encode()


def separated(rows: Sequence[dict[str, str]], separator: str) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator)
    writer.writerow(rows[0])
    writer.writerows([row.values() for row in rows])
    return text.getvalue().encode()


def parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink, row_group_size=3)
    return sink.getvalue()


def html(text: str) -> bytes:
    return f"<html><head><title>Not this</title></head><body><p>{text}</p></body></html>".encode()


CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/content.opf"/></rootfiles></container>'
)


def epub(
    pages: dict[str, bytes],
    *,
    spine: Sequence[str] | None = None,
    container: str | bytes | None = CONTAINER,
    package: str | None = None,
    more: dict[str, str] | None = None,
) -> bytes:
    """Pages by name; `spine` is their reading order, by default the order given."""
    items = "".join(
        f'<item id="{name}" href="text/{name}" media-type="application/xhtml+xml"'
        f"{' properties=' + chr(34) + 'nav' + chr(34) if name == 'nav.xhtml' else ''}/>"
        for name in pages
    )
    order = "".join(f'<itemref idref="{name}"/>' for name in (pages if spine is None else spine))
    opf = f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{order}</spine></package>'
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("mimetype", "application/epub+zip")
        if container is not None:
            book.writestr("META-INF/container.xml", container)
        book.writestr("OEBPS/content.opf", opf if package is None else package)
        for name, content in pages.items():
            book.writestr(f"OEBPS/text/{name}", content)
        for name, text in (more or {}).items():
            book.writestr(name, text)
    return sink.getvalue()


def xhtml(text: str) -> bytes:
    return (
        '<?xml version="1.0" encoding="utf-8"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title/></head>'
        f"<body><p>{text}</p></body></html>"
    ).encode()


def pdf(pages: Sequence[str]) -> bytes:
    """Pages of one line in Helvetica."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for text in pages:
        escaped = text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")
        stream = f"BT /F1 12 Tf 20 700 Td ({escaped}) Tj ET" if text else ""
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Resources << /Font << /F1 3 0 R >> >> "
            f"/Contents {len(objects)} 0 R >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    body, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(body))
        body += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    size = len(objects) + 1
    trailer = f"trailer << /Size {size} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF\n"
    return (body + f"xref\n0 {size}\n0000000000 65535 f \n{table}" + trailer).encode("latin-1")


def file_of(kind: str, texts: Sequence[str]) -> bytes:
    """A file of the kind with the texts in it: a document each, or all one after another in one document."""
    rows = [{"text": text} for text in texts]
    makers: dict[str, Callable[[], bytes]] = {
        ".txt": lambda: "\n\n".join(texts).encode(),
        ".md": lambda: "\n\n".join(texts).encode(),
        ".jsonl": lambda: json_lines(rows),
        ".json": lambda: json_array(rows),
        ".csv": lambda: separated(rows, ","),
        ".tsv": lambda: separated(rows, "\t"),
        ".parquet": lambda: parquet(rows),
        ".html": lambda: html("</p><p>".join(texts)),
        ".htm": lambda: html("</p><p>".join(texts)),
        ".epub": lambda: epub({f"{n}.xhtml": xhtml(text) for n, text in enumerate(texts)}),
        ".pdf": lambda: pdf(texts),
    }
    return makers[kind]()


def save(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
