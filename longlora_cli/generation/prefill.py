"""Read a prompt into a key/value cache, chunk by chunk.

Activations then depend on the chunk and not on the prompt (chunked prefill: Agrawal et al. 2023, SARATHI,
arXiv:2308.16369), and the output head sees one row: 32,768 rows of a 128,256-token vocabulary would be 15.7
GiB.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.errors import NumericError
from longlora_cli.models.loading import LoadedModel

Advance = Callable[[int], None]


def new_cache() -> Any:
    """An empty cache in which every layer keeps every token.

    It is made without the model's config on purpose: layers with a sliding window would then drop tokens, and
    a conversation could not go back to an earlier point. The attention itself applies the window.
    """
    from transformers import DynamicCache

    return DynamicCache()


def cache_length(cache: Any) -> int:
    """Tokens that every layer of the cache holds, keys and values; the valid prefix after an interruption."""
    lengths = [_tokens(t) for layer in cache.layers for t in (layer.keys, layer.values)]
    return min(lengths, default=0)


def _tokens(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.shape[-2]


def crop(cache: Any, length: int) -> None:
    """Forget everything after the first `length` tokens.

    Each tensor is cut by itself, because an interruption may have left layers, or the keys and values of one
    layer, at different lengths. `DynamicCache.crop` cannot do that, and what its argument means changed
    between transformers 5.17 and 5.23.
    """
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys = layer.keys[..., :length, :]
            layer.values = layer.values[..., :length, :]


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values held."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def depends_on_length(loaded: LoadedModel) -> bool:
    """True when the rotary frequencies change with the number of tokens, as those of dynamic NTK do.

    Keys computed at one length then differ from those at another, so that neither chunks nor reuse are exact.
    """
    return bool(loaded.rope.parameters["rope_type"] in ("dynamic", "longrope"))


@torch.no_grad()
def prefill(
    loaded: LoadedModel, ids: Sequence[int], cache: Any, *, chunk: int, advance: Advance | None = None
) -> Tensor:
    """Run `ids` after what `cache` holds, and say what may follow.

    Args:
        loaded: The model.
        ids: Token ids that come after the cached ones, at least one.
        cache: From `new_cache`; it grows by `len(ids)`. When this call is ended by an exception (Ctrl-C, out
            of memory), it is cut back to the chunks that were done.
        chunk: Tokens run at one time. Not used for positions that depend on the length: they are read at
            once.
        advance: Called after each chunk with its number of tokens.

    Returns:
        Logits of the token after the last one, `[vocabulary]` in the model's dtype.

    Raises:
        ValueError: No ids, or a cached prefix with positions that depend on the length.
        NumericError: The logits are not finite numbers.
    """
    if not ids:
        raise ValueError("there is no token to run")
    done = cache_length(cache)
    if depends_on_length(loaded):
        if done:
            raise ValueError("dynamic positions cannot go on from a cached prefix; use a new cache")
        _forget_longest(loaded)
        chunk = len(ids)
    tokens = torch.tensor([list(ids)], device=loaded.device)
    hidden = None
    try:
        for start in range(0, len(ids), chunk):
            piece = tokens[:, start : start + chunk]
            hidden = _run(loaded, piece, cache, done)
            done += piece.shape[1]
            if advance is not None:
                advance(piece.shape[1])
    except BaseException:
        crop(cache, done)
        raise
    return logits_of(loaded, hidden)


@torch.no_grad()
def step(loaded: LoadedModel, token: int, cache: Any) -> Tensor:
    """Run one token after what `cache` holds; logits of the next one, `[vocabulary]`."""
    ids = torch.tensor([[token]], device=loaded.device)
    return logits_of(loaded, _run(loaded, ids, cache, cache_length(cache)))


def _run(loaded: LoadedModel, ids: Tensor, cache: Any, past: int) -> Tensor:
    positions = torch.arange(past, past + ids.shape[1], device=loaded.device)[None]
    out = loaded.hidden(ids, use_cache=True, past_key_values=cache, position_ids=positions)
    hidden: Tensor = out.last_hidden_state
    return hidden[0, -1]


def logits_of(loaded: LoadedModel, hidden: Tensor | None) -> Tensor:
    """What may follow: `[..., width]` -> `[..., vocabulary]`; see `prefill` for the error."""
    assert hidden is not None
    weight = loaded.head_weight()
    logits = nn.functional.linear(hidden.to(weight.dtype), weight)
    if not bool(torch.isfinite(logits).all()):
        raise NumericError(
            "the model's logits are not finite numbers",
            rule="No token can be chosen from them.",
            hint="Try --dtype fp32 or bf16; fp16 overflows in some models.",
        )
    return logits


def _forget_longest(loaded: LoadedModel) -> None:
    """Let dynamic positions start anew: they keep the longest text's frequencies until a short one comes."""
    start = torch.zeros(1, 1, dtype=torch.long, device=loaded.device)
    for module in loaded.causal_lm.modules():
        if isinstance(getattr(module, "inv_freq", None), Tensor):
            module(torch.zeros(1, device=loaded.device), start)
