"""Which spans of the past a question is about.

The past is cut into keys of `retrieval_key_length` tokens. The text of each key is indexed, by BM25 over its words or
by the vector of a dense encoder; a question finds the best `retrieval_topk` of them, and keys that touch become one
span. Tokens and texts only: what is done with the spans is `fine_memory.py`'s business.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from longlora_cli.beacon.dense_encoder import DenseEncoder
from longlora_cli.errors import SettingsError

NONE, BM25 = "none", "bm25"
# Written without spaces: kana, Han and Hangul. Pairs of neighbours are their words, as in Lucene's CJK analyzer.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
_RUNS = re.compile(f"[{_UNSPACED}]+|[^\\W{_UNSPACED}]+")
_UNSPACED_START = re.compile(f"[{_UNSPACED}]")


@dataclass(frozen=True)
class RetrievalSettings:
    """How the past is searched.

    Args:
        method: `none`, `bm25`, or the folder of a dense encoder.
        topk: Most keys that a question finds, at least 1.
        key_length: Tokens of a key, at least 1.
    """

    method: str = NONE
    topk: int = 3
    key_length: int = 128

    def validate(self) -> None:
        """Raise `SettingsError` (one line, exit 2) when no search can be made of these settings."""
        if self.topk < 1:
            raise SettingsError(f"--retrieval-topk {self.topk} finds nothing", hint="Use 1 or more.")
        if self.key_length < 1:
            raise SettingsError(
                f"--retrieval-key-length {self.key_length} is no length", hint="Use 1 or more."
            )
        if self.method not in (NONE, BM25) and not (Path(self.method) / "config.json").is_file():
            raise SettingsError(
                f"--retrieval-method {self.method} is neither none nor bm25 nor the folder of a dense encoder",
                rule="An encoder is a local folder with config.json, model.safetensors and a tokenizer.",
            )


@dataclass(frozen=True, order=True)
class Span:
    """Tokens `start <= position < end` of the past."""

    start: int
    end: int


def key_spans(tokens: int, key_length: int) -> list[Span]:
    """Cut a past of this many tokens into keys; the last one may be shorter."""
    return [Span(start, min(start + key_length, tokens)) for start in range(0, tokens, key_length)]


def merged(spans: Sequence[Span]) -> list[Span]:
    """The same tokens in as few spans as possible, in order: those that touch or overlap become one."""
    found: list[Span] = []
    for span in sorted(spans):
        if found and span.start <= found[-1].end:
            found[-1] = Span(found[-1].start, max(found[-1].end, span.end))
        else:
            found.append(span)
    return found


def best(scores: NDArray[np.float64], topk: int) -> list[int]:
    """Indices of the highest scores, the best first; of equal ones the earlier, and none that is 0 or less."""
    order = np.argsort(-scores, kind="stable")[:topk]
    return [int(index) for index in order if scores[index] > 0]


def words(text: str) -> list[str]:
    """Words for BM25: runs of letters and digits, case ignored; pairs of neighbours where no spaces are written."""
    found: list[str] = []
    for run in _RUNS.findall(unicodedata.normalize("NFKC", text).casefold()):
        if len(run) > 1 and _UNSPACED_START.match(run):
            found += [first + second for first, second in pairwise(run)]
        else:
            found.append(run)
    return found


class SpanIndex(Protocol):
    """Texts that can be asked which of them a question is about."""

    def update(self, texts: Sequence[str]) -> None:
        """Index these texts; a text that stands where it stood before costs nothing, or little."""

    def scores(self, query: str) -> NDArray[np.float64]:
        """One number a text, the higher the better; 0 or less for a text that has nothing to do with the query."""


class Bm25Index:
    """BM25 over words, k1 0.9 and b 0.4 as Anserini and the origin have them, IDF as Lucene's.

    The library is bm25s; 512 texts of 190 words are indexed in 50 ms, so that every change makes the index anew.

    Source:
        Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework"; Lù 2024, arXiv:2407.03618 (bm25s).
    """

    K1, B = 0.9, 0.4

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._index: Any = None

    def update(self, texts: Sequence[str]) -> None:
        """Index these texts instead of those before."""
        if list(texts) == self._texts:
            return
        import bm25s

        self._texts, self._index = list(texts), None
        documents = [words(text) for text in texts]
        if any(documents):  # the library fails on texts that have no word between them
            self._index = bm25s.BM25(
                k1=self.K1, b=self.B, method="lucene", backend="numpy", csc_backend="numpy", dtype="float64"
            )
            self._index.index(documents, show_progress=False)

    def scores(self, query: str) -> NDArray[np.float64]:
        """Sum over the query's words, repeated ones counted again; 0 where a text has none of them."""
        if self._index is None:
            return np.zeros(len(self._texts))
        return np.asarray(self._index.get_scores(words(query)), dtype=np.float64)


