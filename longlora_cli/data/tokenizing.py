"""Documents to tokens, in groups that keep all cores busy and memory bounded."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np

from longlora_cli.data.chat_template import Labels, render_chats, require_template
from longlora_cli.data.chunk import IGNORE, Int32
from longlora_cli.data.chunking import TokenizedDocument
from longlora_cli.data.documents import Document
from longlora_cli.data.encoding import SafeEncoder, safe_encoder
from longlora_cli.data.kept_tokens import KeptTokens, Tokens
from longlora_cli.errors import DataError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Encoding a group holds about 150 bytes a token beside its ids: 1M characters are some 40 MB.
_GROUP_CHARACTERS = 1 << 20
_GROUP_DOCUMENTS = 4096
# A piece that one core encodes in about 0.01 s, so that cores finish together.
_PIECE_CHARACTERS = 1 << 15
# Two groups at once: while one ends with a core to spare, or its ids become arrays, the other keeps the cores busy.
# One more waits, so that the reader can fall behind a little.
_THREADS, _AHEAD = 2, 3


def tokenize(
    documents: Iterable[Document],
    tokenizer: Any,
    *,
    labels: Labels,
    kept: KeptTokens | None = None,
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

    Raises:
        DataError: A chat and no template, or a chat that the template refuses; the message names its source.
    """
    encoder = safe_encoder(tokenizer)
    begin, end = _frame(encoder, tokenizer)
    pieces: list[Int32] = []

    def finish(group: list[_Work]) -> list[Tokens]:
        texts = iter(encoder.encode_pieces([(w.piece, w.begins) for w in group if w.piece is not None]))
        chats = iter(_render(tokenizer, [w.document for w in group if w.piece is None], labels))
        return [next(chats) if w.piece is None else (next(texts), None) for w in group]

    for work, (ids, learnt) in _in_threads(_keeping(finish, kept), _groups(_works(encoder, documents))):
        if work.piece is not None:
            pieces.append(ids)
            if not work.ends:
                continue
            ids, pieces = np.concatenate([begin, *pieces, end]), []
        if learnt is None:
            learnt = ids.copy()
            learnt[:1] = IGNORE
        yield TokenizedDocument(work.document.source, work.document.is_chat, ids, learnt)


@dataclass(frozen=True)
class _Work:
    """What is encoded at once: a chat (`piece` is None), or a piece of a text and where in it the piece stands."""

    document: Document
    piece: str | None
    begins: bool = True
    ends: bool = True

    @property
    def characters(self) -> int:
        if self.piece is not None:
            return len(self.piece)
        return sum(len(m["content"]) for m in self.document.content if isinstance(m, dict))

    @property
    def input_bytes(self) -> int:
        """Its share of the bytes that the document takes in its file."""
        if self.piece is None:
            return self.document.size_bytes
        return self.document.size_bytes * len(self.piece) // max(len(self.document.content), 1)


def _works(encoder: SafeEncoder, documents: Iterable[Document]) -> Iterator[_Work]:
    for document in documents:
        text = document.content
        if not isinstance(text, str):
            yield _Work(document, None)
            continue
        bounds = [0, *encoder.seams.cuts(text, _PIECE_CHARACTERS), len(text)]
        for start, stop in pairwise(bounds):
            yield _Work(document, text[start:stop], start == 0, stop == len(text))


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
        text = repr(work.document) if work.piece is None else work.piece
        data = text.encode("utf-8", "surrogatepass")
        digest.update(b"%d %d %d\n" % (work.piece is None, work.begins, len(data)))
        digest.update(data)
    return digest.digest()


def pieces_of(encoder: SafeEncoder, texts: Iterable[Document]) -> Iterator[str]:
    """What texts are cut into before they are encoded."""
    return (work.piece for work in _works(encoder, texts) if work.piece is not None)


def _groups(works: Iterable[_Work]) -> Iterator[list[_Work]]:
    group: list[_Work] = []
    characters = 0
    for work in works:
        group.append(work)
        characters += work.characters
        if characters >= _GROUP_CHARACTERS or len(group) >= _GROUP_DOCUMENTS:
            yield group
            group, characters = [], 0
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
    try:
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
        found[int(work.document.source)].append(ids)
    return [np.concatenate(pieces) for pieces in found]
