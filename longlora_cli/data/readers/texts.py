"""Plain text: a file is one document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longlora_cli.data.document import Document
from longlora_cli.data.faults import Faults
from longlora_cli.data.readers.opening import MOST_HELD_BYTES, InputFile, character_bytes, decode_utf8
from longlora_cli.data.rows import RowFault


def read_text(path: Path) -> Iterator[Document]:
    """A whole file as one document; Windows' line ends become newlines.

    Raises:
        DataError: Bytes that are not UTF-8, NUL bytes (the first 20, with line and byte), or no text.
    """
    faults = Faults(str(path))
    with InputFile(path) as file:
        text = whole_text(file, faults)
        size_bytes = file.taken_bytes()
    if not len(faults) and (not text or text.isspace()):
        faults.add(1, "the file is empty")
    faults.raise_if_any()
    yield Document(str(path), text, size_bytes)


def whole_text(file: InputFile, faults: Faults) -> str:
    """All of a file's text.

    Decoded in blocks: in memory are the text twice at most, once in pieces and once joined.
    """
    parts: list[str] = []
    characters = held_bytes = 0
    width = 1
    try:
        for part in decode_utf8(file.blocks(), faults):
            parts.append(part)
            characters += len(part)
            width = max(width, character_bytes(part))
            held_bytes += character_bytes(part) * len(part)
            if held_bytes + characters * width > MOST_HELD_BYTES:
                raise RowFault(
                    f"the file takes more than {MOST_HELD_BYTES // 1_000_000:,} MB of memory while it is read, {width} "
                    "bytes a character and twice, which is more than one document may have"
                )
    except RowFault as fault:
        faults.add(1 + sum(part.count("\n") for part in parts), str(fault))
    if len(faults):
        return ""
    text = "".join(parts)
    parts.clear()
    return text.replace("\r\n", "\n")
