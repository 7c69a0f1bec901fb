"""The ids of one document while its pieces are tokenized: in memory, and in a temporary file when they are many.

A text of 100 million emoji is 400 MB in memory, and its ids can be 1.6 GB.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from longlora_cli.data.chunk import Int32

# 16 MB; most books have fewer.
_HELD_TOKENS = 1 << 22
_INT_BYTES = 4


class FileIds:
    """Ids in a file, as far as an array's `len` and slices go.

    Args:
        file: Open for reading.
        tokens: How many.
    """

    def __init__(self, file: Any, tokens: int) -> None:
        self._file = file
        self._tokens = tokens

    def __len__(self) -> int:
        return self._tokens

    def __getitem__(self, place: slice) -> Int32:
        """The ids of a range, copied from the file; int32 `[stop - start]`."""
        start, stop, step = place.indices(self._tokens)
        if step != 1:
            raise ValueError(f"ids in a file have ranges only, not every {step}th")
        ids = np.empty(max(stop - start, 0), np.int32)
        if len(ids) and os.preadv(self._file.fileno(), [ids.data], start * _INT_BYTES) != ids.nbytes:
            raise OSError("the temporary file of tokens is cut off")
        return ids


Ids = Int32 | FileIds
"""int32 `[tokens]`; what is in a file can only be sliced."""


class JoinedIds:
    """Puts the ids of a document's pieces together, one document after the other. A context manager.

    Args:
        folder: Where the temporary file is made, at the first document that needs one; None holds all in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file: Any = None
        self._parts: list[Int32] = []
        self._held = self._written = 0

    def __enter__(self) -> JoinedIds:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, ids: Int32) -> None:
        """Take the next piece."""
        self._parts.append(ids)
        self._held += len(ids)
        if self._folder is not None and self._held > _HELD_TOKENS:
            self._write()

    def taken(self) -> Ids:
        """The ids of the document, which is done. What is in the file holds until the next `add`."""
        if not self._written:
            ids = np.concatenate(self._parts)
            self._parts, self._held = [], 0
            return ids
        self._write()
        in_file = FileIds(self._file, self._written)
        self._written = 0
        return in_file

    def _write(self) -> None:
        if self._file is None:
            # Without a name on disk: a killed process leaves none.
            self._file = TemporaryFile(dir=self._folder)  # noqa: SIM115
        if not self._written:
            self._file.seek(0)
            self._file.truncate()
        for part in self._parts:
            self._file.write(np.ascontiguousarray(part).data)
        self._file.flush()
        self._written += self._held
        self._parts, self._held = [], 0
