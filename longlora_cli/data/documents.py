"""Read sources as documents, one at a time: whole, sampled or mixed by weight."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from longlora_cli.data.document import Document, Source
from longlora_cli.data.sources import find_sources
from longlora_cli.errors import DataError

__all__ = ["Document", "Mixed", "Source", "find_sources", "mix", "read_documents"]

CountTokens = Callable[[list[Document]], list[int]]

# Documents of each source, and characters of each text, whose tokens are counted to know how many tokens a
# byte of the source has: 64 x 16,384 characters take a tokenizer a tenth of a second.
_PROBED = 64
_PROBED_CHARACTERS = 1 << 14


def read_documents(sources: list[Source], *, seed: int) -> Iterator[Document]:
    """Read all sources in order; only samples (`[N]`) and mixtures are read twice, the first time to count.

    Raises:
        DataError: The first source with faults; up to 20 of them are told at once. Also a sample larger than
            its source.
    """
    if any(source.weight is not None for source in sources):
        sources = [mixed.source for mixed in mix(sources, seed=seed, count_tokens=_count_bytes)]
    for number, source in enumerate(sources):
        yield from _read(source, number, seed)


def _read(source: Source, number: int, seed: int) -> Iterator[Document]:
    """The documents of one source, or of its sample."""
    if source.sample is None:
        yield from source.read()
        return
    count = 0
    for document in source.read():
        count += 1
        del document  # a long text goes before the next one is read
    if source.sample > count:
        raise DataError(
            f"{source.name}[{source.sample}]: there are only {count} documents",
            hint=f"Leave out [{source.sample}] to take all.",
        )
    rng = random.Random(f"{seed}:sample:{number}")
    chosen = set(rng.sample(range(count), source.sample))
    places = itertools.count()  # not enumerate, which would hold it
    for document in source.read():
        if next(places) in chosen:
            yield document
        del document


@dataclass(frozen=True)
class Mixed:
    """A source's part in a mixture.

    Args:
        source: Reads only the documents that were chosen.
        weight: Its wanted share of the tokens, 0 to 1.
        documents: Documents chosen.
        available: Documents there are.
    """

    source: Source
    weight: float
    documents: int
    available: int


def mix(sources: list[Source], *, seed: int, count_tokens: CountTokens) -> list[Mixed]:
    """Choose documents so that each source's share of the tokens is its weight over the sum of weights.

    As many are chosen as the weights allow without taking a document twice: one source, the scarcest for its
    weight, is taken whole. Documents stay whole, in their order, and are chosen by the seed. Tokens are
    estimated from bytes of text, with each source's own tokens per byte in 64 of its documents.

    Args:
        sources: All with a weight; each is read once here.
        seed: Seed of the choice.
        count_tokens: Tokens of each of some documents; the texts are cut to 16,384 characters.

    Raises:
        DataError: A source with faults, or one whose share is smaller than the document that was drawn first.
    """
    total = sum(source.weight or 0.0 for source in sources)
    sizes = [_token_sizes(source, number, seed, count_tokens) for number, source in enumerate(sources)]
    weights = [(source.weight or 0.0) / total for source in sources]
    budget = min(float(size.sum()) / weight for size, weight in zip(sizes, weights, strict=True))
    mixed = []
    for number, (source, size, weight) in enumerate(zip(sources, sizes, weights, strict=True)):
        chosen = _choose(size, weight * budget, f"{seed}:mixture:{number}")
        if not chosen.any():
            raise DataError(
                f"{source.name}: a share of {weight:.1%} is {weight * budget:,.0f} tokens, less than half of its "
                f"document that was drawn first",
                hint="Give it a larger weight, or add text to the other inputs.",
            )
        read = partial(_read_chosen, source, number, seed, chosen)
        # No progress is known in a part of a file.
        reduced = replace(source, read=read, sample=None, weight=None, size_bytes=0)
        mixed.append(Mixed(reduced, weight, int(chosen.sum()), len(size)))
    return mixed


def _token_sizes(source: Source, number: int, seed: int, count_tokens: CountTokens) -> np.ndarray:
    """Estimated tokens of each document, float64 `[documents]`."""
    rng = random.Random(f"{seed}:probe:{number}")
    sizes: list[int] = []
    probed: list[Document] = []
    for document in _read(source, number, seed):
        index = len(sizes)
        sizes.append(_text_bytes(document))
        place = index if index < _PROBED else rng.randrange(index + 1)  # a reservoir: each with equal chance
        if place < _PROBED:
            probed[place : place + 1] = [_beginning(document)]
        del document
    counted = sum(count_tokens(probed))
    return np.array(sizes, dtype=np.float64) * (counted / sum(map(_text_bytes, probed)))


def _choose(sizes: np.ndarray, budget: float, seed: str) -> np.ndarray:
    """Documents, bool `[documents]`, drawn until the next would leave their sum further from the budget."""
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    sums = np.cumsum(sizes[order])
    # Document k is taken if half of it still fits; the tolerance is for sums in another order.
    count = int(np.count_nonzero(sums - sizes[order] / 2 <= budget * (1 + 1e-9)))
    chosen = np.zeros(len(sizes), dtype=bool)
    chosen[order[:count]] = True
    return chosen


def _read_chosen(source: Source, number: int, seed: int, chosen: np.ndarray) -> Iterator[Document]:
    is_chosen = iter(chosen)
    for document in _read(source, number, seed):
        if next(is_chosen):
            yield document
        del document


def _beginning(document: Document) -> Document:
    if isinstance(document.content, str):
        return replace(document, content=document.content[:_PROBED_CHARACTERS])
    return document


def _text_bytes(document: Document) -> int:
    content = document.content
    texts = [content] if isinstance(content, str) else [message["content"] for message in content]
    return sum(len(text) if text.isascii() else len(text.encode()) for text in texts)


def _count_bytes(documents: list[Document]) -> list[int]:
    return [_text_bytes(document) for document in documents]
