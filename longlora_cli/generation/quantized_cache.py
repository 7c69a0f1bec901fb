"""Keys and values in 8 or 4 bits.

A block of tokens is quantized when its last token has been read, keys per channel and values per token, each in
groups of 32 numbers with a scale and an offset (Liu et al. 2024, KIVI, arXiv:2402.02750: a few key channels hold
all large numbers, values have no such pattern). Tokens of the unfinished block stay as they are.

What a token sees depends on its position alone: blocks before its own quantized, its own in full. `pieces` cuts a
text where blocks end, so that neither the size of a chunk, nor reuse, nor reading token by token changes an answer,
and a perplexity is that of the cache an answer is written from.

transformers has a `QuantizedCache`, which is not used: it cannot be cropped within what it has quantized, quantizes
everything anew every 128 tokens (errors add up), lets the size of a chunk decide what is seen in full, and does not
tell its bytes; optimum-quanto has no 8 bits there, hqq needs a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

BLOCK_TOKENS = 256
"""Tokens that are quantized together, and at most so many less one stay in full. Reading in such pieces keeps a GPU
busy with a model of 8B parameters (about 300 tokens a pass over the weights do).
"""

_GROUP = 32  # numbers with one scale, as KIVI's: 4 bits become 5 with a 16-bit scale and offset


@dataclass(frozen=True)
class Codes:
    """Quantized numbers: `low + code * step`.

    Args:
        codes: uint8 `[batch, heads, tokens, width]`; at 4 bits two a byte, `[batch, heads, tokens, width / 2]`.
        low: Least number of each group, in the numbers' own format: `[batch, heads, tokens / 32, width]` where
            groups run along tokens, `[batch, heads, tokens, groups]` along the width.
        step: Distance of two codes, as `low`.
    """

    codes: Tensor
    low: Tensor
    step: Tensor

    @property
    def held_bytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.low, self.step))

    def joined(self, later: Codes) -> Codes:
        """These and later tokens."""
        pairs = ((self.codes, later.codes), (self.low, later.low), (self.step, later.step))
        return Codes(*(torch.cat(pair, dim=-2) for pair in pairs))

    def first(self, tokens: int) -> Codes:
        """The first tokens, a multiple of 32, in memory of their own."""
        share = self.codes.shape[-2] // self.low.shape[-2]
        return Codes(
            self.codes[..., :tokens, :].clone(),
            self.low[..., : tokens // share, :].clone(),
            self.step[..., : tokens // share, :].clone(),
        )


def encode_by_channel(numbers: Tensor, bits: int) -> Codes:
    """Quantize `[batch, heads, tokens, width]` with a scale for each channel of 32 tokens; for keys."""
    grouped = numbers.unflatten(-2, (-1, _GROUP))
    codes, low, step = _encode(grouped, -2, bits)
    return Codes(_packed(codes.flatten(-3, -2), bits), low, step)


def encode_by_token(numbers: Tensor, bits: int) -> Codes:
    """Quantize `[batch, heads, tokens, width]` with a scale for each 32 channels of a token; for values."""
    grouped = numbers.unflatten(-1, (-1, value_group(numbers.shape[-1])))
    codes, low, step = _encode(grouped, -1, bits)
    return Codes(_packed(codes.flatten(-2), bits), low, step)


def value_group(width: int) -> int:
    """Channels of a value that share a scale: 32, or the largest power of two in the width."""
    return math.gcd(_GROUP, width)


def _encode(grouped: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, and low and step without `dim`; a number's error is at most half a step, before the last rounding."""
    low, high = grouped.amin(dim, keepdim=True), grouped.amax(dim, keepdim=True)
    exact = grouped.double() if grouped.dtype == torch.float64 else grouped.float()
    # The step is rounded up to the format it is kept in: with a smaller one the largest number would be out of reach.
    step = (high.to(exact.dtype) - low.to(exact.dtype)) / (2**bits - 1) * (1 + torch.finfo(low.dtype).eps)
    step = step.to(low.dtype)
    divisor = torch.where(step == 0, torch.ones_like(step), step).to(exact.dtype)
    codes = ((exact - low.to(exact.dtype)) / divisor).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes, low.squeeze(dim), step.squeeze(dim)


def decode_by_channel(held: Codes, bits: int) -> Tensor:
    """The numbers of `encode_by_channel` again, `[batch, heads, tokens, width]`."""
    codes = _unpacked(held.codes, bits).unflatten(-2, (held.low.shape[-2], -1))
    return _decode(codes, held.low.unsqueeze(-2), held.step.unsqueeze(-2)).flatten(-3, -2)


def decode_by_token(held: Codes, bits: int) -> Tensor:
    """The numbers of `encode_by_token` again, `[batch, heads, tokens, width]`."""
    codes = _unpacked(held.codes, bits).unflatten(-1, (held.low.shape[-1], -1))
    return _decode(codes, held.low.unsqueeze(-1), held.step.unsqueeze(-1)).flatten(-2)


