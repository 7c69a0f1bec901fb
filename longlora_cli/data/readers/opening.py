"""Open an input file, compressed or not, and decode its UTF-8 while counting lines and bytes."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import itertools
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from longlora_cli.data.faults import MOST, Faults
from longlora_cli.data.rows import RowFault
from longlora_cli.errors import DataError

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed files that are read without unpacking them first."""

MOST_BYTES = 1 << 30
"""Largest cell of a table that evaluation reads."""

MOST_HELD_BYTES = 960_000_000
"""Memory for one text or row and the copies of it that reading makes."""

_BLOCK_BYTES = 1 << 20
_REPLACEMENT = "\ufffd"
# The marks of UTF-32 begin with those of UTF-16, so they come first.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


class InputFile:
    """A file as a stream of bytes, decompressed by its last suffix. A context manager.

    Args:
        path: The file.

    Raises:
        DataError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._raw = path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        self._stream = _decompressed(self._raw, path.suffix.lower())
        self._told = 0

    def __enter__(self) -> InputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not self._raw:
            self._stream.close()
        self._raw.close()

    def taken_bytes(self) -> int:
        """Bytes of the file, as it lies on disk, that were read since the last call."""
        at = self._raw.tell()
        taken, self._told = at - self._told, at
        return taken

    def blocks(self) -> Iterator[bytes]:
        """The content in blocks of 1 MiB.

        Raises:
            RowFault: The compressed data is damaged or cut off.
        """
        while block := self._read(self._stream.read, _BLOCK_BYTES):
            yield block

    def read_line(self) -> bytes:
        """The next line with its newline; empty at the end. It belongs to the caller alone.

        Raises:
            RowFault: The compressed data is damaged or cut off, or the line is longer than 480 MB.
        """
        most = MOST_HELD_BYTES // 2  # in parts while it is read, and then as one
        line = self._read(self._stream.readline, most + 1)
        if len(line) > most:
            raise RowFault(
                f"the line is longer than {most // 1_000_000} MB, which is more than one document may have"
            )
        return line

    def lines(self) -> Iterator[bytes]:
        """The content line by line, as `read_line` gives it.

        Raises:
            RowFault: As `read_line`.
        """
        while line := self.read_line():
            yield line

    def _read(self, read: Any, most_bytes: int) -> bytes:
        try:
            return cast(bytes, read(most_bytes))
        except (EOFError, lzma.LZMAError, zlib.error, OSError, ValueError) as error:
            what = "cut off or damaged" if self._stream is not self._raw else "unreadable"
            raise RowFault(f"the file is {what} from here on: {first_line(error)}") from error


def _decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb"))
    if suffix == ".bz2":
        return cast(IO[bytes], bz2.BZ2File(raw))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.LZMAFile(raw))
    if suffix == ".zst":
        import pyarrow as pa  # its own zstd; Python has one from 3.14

        stream: Any = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        return cast(IO[bytes], io.BufferedReader(stream, _BLOCK_BYTES))
    return raw


def decode_utf8(blocks: Iterable[bytes], faults: Faults) -> Iterator[str]:
    """Decode blocks of a file (of any size, or its lines), one text a block.

    A byte order mark of UTF-8 is left out. Bytes that are not UTF-8 and NUL bytes are noted as faults with
    line and byte offset, and read as U+FFFD, so that all of a file's faults are found in one pass.

    Args:
        blocks: The file from its beginning.
        faults: Gets what is wrong. When it is full, or the file is UTF-16 or UTF-32, decoding ends.
    """
    offset, line, rest = 0, 1, b""
    for block in itertools.chain(blocks, [None]):
        data = rest + (block or b"")
        is_end = block is None
        if offset == 0:
            if len(data) < 4 and not is_end:
                rest = data
                continue
            if note_other_encoding(data, faults):
                return
        text, used = _decode(data, faults, offset=offset, line=line, is_end=is_end)
        line += data.count(b"\n", 0, used)
        # A mark is removed once, at the first byte; after it the offset is above 0.
        yield text.removeprefix("\ufeff") if offset == 0 else text
        offset, rest = offset + used, data[used:]
        if faults.is_full:
            return


def character_bytes(text: str) -> int:
    """Memory that each character of a text takes: 1, 2 or 4 bytes, by the highest of them."""
    if text.isascii():
        return 1
    if len(text) < 64:  # so short a text's own size says little
        top = ord(max(text))
        return 1 if top < 1 << 8 else 2 if top < 1 << 16 else 4
    return (sys.getsizeof(text) - sys.getsizeof("")) // len(text)


def decoded_bytes(data: bytes) -> tuple[int, int]:
    """Memory that UTF-8 takes as text, and in parts that backslashes end, found without making either.

    The second is an upper bound: a character that takes 4 bytes counts for all from one block with a backslash to the
    next. Bytes that are not UTF-8 count as characters.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    characters, width, parts_bytes, part_characters, part_width = 0, 1, 0, 0, 1
    for start in range(0, len(data), _BLOCK_BYTES):
        text = decoder.decode(data[start : start + _BLOCK_BYTES])
        own_width = character_bytes(text)
        characters, width = characters + len(text), max(width, own_width)
        part_characters, part_width = part_characters + len(text), max(part_width, own_width)
        if "\\" in text:
            rest = len(text) - 1 - text.rindex("\\")
            parts_bytes += (part_characters - rest) * part_width
            part_characters, part_width = rest, own_width
    return characters * width, parts_bytes + part_characters * part_width


