"""What readers give: documents, and the sources that they are read from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlora_cli.data.chat_template import Message


@dataclass(frozen=True)
class Document:
    """A source text or chat.

    Args:
        source: Where it comes from: `file`, `file:line` or `dataset:row`.
        content: A text, or the messages of a chat.
        size_bytes: What it took in its file, compressed as it lies there; 0 where that is not known.
        format: The format of the row that it was; None for a file that is one document, and for what was made.
        tools: What a chat may call, as its template is told.
    """

    source: str
    content: str | list[Message]
    size_bytes: int = 0
    format: str | None = None
    tools: list[dict[str, Any]] | None = None

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
        weight: Its share in a mixture, beside the other sources' weights; None without a mixture.
        left_out: Files of a folder that are of no kind that can be read.
        files: What it is read from, in order; empty for a hub dataset.
        has_rows: Some of its documents are rows, of one format or another.
    """

    name: str
    read: Callable[[], Iterator[Document]]
    size_bytes: int = 0
    sample: int | None = None
    weight: float | None = None
    left_out: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    has_rows: bool = False
