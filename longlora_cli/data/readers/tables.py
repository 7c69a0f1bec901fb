"""Tables: CSV and TSV by lines, Parquet by row groups, datasets by rows; only the columns of a document are read."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from longlora_cli.data.chat_rows import without_nulls
from longlora_cli.data.document import Document
from longlora_cli.data.faults import Faults, shown
from longlora_cli.data.readers.opening import InputFile, decode_utf8, first_line
from longlora_cli.data.readers.row_loop import NumberedRow, documents_of
from longlora_cli.data.rows import RowFault, keys_of, unknown_keys

# The csv module holds a cell in 4 bytes a character, in a buffer that doubles.
_MOST_CELL_CHARACTERS = 1 << 26
# Rows of a Parquet file in memory at once: with documents of a megabyte these are 32 MB.
_BATCH_ROWS = 32
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


def _read_separated(path: Path, *, separator: str, format: str | None = None) -> Iterator[Document]:
    faults = Faults(str(path))
    rows = _separated(path, separator, format, faults)
    yield from documents_of(rows, faults, format, empty="the table has no rows")


def _separated(path: Path, separator: str, format: str | None, faults: Faults) -> Iterator[NumberedRow]:
    with InputFile(path) as file:
        csv.field_size_limit(_MOST_CELL_CHARACTERS)
        cells = csv.reader(_lines(file, faults), delimiter=separator, strict=True)
        try:
            header = [name.strip() for name in next(cells, [])]
            _check_header(header, format)
        except (RowFault, csv.Error) as error:
            faults.add(1, str(error))
        while not faults.is_full and not faults.has_line(1):
            line = cells.line_num + 1
            try:
                row = next(cells)
            except StopIteration:
                break
            except csv.Error as error:
                yield line, RowFault(_csv_reason(error)), 0
                continue
            if row and len(row) != len(header):
                yield line, RowFault(f"the row has {len(row)} cells, the header {len(header)}"), 0
            elif row:
                yield line, dict(zip(header, row, strict=True)), file.taken_bytes()


read_csv = partial(_read_separated, separator=",")
"""A row a document, named by the line that it begins on; the first row names the columns.

Raises:
    DataError: The first 20 rows that cannot be used, or columns that make no document.
"""

read_tsv = partial(_read_separated, separator="\t")
"""As `read_csv`, with tabs between the cells."""


def _lines(file: InputFile, faults: Faults) -> Iterator[str]:
    number = 0
    try:
        for text in decode_utf8(file.lines(), faults):
            for line in _LINE.findall(text):
                number += 1
                yield line
    except RowFault as fault:
        faults.add(number + 1, str(fault))


def _check_header(header: list[str], format: str | None) -> None:
    if not any(header):
        raise RowFault("the file is empty")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise RowFault(f"the column {shown(twice)} is there twice")
    if reason := unknown_keys(header, format):
        raise RowFault(reason)


def _csv_reason(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a quotation mark in this row is never closed"
    return f"not CSV: {error}"


def read_parquet(path: Path, *, format: str | None = None) -> Iterator[Document]:
    """A row a document, a few rows at a time whatever the row groups' size.

    Args:
        path: The file.
        format: What the rows are; None finds it.

    Raises:
        DataError: The first 20 rows that cannot be used, columns that make no document, or no Parquet file.
    """
    faults = Faults(str(path))
    rows = _parquet(path, format, faults)
    yield from documents_of(rows, faults, format, empty="the table has no rows")


def _parquet(path: Path, format: str | None, faults: Faults) -> Iterator[NumberedRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    size_bytes = path.stat().st_size
    try:
        # Neither memory-mapped nor read ahead: both count a whole row group as resident.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            if reason := unknown_keys(names, format):
                raise RowFault(reason)
            columns = [name for name in names if name in keys_of(format)]
            share_bytes = size_bytes // max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                for index in range(batch.num_rows):
                    number += 1
                    try:
                        [row] = batch.slice(index, 1).to_pylist()
                    except UnicodeDecodeError as error:
                        yield number, RowFault(f"byte {error.start} of a value is not UTF-8"), 0
                        continue
                    yield number, without_nulls(row), share_bytes
    except RowFault as fault:
        faults.add(1, str(fault))
    except (pa.ArrowException, OSError, ValueError) as error:
        what = "unreadable from here on" if number else "not a Parquet file that can be read"
        faults.add(number + 1, f"{what}: {first_line(error)}")


def read_dataset(name: str, dataset: Any, *, format: str | None = None) -> Iterator[Document]:
    """The rows of a `datasets` dataset, in memory, memory-mapped or streamed.

    Args:
        name: How it is called in messages.
        dataset: A `Dataset` or an `IterableDataset`.
        format: What the rows are; None finds it.

    Raises:
        DataError: The first 20 rows that cannot be used, or columns that make no document.
    """
    faults = Faults(name)
    columns = dataset.column_names  # None for a stream whose columns nobody wrote down
    if columns and (reason := unknown_keys(columns, format)):
        faults.add(1, reason)
        faults.raise_if_any()
    rows: Iterable[dict[str, Any]] = dataset
    if columns:
        rows = dataset.select_columns([column for column in columns if column in keys_of(format)])
    numbered = ((number, without_nulls(row), 0) for number, row in enumerate(rows, start=1))
    yield from documents_of(numbered, faults, format, empty="the dataset is empty")