def note_other_encoding(data: bytes, faults: Faults) -> bool:
    """Note a file that says that it is UTF-16 or UTF-32; True when it does."""
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            reason = f"the file begins with the byte order mark of {encoding}, and files are read as UTF-8"
            command = f"iconv -f {encoding} -t UTF-8 {faults.name} > utf-8.txt"
            faults.add(1, reason, hint=f"Convert it: {command}")
            return True
    return False


def _decode(data: bytes, faults: Faults, *, offset: int, line: int, is_end: bool) -> tuple[str, int]:
    """The text of `data` and how many of its bytes it took: a sequence may go on in the next block."""
    parts: list[str] = []
    found: list[tuple[int, str]] = []
    start = 0
    while True:
        try:
            text, used = codecs.utf_8_decode(data[start:] if start else data, "strict", is_end)
        except UnicodeDecodeError as error:
            at = start + error.start
            parts += [data[start:at].decode("utf-8"), _REPLACEMENT]
            found.append((at, not_utf8(data, at, offset)))
            start += error.end
            if len(found) < MOST:
                continue
            text, used = "", len(data) - start
        parts.append(text)
        break
    if b"\0" in data:
        at = data.find(b"\0")
        while at >= 0 and len(found) < 2 * MOST:
            found.append((at, f"byte {offset + at} is NUL"))
            at = data.find(b"\0", at + 1)
        parts = [part.replace("\0", _REPLACEMENT) for part in parts]
    for at, reason in sorted(found):
        faults.add(line + data.count(b"\n", 0, at), reason)
    return (parts[0] if len(parts) == 1 else "".join(parts)), start + used


def not_utf8(data: bytes, at: int, offset: int = 0) -> str:
    """Why the byte at `at` of `data`, which begins at byte `offset` of its file, is not UTF-8."""
    if data[at] == 0xED and at + 2 < len(data) and 0xA0 <= data[at + 1] <= 0xBF:
        code = 0xD000 | (data[at + 1] & 0x3F) << 6 | data[at + 2] & 0x3F
        return f"byte {offset + at} is half a surrogate pair (U+{code:04X}), not UTF-8"
    return f"byte {offset + at} is not UTF-8"


def first_line(error: Exception) -> str:
    """The first line of a library's error, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
