"""What a session reads with: something that holds the past of one text and goes on from it.

`CacheReader` holds keys and values of every token, `BeaconReader` compresses them. The seam is narrow on purpose:
answers, likelihoods and conversations do not know how the past is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from longlora_cli.generation.cache import (
    cache_bytes,
    cache_bytes_for,
    cache_length,
    check_kv_bits,
    crop,
    depends_on_length,
    exact_length,
    new_cache,
)
from longlora_cli.generation.past import FULL_BITS, Past
from longlora_cli.generation.prefill import Advance, prefill, step
from longlora_cli.models.loading import LoadedModel, ModelFacts


@dataclass(frozen=True)
class Query:
    """The newest question of a text.

    Args:
        text: What is asked.
        tokens: About how many tokens the text has from there to its end; what is before them is searched.
    """

    text: str
    tokens: int


class Reader(Protocol):
    """The past of one text, and how it goes on.

    Attributes:
        reused: Tokens of the text that was read last which were held already.
    """

    reused: int

    @property
    def ids(self) -> list[int]:
        """The token ids that were read; right at every moment, also after an interruption."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held now."""
        ...

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of these tokens need not be run. The last always is, for its logits."""
        ...

    def clear(self) -> None:
        """Forget everything and free the memory."""
        ...

    def read(self, ids: Sequence[int], advance: Advance | None = None, query: Query | None = None) -> Tensor:
        """Read a text of which the beginning may be held already; logits `[vocabulary]` of what follows.

        Args:
            ids: The whole text.
            advance: Called with the number of tokens just run.
            query: What retrieval searches the past by; without retrieval it is not looked at.
        """
        ...

    def step(self, token: int) -> Tensor:
        """Read one token more; logits `[vocabulary]` of the next."""
        ...

    def mark(self) -> Any:
        """This moment, to come back to."""
        ...

    def back_to(self, mark: Any) -> None:
        """Forget what was read since a mark."""
        ...


def common_prefix(held: Sequence[int], asked: Sequence[int]) -> int:
    """How many first ids are equal."""
    common = 0
    for one, other in zip(held, asked, strict=False):
        if one != other:
            break
        common += 1
    return common


def open_reader(loaded: LoadedModel, past: Past, *, prefill_chunk: int) -> Reader:
    """What reads so that the past is kept as wanted.

    Raises:
        SettingsError, IncompatibleError: The model's past cannot be kept so.
    """
    if past.beacon is None:
        return CacheReader(loaded, prefill_chunk=prefill_chunk, kv_bits=past.kv_bits)
    from longlora_cli.generation.beacon_reader import BeaconReader

    return BeaconReader(loaded, past)


def held_bytes_for(past: Past, facts: ModelFacts, tokens: int, *, element_bytes: int, positions: int) -> int:
    """Bytes of keys and values that so many tokens will take (at most, with retrieval); known before any is run.

    Args:
        past: How what was read is kept.
        facts: Sizes of the decoder.
        tokens: How many are held.
        element_bytes: Bytes of a number in the model's own format.
        positions: Of the model.
    """
    if past.beacon is None:
        return cache_bytes_for(facts, tokens, element_bytes=element_bytes, kv_bits=past.kv_bits)
    from longlora_cli.generation.beacon_reader import beacon_bytes_for

    return beacon_bytes_for(facts, tokens, past, element_bytes=element_bytes, positions=positions)


class CacheReader:
    """A key/value cache and the exact ids in it.

    Args:
        loaded: The model.
        prefill_chunk: Most tokens run at one time.
        kv_bits: Bits of a key's or value's number: 16 (the model's own format), 8 or 4.

    Raises:
        SettingsError: The model's cache cannot be quantized.
    """

    def __init__(self, loaded: LoadedModel, *, prefill_chunk: int, kv_bits: int = FULL_BITS) -> None:
        check_kv_bits(loaded, kv_bits)
        self.reused = 0
        self._loaded, self._chunk, self._kv_bits = loaded, prefill_chunk, kv_bits
        self._cache = new_cache(kv_bits)
        # Always what the cache holds or is about to hold, so that `ids` is right wherever an interruption
        # struck.
        self._ids: list[int] = []

    @property
    def ids(self) -> list[int]:
        """The token ids whose keys and values are held."""
        return self._ids[: cache_length(self._cache)]

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values held now."""
        return cache_bytes(self._cache)

    def reusable(self, ids: Sequence[int]) -> int:
        """How many of these tokens need not be run: the common prefix, or what a quantized cache has whole of it."""
        if depends_on_length(self._loaded):
            return 0
        return exact_length(self._cache, min(common_prefix(self.ids, ids), len(ids) - 1))

    def clear(self) -> None:
        """Forget everything and free the memory."""
        self._cache, self._ids = new_cache(self._kv_bits), []

    def read(self, ids: Sequence[int], advance: Advance | None = None, query: Query | None = None) -> Tensor:
        """Read a text of which the beginning may be held already; logits `[vocabulary]` of what follows."""
        self.reused = self.reusable(ids)
        if self.reused == 0:
            self.clear()  # and free the old one before the new one grows
        else:
            crop(self._cache, self.reused)
        self._ids = list(ids)
        new = self._ids[self.reused :]
        return prefill(self._loaded, new, self._cache, chunk=self._chunk, advance=advance)

    def step(self, token: int) -> Tensor:
        """Read one token more; logits `[vocabulary]` of the next."""
        # Noted before it is run: `ids` then covers the cache at every moment.
        self._ids.append(token)
        return step(self._loaded, token, self._cache)

    def mark(self) -> int:
        """How much is held."""
        return cache_length(self._cache)

    def back_to(self, mark: int) -> None:
        """Forget what was read since. Of a block that was quantized since, what was read before is read again."""
        kept = exact_length(self._cache, mark)
        crop(self._cache, kept)
        self._ids = self._ids[:mark]
        if kept < mark:
            prefill(self._loaded, self._ids[kept:], self._cache, chunk=self._chunk)