def _decode(codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
    # Codes up to 255 are exact in every format; one operation, so that only the result is rounded.
    return torch.addcmul(low, codes.to(low.dtype), step)


def _packed(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)


@dataclass(frozen=True)
class _Held:
    """What a layer holds: whole blocks quantized, the tokens after them in full. None: no block yet."""

    keys: Codes | None
    values: Codes | None
    open_keys: Tensor
    open_values: Tensor

    @property
    def closed(self) -> int:
        """Tokens in quantized blocks."""
        return 0 if self.keys is None else int(self.keys.codes.shape[-2])


class QuantizedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a `QuantizedCache`.

    Args:
        bits: 8 or 4.
        block: Tokens quantized together, a multiple of 32.
    """

    is_sliding = False

    def __init__(self, bits: int, block: int) -> None:
        super().__init__()
        self.bits, self.block = bits, block
        # One object, put in place at once: an interruption finds the layer before or after a forward.
        self._held: _Held | None = None

    @property
    def held_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        held = self._held
        return 0 if held is None else held.closed + int(held.open_keys.shape[-2])

    @property
    def held_bytes(self) -> int:
        """Bytes of codes, scales and open tokens."""
        held = self._held
        if held is None:
            return 0
        closed = sum(codes.held_bytes for codes in (held.keys, held.values) if codes is not None)
        return closed + sum(t.numel() * t.element_size() for t in (held.open_keys, held.open_values))

    def whole_until(self, length: int) -> int:
        """The longest beginning of at most `length` tokens that can be kept as if no more had been read.

        Tokens of a quantized block are not there in full any more: it is kept or forgotten as a whole.
        """
        held = self._held
        if held is None or length >= held.closed:
            return min(length, self.held_tokens)
        return length // self.block * self.block

    def cut(self, length: int) -> None:
        """Keep the first `length` tokens, a number that `whole_until` gives."""
        held = self._held
        if held is None or length >= self.held_tokens:
            return
        if self.whole_until(length) != length:
            raise ValueError(f"{length} tokens end inside a quantized block")
        after = max(length - held.closed, 0)
        keys, values = held.keys, held.values
        if length < held.closed:
            keys = keys.first(length) if keys is not None and length else None
            values = values.first(length) if values is not None and length else None
        opened = (t[..., :after, :].clone() for t in (held.open_keys, held.open_values))
        self._held = _Held(keys, values, *opened)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note format and device, as transformers' layers do."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; `[batch, kv_heads, tokens, width]`. Returns all keys and values for this forward."""
        if self._held is None:
            self.lazy_initialization(key_states, value_states)
            self._held = _Held(None, None, key_states[..., :0, :], value_states[..., :0, :])
        held = self._held
        open_keys = torch.cat([held.open_keys, key_states], dim=-2)
        open_values = torch.cat([held.open_values, value_states], dim=-2)
        keys, values = open_keys, open_values
        if held.keys is not None and held.values is not None:
            keys = torch.cat([decode_by_channel(held.keys, self.bits), open_keys], dim=-2)
            values = torch.cat([decode_by_token(held.values, self.bits), open_values], dim=-2)
        self._held = self._closed(held, open_keys, open_values)
        return keys, values

    def _closed(self, held: _Held, open_keys: Tensor, open_values: Tensor) -> _Held:
        ended = open_keys.shape[-2] // self.block * self.block
        if ended == 0:
            return _Held(held.keys, held.values, open_keys, open_values)
        keys = encode_by_channel(open_keys[..., :ended, :], self.bits)
        values = encode_by_token(open_values[..., :ended, :], self.bits)
        return _Held(
            keys if held.keys is None else held.keys.joined(keys),
            values if held.values is None else held.values.joined(values),
            open_keys[..., ended:, :].clone(),
            open_values[..., ended:, :].clone(),
        )

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.held_tokens

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Keys that a forward of so many tokens sees, and the position of the first."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.held_tokens + new, 0

    def get_max_length(self) -> int:
        """-1: it grows without a limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._held, self.is_initialized = None, False


class QuantizedCache(Cache):  # type: ignore[misc]
    """A cache in which every layer keeps every token, whole blocks of them in 8 or 4 bits.

    Args:
        bits: 8 or 4.
        block: Tokens quantized together, a multiple of 32.
    """

    def __init__(self, bits: int, block: int = BLOCK_TOKENS) -> None:
        if bits not in (8, 4) or block % _GROUP:
            raise ValueError(f"{bits} bits, blocks of {block} tokens: 8 or 4, and a multiple of {_GROUP}")
        super().__init__(layer_class_to_replicate=partial(QuantizedLayer, bits, block))
        self.bits, self.block = bits, block

    def pieces(self, start: int, stop: int, chunk: int) -> Iterator[tuple[int, int]]:
        """Cut positions `start` to `stop` where blocks end, and into at most `chunk` tokens."""
        while start < stop:
            end = min(start + chunk, (start // self.block + 1) * self.block, stop)
            yield start, end
            start = end


def quantized_bytes(
    tokens: int, *, heads: int, width: int, element_bytes: int, bits: int, block: int = BLOCK_TOKENS
) -> int:
    """Bytes of one layer that holds so many tokens.

    Args:
        tokens: How many.
        heads: Key/value heads.
        width: Of a head.
        element_bytes: Of the model's own number format, in which scales and the open block are.
        bits: 8 or 4.
        block: As of `QuantizedCache`.
    """
    closed = tokens // block * block
    codes = 2 * closed * heads * width * bits // 8
    key_scales = 2 * (closed // _GROUP) * heads * width
    value_scales = 2 * closed * heads * (width // value_group(width))
    opened = 2 * (tokens - closed) * heads * width
    return codes + (key_scales + value_scales + opened) * element_bytes