class DenseIndex:
    """Cosine between the vectors of a query and of each text."""

    def __init__(self, encoder: DenseEncoder) -> None:
        self._encoder = encoder
        self._texts: list[str] = []
        self._vectors = np.zeros((0, 0), dtype=np.float64)

    def update(self, texts: Sequence[str]) -> None:
        """Encode the texts that are new; the vectors of those at the front that stayed are kept."""
        same = 0
        while same < min(len(texts), len(self._texts)) and texts[same] == self._texts[same]:
            same += 1
        kept = self._vectors[:same]
        if same < len(texts):
            new = self._encoder.encode(texts[same:], query=False)
            kept = np.concatenate([kept, new]) if same else new
        self._texts, self._vectors = list(texts), kept

    def scores(self, query: str) -> NDArray[np.float64]:
        """Cosines, moved from -1..1 to 0..2: only the order of vectors counts, and the farthest can still be wanted."""
        if not self._texts:
            return np.zeros(0)
        return 1.0 + self._vectors @ self._encoder.encode([query], query=True)[0]


class Retriever:
    """The past of a conversation as searchable text.

    What was decoded and encoded for one call is kept for the next one whose past begins with the same tokens; another
    past is simply searched anew. So the sessions that were forked from one may share it.

    Args:
        tokenizer: Of the model; turns the past back into text.
        settings: How to search; its method is not `none`.
        device: Where a dense encoder computes.

    Raises:
        SettingsError: From `validate`, or the method is `none`.
        DataError, NotFoundError, SecurityError: From `DenseEncoder`.
    """

    def __init__(
        self, tokenizer: Any, settings: RetrievalSettings, device: str | torch.device = "cpu"
    ) -> None:
        settings.validate()
        self.settings = settings
        self._tokenizer = tokenizer
        self._index = make_index(settings, device)
        self._ids: list[int] = []  # those of full keys, whose texts cannot change
        self._texts: list[str] = []

    def find(self, past: Sequence[int], query: str | None) -> list[Span]:
        """The spans of the past that a question is about, in order, none touching another.

        Args:
            past: All token ids that may be found.
            query: The newest input of the user.

        Raises:
            SettingsError: There is no query, or nothing in the past.
        """
        refuse_no_query(query)
        refuse_no_past(past)
        keys = key_spans(len(past), self.settings.key_length)
        self._index.update(self._texts_of(list(past), keys))
        scores = self._index.scores(str(query))
        return merged([keys[index] for index in best(scores, self.settings.topk)])

    def _texts_of(self, past: list[int], keys: list[Span]) -> list[str]:
        if past[: len(self._ids)] != self._ids:
            self._texts = []
        full = len(past) // self.settings.key_length
        self._texts = self._texts[:full]
        texts = self._texts + [self._decoded(past[k.start : k.end]) for k in keys[len(self._texts) :]]
        self._ids, self._texts = past[: full * self.settings.key_length], texts[:full]
        return texts

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def refuse_no_query(query: str | None) -> None:
    """Raise `SettingsError` when there is nothing to search for."""
    if query is None or not query.strip():
        raise SettingsError(
            "retrieval has no query",
            rule="The query is the newest input of the user.",
            hint="Ask something, or use --retrieval-method none.",
        )


def refuse_no_past(past: Sequence[int]) -> None:
    """Raise `SettingsError` when there is nothing to search in."""
    if len(past) == 0:
        raise SettingsError(
            "retrieval has no index: nothing was read before the query",
            hint="Give a text to search, or use --retrieval-method none.",
        )


def make_index(settings: RetrievalSettings, device: str | torch.device = "cpu") -> SpanIndex:
    """The index that the method names.

    Raises:
        SettingsError: The method is `none`.
        DataError, NotFoundError, SecurityError: From `DenseEncoder`.
    """
    if settings.method == NONE:
        raise SettingsError(
            "retrieval has no index: --retrieval-method is none",
            hint="Use --retrieval-method bm25 or the folder of a dense encoder.",
        )
    return Bm25Index() if settings.method == BM25 else DenseIndex(_encoder(settings.method, str(device)))


@lru_cache(maxsize=1)
def _encoder(folder: str, device: str) -> DenseEncoder:
    """One encoder for all sessions: its weights are read once, and it holds nothing of any text."""
    return DenseEncoder(Path(folder), device)
