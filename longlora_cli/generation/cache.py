"""What holds keys and values of everything read: made, measured and cut back.

A cache is transformers' `DynamicCache`, or a `QuantizedCache` for 8 and 4 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from longlora_cli.errors import SettingsError
from longlora_cli.generation.past import FULL_BITS
from longlora_cli.models.loading import LoadedModel, ModelFacts


def new_cache(kv_bits: int = FULL_BITS) -> Any:
    """An empty cache in which every layer keeps every token, with 16 (the model's own format), 8 or 4 bits a number.

    It is made without the model's config on purpose: layers with a sliding window would then drop tokens, and
    a conversation could not go back to an earlier point. The attention itself applies the window.
    """
    if kv_bits == FULL_BITS:
        from transformers import DynamicCache

        return DynamicCache()
    from longlora_cli.generation.quantized_cache import QuantizedCache

    return QuantizedCache(kv_bits)


def check_kv_bits(loaded: LoadedModel, kv_bits: int) -> None:
    """Refuse bits that a model's cache cannot have.

    Raises:
        SettingsError: Positions that depend on the length: the whole text is run at once, nothing is read from a cache.
    """
    if kv_bits != FULL_BITS and depends_on_length(loaded):
        raise SettingsError(
            f"--kv-bits {kv_bits} cannot be had with {loaded.rope.parameters['rope_type']} positions",
            rule="They depend on the length, so that each text is read at once and not block by block.",
            hint="Leave --kv-bits out, or use --rope yarn or theta.",
        )


def depends_on_length(loaded: LoadedModel) -> bool:
    """True when the rotary frequencies change with the number of tokens, as those of dynamic NTK do.

    Keys computed at one length then differ from those at another, so that neither chunks nor reuse are exact.
    """
    return bool(loaded.rope.parameters["rope_type"] in ("dynamic", "longrope"))


def cache_length(cache: Any) -> int:
    """Tokens that every layer of the cache holds, keys and values; the valid prefix after an interruption."""
    if _is_quantized(cache):
        return min((layer.held_tokens for layer in cache.layers), default=0)
    lengths = [_tokens(t) for layer in cache.layers for t in (layer.keys, layer.values)]
    return min(lengths, default=0)


def _tokens(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.shape[-2]


def _is_quantized(cache: Any) -> bool:
    return hasattr(cache, "pieces")


def exact_length(cache: Any, length: int) -> int:
    """The longest prefix of at most `length` tokens to which the cache can be cut as if no more had been read.

    A plain cache can be cut everywhere, a quantized one between its blocks and after the last.
    """
    if _is_quantized(cache):
        # One layer may have closed a block that an interruption kept another from: then none has it.
        found = min((layer.whole_until(length) for layer in cache.layers), default=0)
        return min((layer.whole_until(found) for layer in cache.layers), default=0)
    return min(length, cache_length(cache))


def crop(cache: Any, length: int) -> None:
    """Forget everything after the first `length` tokens, a number that `exact_length` gives.

    Each tensor is cut by itself, because an interruption may have left layers, or the keys and values of one
    layer, at different lengths. `DynamicCache.crop` cannot do that, and what its argument means changed
    between transformers 5.17 and 5.23.
    """
    for layer in cache.layers:
        if _is_quantized(cache):
            layer.cut(length)
        elif layer.is_initialized:
            layer.keys = layer.keys[..., :length, :]
            layer.values = layer.values[..., :length, :]


def pieces(cache: Any, start: int, stop: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Beginnings and ends of what is read at one time, from position `start` to `stop`."""
    if _is_quantized(cache):
        yield from cache.pieces(start, stop, chunk)
        return
    for first in range(start, stop, chunk):
        yield first, min(first + chunk, stop)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values held."""
    if _is_quantized(cache):
        return sum(layer.held_bytes for layer in cache.layers)
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def cache_bytes_for(facts: ModelFacts, tokens: int, *, element_bytes: int, kv_bits: int = FULL_BITS) -> int:
    """Bytes of keys and values that so many tokens will take; known before they are run.

    Args:
        facts: Sizes of the decoder.
        tokens: How many are held.
        element_bytes: Bytes of a number in the model's own format.
        kv_bits: 16, 8 or 4.
    """
    if kv_bits == FULL_BITS:
        return tokens * facts.kv_bytes_per_token(element_bytes)
    from longlora_cli.generation.quantized_cache import quantized_bytes

    sizes = {"heads": facts.kv_heads, "width": facts.head_dim, "element_bytes": element_bytes}
    return facts.layers * quantized_bytes(tokens, bits=kv_bits, **sizes)
