"""Texts for perplexity and haystacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longlora_cli.data.documents import Document, find_sources, read_documents
from longlora_cli.data.haystack import Haystack
from longlora_cli.data.tokenizing import tokenize
from longlora_cli.errors import DataError, NotFoundError
from longlora_cli.evaluation.tasks.passkey import NOISE

_BOOK = Path(__file__).parent.parent / "models" / "builtin" / "book.txt"
_NOISE_NAME = "noise"


@dataclass(frozen=True)
class Text:
    """A text to score.

    Args:
        name: Where it comes from.
        ids: Token ids `[tokens]` as the tokenizer begins a text (with BOS if it puts one); no end token.
        scored_bytes: UTF-8 bytes of all tokens but the first.
    """

    name: str
    ids: npt.NDArray[np.int32]
    scored_bytes: int


def read_texts(
    paths: Sequence[Path], tokenizer: Any, *, split: str, max_tokens: int | None = None
) -> list[Text]:
    """Read and tokenize texts; without paths, the embedded book.

    Args:
        paths: Files, folders, saved or hub datasets of texts.
        tokenizer: A fast tokenizer.
        split: Split of saved and hub datasets.
        max_tokens: Keep only this much of each.

    Raises:
        DataError: Something cannot be read, is a chat, or has fewer than two tokens.
        NotFoundError: The embedded book is not there.
    """
    texts = []
    documents = list(_documents(paths, split))
    for document, tokens in zip(documents, tokenize(documents, tokenizer, labels="all"), strict=True):
        ids = tokens.ids[:]
        if len(ids) and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # put there for training; it is not in the text
        ids = ids[:max_tokens]
        if len(ids) < 2:
            raise DataError(f"{document.source}: {len(ids)} token, nothing to score")
        scored = tokenizer.decode(ids[1:].tolist(), clean_up_tokenization_spaces=False)
        texts.append(Text(document.source, ids, len(scored.encode())))
    return texts


def read_haystack(paths: Sequence[Path], *, split: str) -> Haystack:
    """Texts to hide things in: files, `noise`, or without paths the embedded book.

    Raises:
        DataError: Something cannot be read or is a chat.
        NotFoundError: The embedded book is not there.
    """
    if [str(path) for path in paths] == [_NOISE_NAME]:
        return Haystack([NOISE])
    return Haystack([str(document.content) for document in _documents(paths, split)])


def _documents(paths: Sequence[Path], split: str) -> Iterator[Document]:
    if not paths and not _BOOK.is_file():
        raise NotFoundError(
            "the embedded book is not in this installation", hint="Name texts with --data or --haystack."
        )
    names = [str(path) for path in paths] or [str(_BOOK)]
    for document in read_documents(find_sources(names, split=split), seed=0):
        if document.is_chat:
            raise DataError(
                f"{document.source}: a chat, where a text is needed",
                hint="For rows with answers use --tasks generate.",
            )
        yield document
