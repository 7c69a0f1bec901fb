"""The one loop that makes documents of rows, whatever file they come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from longlora_cli.data.document import Document
from longlora_cli.data.faults import Faults
from longlora_cli.data.rows import RowFault, read_row

NumberedRow = tuple[int, Any, int]
"""Line (or row) from 1, its value or the `RowFault` that it is, and the bytes it took in its file (0: unknown)."""


def documents_of(
    rows: Iterable[NumberedRow], faults: Faults, format: str | None, *, empty: str
) -> Iterator[Document]:
    """A document a row, until the first fault; faults are collected until there are enough of them.

    Args:
        rows: What a file holds; may note faults itself, and is not read on when they are full.
        faults: The file's.
        format: What the rows are; None finds it for each by its keys.
        empty: The fault of a file without rows.

    Raises:
        DataError: All faults that were noted.
    """
    is_empty = True
    for line, value, size_bytes in rows:
        is_empty = False
        try:
            if isinstance(value, RowFault):
                raise value
            row = read_row(value, format)
        except RowFault as fault:
            faults.add(line, str(fault), hint=fault.hint)
            if faults.is_full:
                break
            continue
        del value
        if not len(faults):
            yield Document(f"{faults.name}:{line}", row.content, size_bytes, row.format, row.tools)
        del row  # before the next one is read
    if is_empty and not len(faults):
        faults.add(1, empty)
    faults.raise_if_any()
