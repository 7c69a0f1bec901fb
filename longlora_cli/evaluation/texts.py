"""Texts for perplexity and haystacks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longlora_cli.data.chunk import Int32
from longlora_cli.data.documents import Document, find_sources, read_documents
from longlora_cli.data.encoding import safe_encoder
from longlora_cli.data.haystack import Haystack
from longlora_cli.data.tokenizing import encode_long
from longlora_cli.errors import DataError, NotFoundError, SettingsError
from longlora_cli.evaluation.tasks.passkey import NOISE

_BOOK = Path(__file__).parent.parent / "models" / "builtin" / "book.txt"
_NOISE_NAME = "noise"


Bos = Literal["auto", "each", "first", "none"]
Docs = Literal["separate", "concat"]
# What stands between texts that are read as one, as in the transformers documentation's perplexity.
_BETWEEN = "\n\n"
_WHITE = re.compile(r"\s+")


@dataclass(frozen=True)
class TextSize:
    """What a text's losses are divided by, which no tokenizer decides.

    Args:
        bytes: UTF-8 bytes of the scored part.
        words: Its words as lm-eval counts them: parts between runs of white space, empty ones at its ends too.
    """

    bytes: int
    words: int


@dataclass(frozen=True)
class Text:
    """A text to score.

    Args:
        name: Where it comes from.
        content: Its token ids `[tokens]`, nothing added.
        prefix: What stands in front of it once.
        bos: What stands in front of each window; then `prefix` is empty.
        frame: What the tokenizer itself puts before and after a text.
        outset: The token that lm-eval puts in front: BOS, or EOS where there is none.
        size: Bytes and words of `content`.
        scored: Bytes and words of its scored part: less by the first token when nothing stands before it.
    """

    name: str
    content: Int32
    prefix: tuple[int, ...]
    bos: int | None
    frame: tuple[tuple[int, ...], tuple[int, ...]]
    outset: int | None
    size: TextSize
    scored: TextSize

    @cached_property
    def ids(self) -> Int32:
        """What is read: the prefix and the content."""
        return np.concatenate([np.array(self.prefix, dtype=np.int32), self.content])

    @property
    def own_ids(self) -> Int32:
        """What the tokenizer makes of the text by itself."""
        before, after = (np.array(part, dtype=np.int32) for part in self.frame)
        return np.concatenate([before, self.content, after])


def read_texts(
    paths: Sequence[Path],
    tokenizer: Any,
    *,
    split: str,
    max_tokens: int | None = None,
    bos: Bos = "auto",
    docs: Docs = "separate",
) -> list[Text]:
    """Read and tokenize texts; without paths, the embedded book.

    Args:
        paths: Files, folders, saved or hub datasets of texts.
        tokenizer: A fast tokenizer.
        split: Split of saved and hub datasets.
        max_tokens: Keep only this much of each, BOS not counted.
        bos: BOS in front of each window, of the text, nowhere, or as the tokenizer does it.
        docs: Each text by itself, or all as one with an empty line between two.

    Raises:
        DataError: Something cannot be read, is a chat, or has nothing to score.
        NotFoundError: The embedded book is not there.
        SettingsError: A BOS is asked for and the tokenizer has none, or one text is to be concatenated.
    """
    if bos in ("each", "first") and tokenizer.bos_token_id is None:
        raise SettingsError(
            f"--bos {bos}: the tokenizer has no BOS token",
            hint="Leave --bos out: then a text begins as the tokenizer begins it.",
        )
    found = [(document.source, str(document.content)) for document in _documents(paths, split)]
    if docs == "concat":
        if len(found) < 2:
            raise SettingsError("--docs concat has no effect here: there is one text")
        found = [(f"{len(found)} texts", _BETWEEN.join(text for _, text in found))]
    encoded = encode_long(safe_encoder(tokenizer), [text for _, text in found])
    return [
        _text(
            name, text, ids[:max_tokens], tokenizer, bos, whole=max_tokens is None or len(ids) <= max_tokens
        )
        for (name, text), ids in zip(found, encoded, strict=True)
    ]


def _text(name: str, text: str, content: Int32, tokenizer: Any, bos: Bos, *, whole: bool) -> Text:
    encoder = safe_encoder(tokenizer)
    frame = (tuple(encoder.begin), tuple(encoder.end))
    prefixes = {"auto": frame[0], "first": (tokenizer.bos_token_id,), "each": (), "none": ()}
    prefix, each = prefixes[bos], tokenizer.bos_token_id if bos == "each" else None
    predicted = bool(prefix) or each is not None
    if len(content) < 2 - predicted:
        raise DataError(f"{name}: {len(content)} token, nothing to score")

    def decode(ids: Int32) -> str:
        return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)

    size = _size(text if whole else decode(content))
    outset = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    scored = size if predicted else _size(decode(content[1:]))
    return Text(name, content, prefix, each, frame, outset, size, scored)


def _size(text: str) -> TextSize:
    return TextSize(len(text.encode()), len(_WHITE.split(text)))


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
