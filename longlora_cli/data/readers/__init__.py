"""One reader a kind of file; adding a kind means adding one reader to `READERS`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from longlora_cli.data.document import Document
from longlora_cli.data.readers.books import read_epub, read_pdf
from longlora_cli.data.readers.json_rows import read_json, read_json_lines
from longlora_cli.data.readers.markup import read_html
from longlora_cli.data.readers.opening import COMPRESSIONS
from longlora_cli.data.readers.tables import read_csv, read_parquet, read_tsv
from longlora_cli.data.readers.texts import read_text
from longlora_cli.errors import DataError

Reader = Callable[[Path], Iterator[Document]]

READERS: dict[str, Callable[..., Iterator[Document]]] = {
    ".txt": read_text,
    ".md": read_text,
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
    ".html": read_html,
    ".htm": read_html,
    ".epub": read_epub,
    ".pdf": read_pdf,
}
"""The readers by a file's suffix; those of rows take the rows' `format`, too."""

WHOLE_TEXTS = (".txt", ".md", ".html", ".htm", ".epub", ".pdf")
"""Kinds of which a file is one text."""

# Compressed inside, and read from their end.
_NEVER_COMPRESSED = (".parquet", ".epub", ".pdf")
_PARSERS = {".html": "selectolax", ".htm": "selectolax", ".epub": "selectolax", ".pdf": "pypdfium2"}


def kind_of(path: Path) -> str | None:
    """The suffix that says how a file is read, `.jsonl` for `chats.jsonl.xz`; None for kinds without a reader."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in READERS and suffix not in _NEVER_COMPRESSED else None
    return suffix if suffix in READERS else None


def has_rows(path: Path) -> bool:
    """Whether a file is of a kind whose documents are rows."""
    kind = kind_of(path)
    return kind is not None and kind not in WHOLE_TEXTS


def reader_of(path: Path, *, format: str | None = None) -> Reader:
    """The reader of a file.

    Args:
        path: The file.
        format: What its rows are, if it has rows; None finds it.

    Raises:
        DataError: A kind without a reader, or one whose parser is not installed.
    """
    kind = kind_of(path)
    if kind is None:
        raise DataError(
            f"{path}: {path.suffix or 'a file without suffix'} is not a kind of document that can be read",
            rule=f"Documents are {', '.join(READERS)} files (also with {', '.join(COMPRESSIONS)} behind), "
            "folders of them, and datasets.",
        )
    parser = _PARSERS.get(kind)
    if parser and importlib.util.find_spec(parser) is None:
        raise DataError(
            f"{path}: {kind} files are read with {parser}, which is not installed",
            hint="pip install 'longlora-cli[documents]'",
        )
    return partial(READERS[kind], format=format) if has_rows(path) else READERS[kind]
