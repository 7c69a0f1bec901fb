"""Which reader keeps the past as it is wanted, and the bytes that it will take."""

from __future__ import annotations

from longlora_cli.generation.cache import cache_bytes_for
from longlora_cli.generation.cache_reader import CacheReader
from longlora_cli.generation.past import Past
from longlora_cli.generation.reader import Reader
from longlora_cli.models.loading import LoadedModel, ModelFacts


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
