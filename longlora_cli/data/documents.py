"""Find the user's inputs and read them as documents, one at a time.

Every input becomes a `Source`; adding a format means adding one reader to `_READERS`.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from longlora_cli.data.chat_template import Message
from longlora_cli.data.faults import Faults
from longlora_cli.data.rows import RowFault, checked_text, read_row
from longlora_cli.errors import DataError, NotFoundError
from longlora_cli.storage import is_artifact, read_manifest

_SAMPLE = re.compile(r"(?P<path>.+)\[(?P<count>\d+)\]")
_HUB = "hf:"


@dataclass(frozen=True)
class Document:
    """A source text or chat.

    Args:
        source: Where it comes from: `file`, `file:line` or `dataset:row`.
        content: A text, or the messages of a chat.
        size_bytes: What it took in its file; 0 where that is not known.
    """

    source: str
    content: str | list[Message]
    size_bytes: int = 0

    @property
    def is_chat(self) -> bool:
        """True for turns of a conversation, False for plain text."""
        return not isinstance(self.content, str)


@dataclass(frozen=True)
class Source:
    """Something to read documents from, as often as needed.

    Args:
        name: As the user named it.
        read: Starts reading from the beginning.
        size_bytes: Size of the file, for progress.
        sample: Take this many documents, chosen by the seed; None takes all.
        left_out: Files of a folder that are of no kind that can be read.
    """

    name: str
    read: Callable[[], Iterator[Document]]
    size_bytes: int = 0
    sample: int | None = None
    left_out: tuple[str, ...] = ()


def find_sources(inputs: list[str], *, split: str) -> list[Source]:
    """Look at every input without reading its documents.

    Args:
        inputs: Files, folders, saved datasets, `hf:NAME`; each may end in `[N]` for a sample of N documents.
        split: Split of hub and saved datasets.

    Raises:
        DataError: An input is missing, of an unknown kind, or prepared already.
        NotFoundError: A hub dataset that cannot be had.
    """
    sources = []
    for name in inputs:
        match = None if Path(name).exists() else _SAMPLE.fullmatch(name)
        source = _find(match["path"] if match else name, split)
        sources.append(replace(source, sample=int(match["count"])) if match else source)
    return sources


def read_documents(sources: list[Source], *, seed: int) -> Iterator[Document]:
    """Read all sources in order; only samples (`[N]`) are read twice, the first time to count.

    Raises:
        DataError: The first source with faults; up to 20 of them are told at once. Also a sample larger than
            its source.
    """
    for number, source in enumerate(sources):
        if source.sample is None:
            yield from source.read()
            continue
        count = sum(1 for _ in source.read())
        if source.sample > count:
            raise DataError(
                f"{source.name}[{source.sample}]: there are only {count} documents",
                hint=f"Leave out [{source.sample}] to take all.",
            )
        rng = random.Random(f"{seed}:sample:{number}")
        chosen = set(rng.sample(range(count), source.sample))
        yield from (document for index, document in enumerate(source.read()) if index in chosen)


def _find(name: str, split: str) -> Source:
    if name.startswith(_HUB):
        return _hub_dataset(name, split)
    path = Path(name)
    if path.is_dir():
        return _folder(path, split)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    return _file(path)


def _file(path: Path) -> Source:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: {path.suffix or 'a file without suffix'} is not a kind of document that can be read",
            rule=f"Documents are {', '.join(_READERS)} files, folders of them, and datasets.",
        )
    return Source(str(path), partial(reader, path), path.stat().st_size)


def _folder(path: Path, split: str) -> Source:
    if is_artifact(path):
        kind = read_manifest(path).kind
        hint = f"Give it to longlora train --data {path}." if kind == "dataset" else None
        what = "prepared data already" if kind == "dataset" else f"a finished {kind}"
        raise DataError(f"{path} is {what}, not documents", hint=hint)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_dataset(path, split)
    files: list[Path] = []
    left_out: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in (Path(folder) / name for name in sorted(names) if not name.startswith(".")):
            (files if file.suffix.lower() in _READERS else left_out).append(file)
    if not files:
        raise DataError(f"{path}: no {', '.join(_READERS)} file in this folder")
    sources = [_file(file) for file in files]

    def read() -> Iterator[Document]:
        for source in sources:
            yield from source.read()

    return Source(
        str(path), read, sum(s.size_bytes for s in sources), left_out=tuple(str(file) for file in left_out)
    )


def _read_text(path: Path) -> Iterator[Document]:
    """A whole file as one document."""
    raw = path.read_bytes()
    faults = Faults(str(path))
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
        checked_text(text, "the file")
    except UnicodeDecodeError as error:
        faults.add(raw.count(b"\n", 0, error.start) + 1, f"byte {error.start} is not UTF-8")
    except RowFault as fault:
        line = text.count("\n", 0, max(text.find("\0"), 0)) + 1
        faults.add(line, str(fault))
    faults.raise_if_any()
    yield Document(str(path), text, len(raw))


def _read_json_lines(path: Path) -> Iterator[Document]:
    """One document per line; blank lines are passed over."""
    faults = Faults(str(path))
    documents = start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if faults.is_full:
                break
            try:
                row = _parse(line, is_first=number == 1, start=start)
                content = None if row is None else read_row(row)
            except RowFault as fault:
                faults.add(number, str(fault))
                content = None
            start += len(line)
            if content is not None:
                documents += 1
                if not len(faults):
                    yield Document(f"{path}:{number}", content, len(line))
    if not documents and not len(faults):
        faults.add(1, "the file is empty")
    faults.raise_if_any()


def _parse(line: bytes, *, is_first: bool, start: int) -> Any:
    """The JSON of one line that begins at byte `start` of its file; None for a blank line."""
    try:
        text = line.decode("utf-8-sig" if is_first else "utf-8").strip()
        return json.loads(text) if text else None
    except UnicodeDecodeError as error:
        raise RowFault(f"byte {start + error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise RowFault(f"column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise RowFault("not JSON that can be read: nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise RowFault(f"not JSON that can be read: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_json_lines,
}


def _read_rows(name: str, dataset: Any) -> Iterator[Document]:
    faults = Faults(name)
    for number, row in enumerate(dataset, start=1):
        if faults.is_full:
            break
        try:
            content = read_row({key: value for key, value in row.items() if value is not None})
        except RowFault as fault:
            faults.add(number, str(fault))
            continue
        if not len(faults):
            yield Document(f"{name}:{number}", content)
    faults.raise_if_any()


def _saved_dataset(path: Path, split: str) -> Source:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a dataset that can be read: {_first_line(error)}") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"{path} has no split {split!r}", hint=f"--split {' or '.join(sorted(dataset))}.")
        dataset = dataset[split]
    if not len(dataset):
        raise DataError(f"{path}: the dataset is empty")
    return Source(str(path), partial(_read_rows, str(path), dataset))


def _hub_dataset(name: str, split: str) -> Source:
    import datasets

    try:
        dataset = datasets.load_dataset(name.removeprefix(_HUB), split=split)
    except (OSError, ValueError) as error:
        # Offline, unknown or private: datasets raises subclasses of these two.
        raise NotFoundError(
            f"{name} (split {split}) cannot be had: {_first_line(error)}",
            hint="Check the name and the split; without a network, save the dataset to a folder first.",
        ) from error
    return Source(name, partial(_read_rows, name, dataset))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
