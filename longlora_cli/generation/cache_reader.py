"""A `Reader` that holds keys and values of every token, in the model's own format or quantized."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from longlora_cli.generation.cache import (
    cache_bytes,
    cache_length,
    check_kv_bits,
    crop,
    depends_on_length,
    exact_length,
    new_cache,
)
from longlora_cli.generation.past import FULL_BITS
from longlora_cli.generation.prefill import Advance, prefill, step
from longlora_cli.generation.reader import Query, common_prefix
from longlora_cli.models.loading import LoadedModel


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
