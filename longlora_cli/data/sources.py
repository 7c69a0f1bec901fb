"""Find the user's inputs: files, folders, globs, datasets, with samples and weights."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from longlora_cli.data.document import Document, Source
from longlora_cli.data.readers import READERS, has_rows, kind_of, reader_of
from longlora_cli.data.readers.opening import first_line
from longlora_cli.data.readers.tables import read_dataset
from longlora_cli.errors import DataError, NotFoundError, SettingsError
from longlora_cli.storage import is_artifact, read_manifest

_WEIGHT = re.compile(r"(?P<name>.+)=(?P<weight>\d+\.?\d*|\.\d+)")
_SAMPLE = re.compile(r"(?P<name>.+)\[(?P<count>\d+)\]")
_HUB = "hf:"


def find_sources(
    inputs: list[str], *, split: str, stream: bool = False, format: str | None = None
) -> list[Source]:
    """Look at every input without reading its documents.

    Args:
        inputs: Files, folders, globs, saved datasets, `hf:NAME`; each may end in `[N]` for a sample of N
            documents and then in `=W` for its share in a mixture. A file that has the whole name is that file.
        split: Split of hub and saved datasets.
        stream: Read hub datasets over the network as they are needed, without a copy on disk.
        format: What the rows of files and datasets are; None finds it for each row.

    Raises:
        DataError: An input is missing, of an unknown kind, or prepared already.
        NotFoundError: A hub dataset that cannot be had.
        SettingsError: Weights for some inputs only, a weight of nothing, nothing to stream, or a format and no rows.
    """
    sources = [_source(name, split, stream, format) for name in inputs]
    if stream and not any(source.name.startswith(_HUB) for source in sources):
        raise SettingsError("--stream has no effect: no input is a hub dataset (hf:NAME)")
    if format and not any(source.has_rows for source in sources):
        raise SettingsError(f"--format {format} has no effect: no input has rows (JSON, tables, datasets)")
    unweighted = [source.name for source in sources if source.weight is None]
    if unweighted and len(unweighted) < len(sources):
        raise SettingsError(
            f"{unweighted[0]} has no weight, and other inputs have one",
            rule="In a mixture every input has its weight.",
            hint=f"Write {unweighted[0]}=0.5, or leave the weights out.",
        )
    return sources


def _source(whole: str, split: str, stream: bool, format: str | None) -> Source:
    name, weight, sample = whole, None, None
    if not Path(name).exists() and (match := _WEIGHT.fullmatch(name)):
        name, weight = match["name"], float(match["weight"])
        if not weight:
            raise SettingsError(f"{whole}: a weight of nothing", hint=f"Leave {name} out instead.")
    if not Path(name).exists() and (match := _SAMPLE.fullmatch(name)):
        name, sample = match["name"], int(match["count"])
    return replace(_find(name, split, stream, format), sample=sample, weight=weight)


def _find(name: str, split: str, stream: bool, format: str | None) -> Source:
    if name.startswith(_HUB):
        return _hub_dataset(name, split, stream, format)
    path = Path(name)
    if path.is_dir():
        return _folder(path, split, format)
    if path.exists():
        return _file(path, format)
    if glob.has_magic(name):
        found = sorted(glob.glob(name, recursive=True))
        return _together(name, [Path(path) for path in found], format)
    raise DataError(f"{path}: no such file or folder")


def _file(path: Path, format: str | None) -> Source:
    read = partial(reader_of(path, format=format), path)
    return Source(str(path), read, path.stat().st_size, files=(path,), has_rows=has_rows(path))


def _together(name: str, paths: list[Path], format: str | None) -> Source:
    """Files as one source; those of other kinds are left out."""
    readable = [path for path in paths if path.is_file() and kind_of(path)]
    left_out = [path for path in paths if not path.is_dir() and not (path.is_file() and kind_of(path))]
    if not readable:
        where = "in this folder" if Path(name).is_dir() else "of this name"
        raise DataError(f"{name}: no {', '.join(READERS)} file {where}")
    sources = [_file(path, format) for path in readable]

    def read() -> Iterator[Document]:
        for source in sources:
            yield from source.read()

    size_bytes = sum(source.size_bytes for source in sources)
    return Source(
        name,
        read,
        size_bytes,
        left_out=tuple(map(str, left_out)),
        files=tuple(readable),
        has_rows=any(map(has_rows, readable)),
    )


def _folder(path: Path, split: str, format: str | None) -> Source:
    if is_artifact(path):
        kind = read_manifest(path).kind
        hint = f"Give it to longlora train --data {path}." if kind == "dataset" else None
        what = "prepared data already" if kind == "dataset" else f"a finished {kind}"
        raise DataError(f"{path} is {what}, not documents", hint=hint)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_dataset(path, split, format)
    files: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        files += [Path(folder) / name for name in sorted(names) if not name.startswith(".")]
    return _together(str(path), files, format)


def _saved_dataset(path: Path, split: str, format: str | None) -> Source:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError) as error:  # among them an empty one's IndexError
        raise DataError(f"{path}: not a dataset that can be read: {first_line(error)}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"{path} has no split {split!r}", hint=f"--split {' or '.join(sorted(dataset))}.")
        dataset = dataset[split]
    files = tuple(sorted(file for file in path.rglob("*") if file.is_file()))
    return Source(
        str(path), partial(read_dataset, str(path), dataset, format=format), files=files, has_rows=True
    )


def _hub_dataset(name: str, split: str, stream: bool, format: str | None) -> Source:
    import datasets

    try:
        dataset = datasets.load_dataset(name.removeprefix(_HUB), split=split, streaming=stream)
    except (OSError, ValueError) as error:
        raise _not_had(name, split, error) from error
    return Source(name, partial(_read_hub, name, split, dataset, format), has_rows=True)


def _read_hub(name: str, split: str, dataset: Any, format: str | None) -> Iterator[Document]:
    """A stream's rows come over the network, which may end at any of them."""
    try:
        yield from read_dataset(name, dataset, format=format)
    except OSError as error:
        raise _not_had(name, split, error) from error


def _not_had(name: str, split: str, error: Exception) -> NotFoundError:
    # Offline, unknown or private: datasets raises subclasses of OSError and ValueError.
    return NotFoundError(
        f"{name} (split {split}) cannot be had: {first_line(error)}",
        hint="Check the name and the split; without a network, save the dataset to a folder first.",
    )
