"""Finished pieces of a long evaluation, kept until the whole is committed.

The journal is a file of JSON lines in a working folder beside the output folder, `.<name>.partial`. A piece
is found again by its key, a hash of everything that decides its content, so that the same command continues
where a killed one stopped and another command never takes its pieces for its own. Each shard of an evaluation has a
journal of its own in a folder inside; an evaluation that is not sharded reads them all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from longlora_cli.evaluation.sharding import Shard
from longlora_cli.storage import append_json_line, folder_lock, read_json_lines, write_text

T = TypeVar("T")
_FILE = "journal.jsonl"
_SHARD = "shard-"


def key_of(*parts: Any) -> str:
    """SHA-256 of JSON values, in hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def hash_ids(ids: Sequence[int]) -> str:
    """SHA-256 of token ids, in hex."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


class Journal:
    """Finished rows by key; made by `open_journal`.

    Args:
        path: The file; None keeps the rows in memory only.
        others: Files whose rows are found too; nothing is added to them but the loss of a torn last line.
        shard: The share of the evaluation that this journal is for; None: all of it.
    """

    def __init__(
        self, path: Path | None = None, others: Iterable[Path] = (), *, shard: Shard | None = None
    ) -> None:
        self._path, self.shard = path, shard
        self._rows: dict[str, dict[str, Any]] = {}
        for file in (*others, *([path] if path is not None else [])):
            _drop_torn_line(file)
            self._rows |= {row["key"]: row for row in read_json_lines(file)}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def of_task(self, task: str) -> int:
        """How many rows a task has, those of its control included."""
        return sum(row.get("task") == task for row in self._rows.values())

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of this key, if it is finished."""
        return self._rows.get(key)

    def share(self, items: Iterable[T], text_of: Callable[[T], object] = lambda _: None) -> Iterable[T]:
        """Those of a task's items that this journal is for; see `Shard.of`."""
        return items if self.shard is None else self.shard.of(items, text_of)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished row; it must have a `key`. On disk once this returns, though not synced: a power
        loss may cost the last rows, a killed process none."""
        if self._path is not None:
            append_json_line(self._path, row)
        self._rows[row["key"]] = row


def peek(out: Path) -> Journal:
    """What the journals of `out`, and of its shares, hold now; nothing is locked, mended or kept."""
    folder, found = working_folder(out), Journal()
    for path in [folder / _FILE, *sorted(folder.glob(f"{_SHARD}*/{_FILE}"))]:
        for row in read_json_lines(path):
            found.add(row)
    return found


def working_folder(out: Path) -> Path:
    """Where the journal of an evaluation into `out` lives until it is committed."""
    return out.parent / f".{out.name}.partial"


@contextmanager
def open_journal(out: Path, shard: Shard | None = None) -> Iterator[Journal]:
    """The journal of `out`, held by this process.

    Args:
        out: The folder that the evaluation will make.
        shard: A share of the evaluation, whose journal stays when the body ends. Without one, the journals of all
            shares are read too, and all are removed when the body ends without an error.

    Raises:
        SettingsError: Another process is evaluating into `out`, or into the same shard.
    """
    folder = working_folder(out)
    if shard is not None:
        folder /= _SHARD + shard.name
        with folder_lock(folder):
            yield Journal(folder / _FILE, shard=shard)
        return
    with folder_lock(folder), ExitStack() as held:
        shards = sorted(folder.glob(_SHARD + "*"))
        for path in shards:
            held.enter_context(folder_lock(path))
        yield Journal(folder / _FILE, [path / _FILE for path in shards])
        shutil.rmtree(folder)


def _drop_torn_line(path: Path) -> None:
    # A process killed inside a write leaves a line without its end; the next row must not be glued to it.
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_text(path, whole.decode())
