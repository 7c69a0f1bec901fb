"""Small fingerprints of documents: equal ones of equal texts, similar ones of similar texts.

A digest is of the text but for its white space. A signature estimates which share of the 5-word runs of two texts both
have (their Jaccard similarity): of 128 slots so many agree, with a standard error of 0.035 at a similarity of 0.8.
Signatures are MinHash (Broder 1997), computed by rensa.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from longlora_cli.data.chat_template import Message
from longlora_cli.data.document import Document
from longlora_cli.data.overlap import WORD
from longlora_cli.errors import SettingsError

DIGEST_BYTES = 16
"""128 bits: that two of ten million texts agree by chance has odds of 1 to 10^24."""

SLOTS = 128
SIGNATURE = 2 * SLOTS
"""Numbers of a signature: slots of the whole, and slots of a chat's answers."""

RUN_WORDS = 5
_SEED = 1
# Text that is worked on at once: 40 MB with its words and runs, whatever a text's length.
_CHARACTERS_AT_ONCE = 1 << 20

Slots = npt.NDArray[np.uint32]


def require_signatures() -> None:
    """Refuse at once where signatures cannot be made.

    Raises:
        SettingsError: rensa is not installed.
    """
    if importlib.util.find_spec("rensa") is None:
        raise SettingsError(
            "--dedup near compares with rensa, which is not installed",
            hint="pip install 'longlora-cli[dedup]', or --dedup exact, which needs nothing.",
        )


def digest(document: Document) -> bytes:
    """16 bytes, the same for documents that differ in white space alone; a chat's roles, calls and tools count."""
    found = blake2b(digest_size=DIGEST_BYTES)
    for part in _parts(document):
        for piece in _without_space(part):
            found.update(piece.encode("utf-8", "surrogatepass"))
        found.update(b"\xff")  # no byte of UTF-8: parts do not run into each other
    return found.digest()


def signature(document: Document, digest: bytes) -> Slots:
    """What a document has in common with others, uint32 `[SIGNATURE]`.

    Chats have slots for their answers alone, too: questions about one long context are not alike because the context
    is the same. Case and punctuation do not count. Where there is no word, as in a row of emoji, only equal
    documents have slots in common.

    Args:
        document: A text or chat.
        digest: Its `digest`.
    """
    whole = _slots(_parts(document), digest)
    if isinstance(document.content, str):
        return np.concatenate([whole, np.zeros(SLOTS, np.uint32)])
    answers = (message for message in document.content if message["role"] == "assistant")
    return np.concatenate([whole, _slots((part for each in answers for part in _said(each)), digest)])


def characters_of(document: Document) -> int:
    """Characters of a text, or of all messages of a chat."""
    content = document.content
    return len(content) if isinstance(content, str) else sum(len(message["content"]) for message in content)


def _parts(document: Document) -> Iterator[str]:
    content = document.content
    if isinstance(content, str):
        yield content
        return
    for message in content:
        yield message["role"]
        yield from _said(message)
    if document.tools:
        yield _json(document.tools)


def _said(message: Message) -> Iterator[str]:
    yield message["content"]
    if rest := {key: value for key, value in message.items() if key not in ("role", "content")}:
        yield _json(rest)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _without_space(text: str) -> Iterator[str]:
    """The text in pieces, with one space wherever it has white space, and none at its ends."""
    begun = apart = False
    for start in range(0, len(text), _CHARACTERS_AT_ONCE):
        piece = text[start : start + _CHARACTERS_AT_ONCE]
        words = piece.split()
        if words:
            yield (" " if begun and (apart or piece[0].isspace()) else "") + " ".join(words)
        begun = begun or bool(words)
        apart = piece[-1].isspace() or (apart and not words)


def _slots(parts: Iterable[str], otherwise: bytes) -> Slots:
    """MinHash of the runs of 5 words of some text, uint32 `[SLOTS]`; of all words where there are fewer."""
    import rensa

    minhash = rensa.RMinHash(SLOTS, _SEED)
    last: list[str] = []
    has_runs = False
    for piece in (piece for part in parts for piece in _pieces(part)):
        last += WORD.findall(piece.lower())
        if len(last) >= RUN_WORDS:
            minhash.update(list(map(" ".join, zip(*(last[n:] for n in range(RUN_WORDS)), strict=False))))
            last, has_runs = last[1 - RUN_WORDS :], True
    if not last:
        return np.resize(np.frombuffer(otherwise, np.uint32), SLOTS)
    if not has_runs:
        minhash.update([" ".join(last)])
    return np.array(minhash.digest(), np.uint32)


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end behind a space or line end, where they have one."""
    start = 0
    while len(text) - start > _CHARACTERS_AT_ONCE:
        end = start + _CHARACTERS_AT_ONCE
        end = max(text.rfind(" ", start, end), text.rfind("\n", start, end)) + 1 or end
        yield text[start:end]
        start = end
    yield text[start:]
