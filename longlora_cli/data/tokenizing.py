"""Documents to tokens, in groups that keep all cores busy and memory bounded."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np

from longlora_cli.data.chat_template import Labels, render_chats, require_template
from longlora_cli.data.chunk import IGNORE, Int32
from longlora_cli.data.chunking import TokenizedDocument
from longlora_cli.data.documents import Document
from longlora_cli.data.encoding import SafeEncoder, safe_encoder
from longlora_cli.data.kept_tokens import KeptTokens, Tokens
from longlora_cli.data.token_file import FileIds, Ids, JoinedIds
from longlora_cli.errors import DataError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Encoding a group holds about 150 bytes a token beside its ids, and a byte is a token at most: 160 MB for 1 MiB.
_GROUP_BYTES = 1 << 20
_GROUP_DOCUMENTS = 4096
# A piece that one core encodes in about 0.01 s, so that cores finish together.
_PIECE_CHARACTERS = 1 << 15
# A stretch without a place to cut is encoded whole: so many bytes of it take 0.6 GB.
_MOST_PIECE_BYTES = 1 << 22
# Two groups at once: while one ends with a core to spare, or its ids become arrays, the other keeps the cores busy.
# One more waits, so that the reader can fall behind a little.
_THREADS, _AHEAD = 2, 3
# Chats with more text are rendered by one thread at a time: 10 MiB, the longest, can take 0.5 GB.
_LARGE_BYTES = 2 << 20
_large = Lock()


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    labels: Labels,
    kept: KeptTokens | None = None,
    spool: Path | None = None,
) -> Iterator[TokenizedDocument]:
    """Tokenize documents in order.

    Texts get the tokens that the tokenizer itself puts around a text (BOS, if it does) and its EOS at the
    end; all but the first token are learnt. Chats are rendered with the tokenizer's template. Documents are read
    some groups ahead of those that come out.

    Args:
        documents: Texts and chats.
        tokenizer: A fast tokenizer.
        labels: For chats: what is learnt of them; see `render_chats`.
        kept: Where tokens are kept for a process that continues this one's work, and taken from.
        spool: Where the ids of a text of more than 4 million tokens wait, in a file without a name, until the next
            document is asked for; None holds them in memory.

    Raises:
        DataError: A chat and no template, a chat that the template refuses, or a text with 4 MiB in which the
            tokenizer can be cut nowhere; the message names its source.
    """
    encoder = safe_encoder(tokenizer)
    begin, end = _frame(encoder, tokenizer)

    def finish(group: list[_Work]) -> list[Tokens]:
        texts = iter(encoder.encode_pieces([(w.piece, w.begins) for w in group if w.piece is not None]))
        chats = iter(_render(tokenizer, [w.chat for w in group if w.chat is not None], labels))
        return [next(chats) if w.piece is None else (next(texts), None) for w in group]

    with JoinedIds(spool) as joined:
        for work, (ids, learnt) in _in_threads(_keeping(finish, kept), _groups(_works(encoder, documents))):
            if work.piece is None:
                yield TokenizedDocument(work.source, True, ids, learnt)
                continue
            if work.begins:
                joined.add(begin)
            joined.add(ids)
            if work.ends:
                joined.add(end)
                yield _text(work.source, joined.taken())


def _text(source: str, ids: Ids) -> TokenizedDocument:
    if isinstance(ids, FileIds):
        return TokenizedDocument(source, False, ids, None)
    learnt = ids.copy()
    learnt[:1] = IGNORE
    return TokenizedDocument(source, False, ids, learnt)


@dataclass(frozen=True)
class _Work:
    """What is encoded at once: a chat, or a piece of a text and where in it the piece stands.

    A piece does not hold its text, which may be long: it can go while its last pieces are encoded.
    """

    source: str
    input_bytes: int
    """Its share of the bytes that the document takes in its file."""
    chat: Document | None = None
    piece: str | None = None
    begins: bool = True
    ends: bool = True

    @property
    def size_bytes(self) -> int:
        if self.piece is not None:
            return _size_bytes(self.piece)
        content = self.chat.content if self.chat else ()
        return sum(_size_bytes(message["content"]) for message in content if isinstance(message, dict))


def _size_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _works(encoder: SafeEncoder, documents: Iterable[Document]) -> Iterator[_Work]:
    for document in documents:
        if document.is_chat:
            yield _Work(document.source, document.size_bytes, chat=document)
        else:
            yield from _pieces(encoder, document)
        del document  # before the next one is read


def _pieces(encoder: SafeEncoder, document: Document) -> Iterator[_Work]:
    text, source, size_bytes = document.content, document.source, document.size_bytes
    assert isinstance(text, str)
    bounds = [0, *encoder.seams.cuts(text, _PIECE_CHARACTERS), len(text)]
    for start, stop in pairwise(bounds):
        if encoder.seams.are_known:
            _refuse_without_seam(source, text, start, stop)
        piece = text[start:stop]
        share = size_bytes * len(piece) // max(len(text), 1)
        yield _Work(source, share, None, piece, start == 0, stop == len(text))


def _refuse_without_seam(source: str, text: str, start: int, stop: int) -> None:
    """Raise where a piece is too long to be encoded at once; it is not copied to find that out."""
    characters = stop - start
    if 4 * characters <= _MOST_PIECE_BYTES:
        return
    if characters > _MOST_PIECE_BYTES or _size_bytes(text[start:stop]) > _MOST_PIECE_BYTES:
        raise DataError(
            f"{source}: {characters:,} characters from character {start:,} on have no place where the tokenizer can "
            "be cut",
            rule=f"They are tokenized whole, with 150 bytes of memory for a byte: {_MOST_PIECE_BYTES:,} bytes at most.",
            hint="Put spaces or line ends into them.",
        )


def _keeping(
    finish: Callable[[list[_Work]], list[Tokens]], kept: KeptTokens | None
) -> Callable[[list[_Work]], list[Tokens]]:
    """`finish`, but for groups whose tokens are kept; those of others are kept when they are made."""
    if kept is None:
        return finish

    def work(group: list[_Work]) -> list[Tokens]:
        name = _name(group)
        tokens = kept.get(name, len(group))
        if tokens is None:
            tokens = finish(group)
            kept.put(name, tokens, sum(work.input_bytes for work in group))
        return tokens

    return work


def _name(group: list[_Work]) -> bytes:
    """SHA-256 of all that the tokens of a group are made from, but for the tokenizer and the labels wanted."""
    digest = hashlib.sha256()
    for work in group:
        text = repr(work.chat) if work.piece is None else work.piece
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d %d %d\n" % (work.piece is None, work.begins, len(data)))
        digest.update(data)
    return digest.digest()


def pieces_of(encoder: SafeEncoder, texts: Iterable[Document]) -> Iterator[str]:
    """What texts are cut into before they are encoded."""
    return (work.piece for work in _works(encoder, texts) if work.piece is not None)


def _groups(works: Iterable[_Work]) -> Iterator[list[_Work]]:
    group: list[_Work] = []
    size_bytes = 0
    for work in works:
        group.append(work)
        size_bytes += work.size_bytes
        if size_bytes >= _GROUP_BYTES or len(group) >= _GROUP_DOCUMENTS:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


def _in_threads(
    finish: Callable[[list[_Item]], list[_Result]], groups: Iterable[list[_Item]]
) -> Iterator[tuple[_Item, _Result]]:
    """Every item with its result, in order, while threads work on the groups that follow."""
    waiting: deque[tuple[list[_Item], Future[list[_Result]]]] = deque()
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for group in groups:
            waiting.append((group, pool.submit(finish, group)))
            if len(waiting) >= _AHEAD:
                done, results = waiting.popleft()
                yield from zip(done, results.result(), strict=True)
        while waiting:
            done, results = waiting.popleft()
            yield from zip(done, results.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _render(tokenizer: Any, documents: list[Document], labels: Labels) -> list[tuple[Int32, Int32]]:
    if not documents:
        return []
    require_template(tokenizer)
    chats = [document.content for document in documents if isinstance(document.content, list)]
    tools = [document.tools for document in documents]
    is_large = sum(_size_bytes(message["content"]) for chat in chats for message in chat) > _LARGE_BYTES
    try:
        with _large if is_large else nullcontext():
            return render_chats(tokenizer, chats, labels=labels, tools=tools)
    except DataError:
        for document, chat in zip(documents, chats, strict=True):  # find the one that is meant
            try:
                render_chats(tokenizer, [chat], tools=[document.tools])
            except DataError as error:
                place = f"{document.source}: {error.message}"
                raise DataError(place, rule=error.rule, hint=error.hint) from error
        raise


def encode_texts(tokenizer: Any, texts: list[str]) -> list[Int32]:
    """Ids of texts, int32 `[tokens]` each, with the tokenizer's own begin and end tokens, and EOS."""
    encoder = safe_encoder(tokenizer)
    begin, end = _frame(encoder, tokenizer)
    return [np.concatenate([begin, ids, end]) for ids in encode_long(encoder, texts)]


def _frame(encoder: SafeEncoder, tokenizer: Any) -> tuple[Int32, Int32]:
    """What stands before and after the ids of a text."""
    end = list(encoder.end)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in end:
        end.append(tokenizer.eos_token_id)
    return np.array(encoder.begin, dtype=np.int32), np.array(end, dtype=np.int32)


def encode_long(encoder: SafeEncoder, texts: list[str]) -> list[Int32]:
    """Ids of texts of any length, int32 `[tokens]` each, without begin and end tokens.

    Long texts are cut where it is proven that their pieces encode to the whole text's ids (`seams.Seams`), and the
    pieces encoded by all cores; a text without such a place is encoded whole.
    """
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    found: list[list[Int32]] = [[] for _ in texts]

    def finish(group: list[_Work]) -> list[Int32]:
        return encoder.encode_pieces([(w.piece or "", w.begins) for w in group])

    for work, ids in _in_threads(finish, _groups(_works(encoder, documents))):
        found[int(work.source)].append(ids)
    return [np.concatenate(pieces) for pieces in found]
