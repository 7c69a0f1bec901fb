"""Files of a benchmark: found in folders and zip archives, and read row by row, whatever their kind."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from longlora_cli.data.faults import Faults, shown
from longlora_cli.data.readers.json_rows import json_lines, json_values
from longlora_cli.data.readers.opening import COMPRESSIONS, MOST_BYTES, InputFile
from longlora_cli.data.row_values import RowFault
from longlora_cli.data.strict_json import parse_json
from longlora_cli.errors import DataError

KINDS = (".jsonl", ".json", ".csv", ".parquet")
"""Kinds of files that hold rows; compressed ones too, but for Parquet."""

_BATCH_ROWS = 16  # of Parquet: rows of some benchmarks have 10 MB each
NumberedFields = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class DataFile:
    """A file with rows.

    Args:
        path: The file, or the archive that holds it.
        member: Its name inside the archive.
        is_named: The user named this very file, rather than a folder or an archive with it inside.
    """

    path: Path
    member: str | None = None
    is_named: bool = False

    @property
    def label(self) -> str:
        """How messages call it."""
        return str(self.path) if self.member is None else f"{self.path}!{self.member}"

    @property
    def name(self) -> str:
        """Its name without folders."""
        return PurePosixPath(self.member or self.path.name).name

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders above it and its name, the suffixes left out: `data/4k/qa1.json.gz` -> `data`, `4k`, `qa1`."""
        where = self.path.parts if self.member is None else PurePosixPath(self.member).parts
        return (*where[:-1], _plain(where[-1])[0])

    @property
    def stem(self) -> str:
        """Its name without suffixes."""
        return self.parts[-1]

    @property
    def kind(self) -> str:
        """One of `KINDS`, or another suffix that is not read."""
        return _plain(self.name)[1]

    def first_row(self) -> dict[str, Any]:
        """The fields of its first row; none where it cannot be read, which is told when all rows are wanted."""
        try:
            return next(self.rows(Faults(self.label)), (0, {}))[1]
        except DataError:
            return {}

    def rows(self, faults: Faults) -> Iterator[NumberedFields]:
        """Line (of Parquet: row) and fields of each row, from 1.

        Args:
            faults: Is given what cannot be read; then the row is passed over.

        Raises:
            DataError: The file cannot be opened.
        """
        for line, value in self._values(faults):
            if isinstance(value, RowFault):
                faults.add(line, str(value))
            elif isinstance(value, dict):
                yield line, value
            else:
                faults.add(line, f"a row is an object, this is {shown(value)}")
            if faults.is_full:
                return

    def _values(self, faults: Faults) -> Iterator[tuple[int, Any]]:
        if self.member is not None:
            yield from _archived(self.path, self.member, faults)
        elif self.kind == ".csv":
            yield from _csv_rows(self.path, faults)
        elif self.kind == ".parquet":
            yield from _parquet_rows(self.path)
        elif self.kind == ".json":
            yield from json_values(self.path, faults)
        else:
            for line, value, _ in json_lines(self.path, faults):
                yield line, value


def find_files(path: Path) -> list[DataFile]:
    """The files with rows that a path names: itself, or those in a folder and below, or in a zip archive, by name.

    Raises:
        DataError: There is no such path, it is of a kind that is not read, or an archive is damaged.
    """
    if path.is_dir():
        found = sorted(
            p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path).parts)
        )
        files = [file for p in found for file in (_members(p) if p.suffix == ".zip" else [DataFile(p)])]
        return [file for file in files if file.kind in KINDS]
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix == ".zip":
        return [file for file in _members(path) if file.kind in KINDS]
    file = DataFile(path, is_named=True)
    if file.kind not in KINDS:
        raise DataError(
            f"{path}: {path.suffix or 'a file without suffix'} is not a kind of file that holds rows",
            rule=f"Benchmarks are read from {', '.join(KINDS)} and .zip files and folders of them.",
        )
    return [file]


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _plain(name: str) -> tuple[str, str]:
    """A file's name without its suffixes, and the suffix that says its kind."""
    path = PurePosixPath(name)
    if path.suffix.lower() in COMPRESSIONS:
        path = PurePosixPath(path.stem)
    return path.stem, path.suffix.lower()


def _members(path: Path) -> list[DataFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path}: cannot be read as a zip archive: {error}") from error
    inside = (name for name in names if not _is_hidden(PurePosixPath(name).parts))
    return [DataFile(path, name) for name in inside if PurePosixPath(name).suffix == ".jsonl"]


def _archived(path: Path, member: str, faults: Faults) -> Iterator[tuple[int, Any]]:
    with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
        number = 0
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, _parsed(line, is_first=number == 1)
        except (zipfile.BadZipFile, OSError, EOFError) as error:
            faults.add(number + 1, f"the archive is damaged from here on: {error}")


def _parsed(line: bytes, *, is_first: bool) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig" if is_first else "utf-8"))
    except UnicodeDecodeError as error:
        return RowFault(f"not UTF-8: {error.reason}")
    except RowFault as fault:
        return fault


def _csv_rows(path: Path, faults: Faults) -> Iterator[tuple[int, Any]]:
    with InputFile(path) as file:
        try:
            content = b"".join(file.blocks()).decode("utf-8-sig")
        except RowFault as fault:
            faults.add(0, str(fault))
            return
        except UnicodeDecodeError as error:
            faults.add(0, f"not UTF-8: {error.reason}")
            return
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    most = csv.field_size_limit(MOST_BYTES)  # 131,072 characters otherwise: less than a long context
    try:
        for row in reader:
            yield reader.line_num, {str(key): value for key, value in row.items()}
    except csv.Error as error:
        faults.add(reader.line_num, f"not CSV: {error}")
    finally:
        csv.field_size_limit(most)


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from error
