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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from longlora_cli.storage import append_json_line, folder_lock, read_json_lines, write_text

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
    """

    def __init__(self, path: Path | None = None, others: Iterable[Path] = ()) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        for file in (*others, *([path] if path is not None else [])):
            _drop_torn_line(file)
            self._rows |= {row["key"]: row for row in read_json_lines(file)}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row of this key, if it is finished."""
        return self._rows.get(key)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished row; it must have a `key`. On disk once this returns, though not synced: a power
        loss may cost the last rows, a killed process none."""
        if self._path is not None:
            append_json_line(self._path, row)
        self._rows[row["key"]] = row


def working_folder(out: Path) -> Path:
    """Where the journal of an evaluation into `out` lives until it is committed."""
    return out.parent / f".{out.name}.partial"


@contextmanager
def open_journal(out: Path, shard: str | None = None) -> Iterator[Journal]:
    """The journal of `out`, held by this process.

    Args:
        out: The folder that the evaluation will make.
        shard: Name of a share of the evaluation. Its journal stays when the body ends; without a name, all journals are
            read, and are removed when the body ends without an error.

    Raises:
        SettingsError: Another process is evaluating into `out`, or into the same shard.
    """
    folder = working_folder(out)
    if shard is not None:
        folder /= _SHARD + shard
        with folder_lock(folder):
            yield Journal(folder / _FILE)
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
