"""JSON: lines of rows, or one array of rows, read a row at a time.

The array is not read by an event parser such as ijson, which would be one more dependency: the standard
library's scanner decodes one value from the middle of a text and tells where it ended, so that a row costs the
memory of a row, a fault has its line, and both kinds of file follow the same rules.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longlora_cli.data.document import Document
from longlora_cli.data.faults import Faults, shown
from longlora_cli.data.readers.opening import (
    MOST_HELD_BYTES,
    InputFile,
    character_bytes,
    decode_utf8,
    decoded_bytes,
    not_utf8,
    note_other_encoding,
)
from longlora_cli.data.readers.row_loop import NumberedRow, documents_of
from longlora_cli.data.row_values import RowFault
from longlora_cli.data.strict_json import Decoder, end_of_space, objects_bytes, parse_json

# A shorter line takes less memory than there is for one, whatever is in it: two bytes of `[]` and a comma become 72.
_LONG_BYTES = MOST_HELD_BYTES // 40
# An error this near to the end of what was read may only mean that more must be read: 16 characters are longer
# than any literal or escape (\ud83d\ude00 has 12).
_CUT_CHARACTERS = 16


def read_json_lines(path: Path, *, format: str | None = None) -> Iterator[Document]:
    """One document per line; blank lines are passed over.

    Args:
        path: The file.
        format: What the rows are; None finds it.

    Raises:
        DataError: The first 20 lines that cannot be used.
    """
    faults = Faults(str(path))
    yield from documents_of(json_lines(path, faults), faults, format, empty="the file is empty")


def json_lines(path: Path, faults: Faults) -> Iterator[NumberedRow]:
    """The values of the lines that are not blank, compressed files' too; a line that is no JSON gives its fault.

    Args:
        path: The file.
        faults: Is given what ends the reading: another encoding, a damaged compressed file, a line above 480 MB.
    """
    start = number = 0
    with InputFile(path) as file:
        while not faults.is_full:
            number += 1
            line = _next_line(file, faults, number)
            if not line:
                break
            try:
                start, at = start + len(line), start
                text = _decode_line(line, is_first=number == 1, start=at)
                line = b""  # a line of 100 MB, and 400 MB as text with an emoji, is held once
                if not text or text.isspace():
                    continue
                value = parse_json(text)
            except RowFault as fault:
                value = fault
            text = ""
            taken = (number, value, file.taken_bytes())
            del value
            yield taken
            del taken


def _next_line(file: InputFile, faults: Faults, number: int) -> bytes:
    """The next line; empty where reading ends, which a fault may be the reason for."""
    try:
        line = file.read_line()
    except RowFault as fault:
        faults.add(number, str(fault))
        return b""
    return b"" if number == 1 and note_other_encoding(line, faults) else line


def _decode_line(line: bytes, *, is_first: bool, start: int) -> str:
    """The text of a line that begins at byte `start` of its file, without its end."""
    mark = len(codecs.BOM_UTF8) if is_first and line.startswith(codecs.BOM_UTF8) else 0
    end = len(line)
    while end > mark and line[end - 1] in b"\r\n":
        end -= 1
    if end > _LONG_BYTES:
        _refuse_too_long(line)
    try:
        # Of a view: a copy of a line of 400 MB without its end is another 400 MB.
        text, _ = codecs.utf_8_decode(memoryview(line)[mark:end], "strict", True)
    except UnicodeDecodeError as error:
        raise RowFault(not_utf8(line, mark + error.start, start)) from error
    if "\0" in text:
        raise RowFault(f"byte {start + line.index(0)} is NUL")
    return text


def _refuse_too_long(line: bytes) -> None:
    """Raise where a row takes more memory than there is for one: it is there as bytes and as text, then as text and as
    value, and with escapes in it the value is put together from its parts.
    """
    text_bytes, parts_bytes = decoded_bytes(line)
    value_bytes = text_bytes + parts_bytes if b"\\" in line else text_bytes
    held_bytes = text_bytes + max(len(line), value_bytes)
    if held_bytes <= MOST_HELD_BYTES:
        held_bytes = max(held_bytes, text_bytes + objects_bytes(line, MOST_HELD_BYTES - text_bytes))
    if held_bytes > MOST_HELD_BYTES:
        raise RowFault(
            f"the line takes {held_bytes // 1_000_000:,} MB of memory while it is read, and one document may take "
            f"{MOST_HELD_BYTES // 1_000_000}",
            hint="Make it several rows, or a text file of its own.",
        )


def read_json(path: Path, *, format: str | None = None) -> Iterator[Document]:
    """The rows of an array, or objects one after another, of which one alone is a file of one row.

    Args:
        path: The file.
        format: What the rows are; None finds it.

    Raises:
        DataError: The first 20 rows that cannot be used; after a fault of the syntax nothing more is read.
    """
    faults = Faults(str(path))
    with InputFile(path) as file:
        rows = (
            (line, value, file.taken_bytes()) for line, value in _rows(_Scanner(_parts(file, faults)), faults)
        )
        yield from documents_of(rows, faults, format, empty="there is no row in the file")


def json_values(path: Path, faults: Faults) -> Iterator[tuple[int, Any]]:
    """Line and value of each row of an array, or of objects one after another; a row that is no JSON gives its fault.

    Args:
        path: The file.
        faults: Is given what ends the reading.
    """
    with InputFile(path) as file:
        yield from _rows(_Scanner(_parts(file, faults)), faults)


def _parts(file: InputFile, faults: Faults) -> Iterator[str]:
    lines = 1
    try:
        for part in decode_utf8(file.blocks(), faults):
            lines += part.count("\n")
            yield part
    except RowFault as fault:
        faults.add(lines, str(fault))


class _Scanner:
    """Values out of a text that comes in parts, with the line of each.

    Args:
        parts: The text.
    """

    def __init__(self, parts: Iterator[str]) -> None:
        self.decoder = Decoder()
        self.line = 1
        self._parts = parts
        self._text = ""
        self._at = 0
        self._is_whole = False

    def next_character(self) -> str:
        """The next character that is no space, left where it is; empty at the end."""
        while True:
            end = end_of_space(self._text, self._at)
            self._go_to(end)
            if end < len(self._text):
                return self._text[end]
            if not self._read_more():
                return ""

    def skip(self) -> None:
        """Pass over one character."""
        self._at += 1

    def value(self) -> Any:
        """The value that begins here.

        Raises:
            RowFault: Not JSON; `line` is then where.
        """
        while True:
            try:
                value, end = self.decoder.value(self._text, self._at)
            except json.JSONDecodeError as error:
                ahead = error.pos - self._at
                is_cut = error.msg.startswith("Unterminated string") or (
                    error.pos >= len(self._text) - _CUT_CHARACTERS
                )
                if is_cut and self._read_more():
                    continue
                self._go_to(self._at + ahead)
                raise RowFault(f"not JSON: {error.msg.removesuffix(' at')}") from error
            ahead = end - self._at
            if end == len(self._text) and self._read_more():
                continue  # a number may go on
            self._go_to(self._at + ahead)
            return value

    def _go_to(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _read_more(self) -> bool:
        """Read at least a quarter of what waits, so that a long value is tried few times.

        Raises:
            RowFault: The value takes more memory than there is for one row.
        """
        parts = [self._text[self._at :]]
        self._text, self._at = "", 0
        wanted = len(parts[0]) // 4
        more = 0
        while more <= wanted and not self._is_whole:
            part = next(self._parts, None)
            self._is_whole = part is None
            parts.append(part or "")
            more += len(parts[-1])
        width = max(map(character_bytes, filter(None, parts)), default=1)
        held_bytes = sum(character_bytes(part) * len(part) for part in parts if part)
        joined_bytes = width * sum(map(len, parts))
        # Then the value is made, of parts where it has escapes, and its UTF-8 looked at.
        held_bytes = max(held_bytes, 2 * joined_bytes)
        if held_bytes + joined_bytes <= MOST_HELD_BYTES:
            self._text = "".join(parts)
            if len(self._text) > _LONG_BYTES:
                held_bytes = max(held_bytes, objects_bytes(self._text, MOST_HELD_BYTES - joined_bytes))
        if held_bytes + joined_bytes > MOST_HELD_BYTES:
            raise RowFault(
                f"a row takes more than {MOST_HELD_BYTES // 1_000_000} MB of memory while it is read, which is more "
                "than one document may have",
                hint="Make it several rows, or a text file of its own.",
            )
        return more > 0


def _rows(scanner: _Scanner, faults: Faults) -> Iterator[tuple[int, Any]]:
    """Line and value of each row until the faults are full or the syntax is lost."""
    try:
        is_array = scanner.next_character() == "["
        if is_array:
            scanner.skip()
        while not faults.is_full and (character := scanner.next_character()):
            if is_array and character == "]":
                break
            line = scanner.line
            yield line, _checked(scanner.value(), scanner.decoder)
            if is_array and scanner.next_character() == ",":
                scanner.skip()
                if scanner.next_character() == "]":
                    raise RowFault("not JSON: a comma before the end of the array")
            elif is_array and scanner.next_character() != "]":
                break
        if is_array and not faults.is_full:
            _end_of_array(scanner)
    except RowFault as fault:
        faults.add(scanner.line, str(fault), hint=fault.hint)


def _checked(value: Any, decoder: Decoder) -> Any:
    """The value, or the fault that it is although it could be decoded."""
    try:
        decoder.raise_if_noted()
    except RowFault as fault:
        return fault
    return value


def _end_of_array(scanner: _Scanner) -> None:
    character = scanner.next_character()
    if not character:
        raise RowFault("not JSON: the array of rows is not closed, the file ends here")
    if character != "]":
        raise RowFault(f"not JSON: {shown(character)} where a comma or ] is needed")
    scanner.skip()
    if character := scanner.next_character():
        raise RowFault(f"not JSON: {shown(character)} after the end of the array")
