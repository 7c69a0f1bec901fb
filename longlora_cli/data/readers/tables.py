"""Tables: CSV and TSV by lines, Parquet by row groups, datasets by rows; only the columns of a document are read."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from longlora_cli.data.document import Document
from longlora_cli.data.faults import Faults, shown
from longlora_cli.data.readers.opening import InputFile, decode_utf8, first_line
from longlora_cli.data.rows import KEYS, RowFault, read_row, unknown_keys

# The csv module holds a cell in 4 bytes a character, in a buffer that doubles.
_MOST_CELL_CHARACTERS = 1 << 26
# Rows of a Parquet file in memory at once: with documents of a megabyte these are 32 MB.
_BATCH_ROWS = 32
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


def _read_separated(path: Path, *, separator: str) -> Iterator[Document]:
    faults = Faults(str(path))
    documents = 0
    with InputFile(path) as file:
        csv.field_size_limit(_MOST_CELL_CHARACTERS)
        cells = csv.reader(_lines(file, faults), delimiter=separator, strict=True)
        try:
            header = [name.strip() for name in next(cells, [])]
            _check_header(header)
        except (RowFault, csv.Error) as error:
            faults.add(1, str(error))
        while not faults.is_full and not faults.has_line(1):
            line = cells.line_num + 1
            try:
                row = next(cells)
                if not row:
                    continue
                if len(row) != len(header):
                    raise RowFault(f"the row has {len(row)} cells, the header {len(header)}")
                content = read_row(dict(zip(header, row, strict=True)))
            except StopIteration:
                break
            except csv.Error as error:
                faults.add(line, _csv_reason(error))
                continue
            except RowFault as fault:
                faults.add(line, str(fault))
                continue
            documents += 1
            if not len(faults):
                yield Document(f"{path}:{line}", content, file.taken_bytes())
    if not documents and not len(faults):
        faults.add(1, "the table has no rows")
    faults.raise_if_any()


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


def _check_header(header: list[str]) -> None:
    if not any(header):
        raise RowFault("the file is empty")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise RowFault(f"the column {shown(twice)} is there twice")
    if reason := unknown_keys(header):
        raise RowFault(reason)


def _csv_reason(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a quotation mark in this row is never closed"
    return f"not CSV: {error}"


def read_parquet(path: Path) -> Iterator[Document]:
    """A row a document, a few rows at a time whatever the row groups' size.

    Raises:
        DataError: The first 20 rows that cannot be used, columns that make no document, or no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    faults = Faults(str(path))
    documents = number = 0
    size_bytes = path.stat().st_size
    try:
        # Neither memory-mapped nor read ahead: both count a whole row group as resident.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            names = file.schema_arrow.names
            if reason := unknown_keys(names):
                raise RowFault(reason)
            columns = [name for name in names if name in KEYS]
            share_bytes = size_bytes // max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                for index in range(batch.num_rows):
                    number += 1
                    try:
                        [row] = batch.slice(index, 1).to_pylist()
                        content = read_row(row)
                    except UnicodeDecodeError as error:
                        faults.add(number, f"byte {error.start} of a value is not UTF-8")
                        continue
                    except RowFault as fault:
                        faults.add(number, str(fault))
                        continue
                    documents += 1
                    if not len(faults):
                        yield Document(f"{path}:{number}", content, share_bytes)
                if faults.is_full:
                    break
    except RowFault as fault:
        faults.add(1, str(fault))
    except (pa.ArrowException, OSError, ValueError) as error:
        what = "unreadable from here on" if number else "not a Parquet file that can be read"
        faults.add(number + 1, f"{what}: {first_line(error)}")
    if not documents and not len(faults):
        faults.add(1, "the table has no rows")
    faults.raise_if_any()


def read_dataset(name: str, dataset: Any) -> Iterator[Document]:
    """The rows of a `datasets` dataset, in memory, memory-mapped or streamed.

    Args:
        name: How it is called in messages.
        dataset: A `Dataset` or an `IterableDataset`.

    Raises:
        DataError: The first 20 rows that cannot be used, or columns that make no document.
    """
    faults = Faults(name)
    columns = dataset.column_names  # None for a stream whose columns nobody wrote down
    if columns and (reason := unknown_keys(columns)):
        faults.add(1, reason)
        faults.raise_if_any()
    rows: Iterable[dict[str, Any]] = dataset
    if columns:
        rows = dataset.select_columns([column for column in columns if column in KEYS])
    number = 0
    for number, row in enumerate(rows, start=1):
        if faults.is_full:
            break
        try:
            content = read_row(row)
        except RowFault as fault:
            faults.add(number, str(fault))
            continue
        if not len(faults):
            yield Document(f"{name}:{number}", content)
    if not number:
        faults.add(1, "the dataset is empty")
    faults.raise_if_any()
