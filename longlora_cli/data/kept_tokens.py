"""Tokens that outlive the process which made them, so that an interrupted `prepare` goes on where it was.

The tokens of a group of pieces (`tokenizing`) are one file, named by the SHA-256 of the text that they were made from
and beginning with a checksum of all that follows. So no order and no journal is needed: whoever has the same text to
tokenize finds the file or makes it, and a damaged file, or one of other text, is never taken. What ids depend on
besides the text (tokenizer, template, labels) is the folder's key: with another one the folder is emptied.

Costs 4 bytes of disk a token (8 in chats), and of time two hashes and a file: 1 % beside tokenizing.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from longlora_cli.data.chunk import Int32
from longlora_cli.storage import commit_bytes, write_json

Tokens = tuple[Int32, "Int32 | None"]
"""Ids of a piece of text, or ids and labels of a chat."""

_KEY, _SUFFIX = "key.json", ".tokens"
# Checksum of the rest; name; bytes of the input files that it stands for; tokens; items.
_HEADER = struct.Struct("<32s32sqqq")
_UNLABELLED = -1


class Amount(NamedTuple):
    """Some tokens, and the bytes of the input files that they stand for."""

    input_bytes: int
    tokens: int


class KeptTokens:
    """The tokens kept in a folder.

    Args:
        folder: Held by this process alone (`storage.workspace`).
        key: What ids depend on besides their text, by name; waited for only when it is needed.

    Attributes:
        folder: The folder.
        replaced: Names of the key's parts that differ from those of tokens found there, which were removed.
        found: How much was found.
        damaged: Files that were found, did not verify, and were made again.
    """

    def __init__(self, folder: Path, key: Future[dict[str, Any]]) -> None:
        self.folder = folder
        self._key = key
        self._writing, self._key_written = Lock(), False
        self.replaced: list[str] = []
        self.damaged = 0
        self._clean()
        self.found = self.amount()

    def _files(self) -> Iterator[Path]:
        return self.folder.glob(f"*{_SUFFIX}")

    def _clean(self) -> None:
        if next(self._files(), None) is None:
            return
        before = _read_key(self.folder / _KEY)
        now = self._key.result()
        self.replaced = [name for name in now if before.get(name) != now[name]]
        if self.replaced:
            for path in self._files():
                path.unlink()

    def amount(self) -> Amount:
        """How much is kept by now."""
        headers = [_read_header(path) for path in self._files()]
        return Amount(sum(header[2] for header in headers), sum(header[3] for header in headers))

    def get(self, name: bytes, items: int) -> list[Tokens] | None:
        """The tokens kept under a name, verified; None if there are none.

        Args:
            name: SHA-256 of what the tokens were made from.
            items: How many pieces and chats it has.
        """
        path = self.folder / (name.hex() + _SUFFIX)
        try:
            content = bytearray(path.read_bytes())
        except FileNotFoundError:
            return None
        found = _unpacked(content, name, items)
        self.damaged += found is None
        return found

    def put(self, name: bytes, tokens: list[Tokens], input_bytes: int) -> None:
        """Keep tokens under a name.

        Raises:
            ResourceError: The disk is full.
        """
        self._write_key()
        lengths = [(len(ids), _UNLABELLED if labels is None else len(labels)) for ids, labels in tokens]
        arrays = [array for pair in tokens for array in pair if array is not None]
        body = np.concatenate([np.array(lengths, dtype=np.int32).ravel(), *arrays])
        count = sum(length for length, _ in lengths)
        header = _HEADER.pack(bytes(32), name, input_bytes, count, len(tokens))[32:]
        digest = hashlib.sha256(header)
        digest.update(body.data)
        commit_bytes(self.folder / (name.hex() + _SUFFIX), [digest.digest(), header, body.data])

    def _write_key(self) -> None:
        """Before any tokens, and not before the key is known: its hashes are computed while texts are tokenized."""
        with self._writing:
            if not self._key_written:
                write_json(self.folder / _KEY, self._key.result())
                self._key_written = True


def _read_header(path: Path) -> tuple[bytes, bytes, int, int, int]:
    with path.open("rb") as file:
        data = file.read(_HEADER.size)
    return _HEADER.unpack(data) if len(data) == _HEADER.size else (b"", b"", 0, 0, 0)


def _read_key(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # lost with the power; then nobody knows what the tokens are of
        return {}
    return content if isinstance(content, dict) else {}


def _unpacked(content: bytearray, name: bytes, items: int) -> list[Tokens] | None:
    if len(content) < _HEADER.size or hashlib.sha256(memoryview(content)[32:]).digest() != content[:32]:
        return None
    _, found_name, _, _, found_items = _HEADER.unpack_from(content)
    if found_name != name or found_items != items:
        return None
    body = np.frombuffer(content, dtype=np.int32, offset=_HEADER.size)
    lengths = body[: 2 * items].reshape(items, 2)
    tokens: list[Tokens] = []
    at = 2 * items
    for ids_length, labels_length in lengths.tolist():
        ids, at = body[at : at + ids_length], at + ids_length
        labels = None
        if labels_length != _UNLABELLED:
            labels, at = body[at : at + labels_length], at + labels_length
        tokens.append((ids, labels))
    return tokens
