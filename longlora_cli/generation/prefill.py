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
from longlora_cli.generation.cache import cache_length, crop, depends_on_length, exact_length, pieces
from longlora_cli.models.loading import LoadedModel

Advance = Callable[[int], None]


@torch.no_grad()
def prefill(
    loaded: LoadedModel, ids: Sequence[int], cache: Any, *, chunk: int, advance: Advance | None = None
) -> Tensor:
    """Run `ids` after what `cache` holds, and say what may follow.

    Args:
        loaded: The model.
        ids: Token ids that come after the cached ones, at least one.
        cache: From `new_cache`; it grows by `len(ids)`. When this call is ended by an exception (Ctrl-C, out
            of memory), it is cut back to the chunks that were done, or a quantized cache to its last whole block.
        chunk: Most tokens run at one time; before a quantized cache a chunk ends where a block does. Not used
            for positions that depend on the length: they are read at once.
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
        first = done
        for start, stop in pieces(cache, first, first + len(ids), chunk):
            hidden = _run(loaded, tokens[:, start - first : stop - first], cache, start)
            done = stop
            if advance is not None:
                advance(stop - start)
    except BaseException:
        crop(cache, exact_length(cache, done))
        raise
    assert hidden is not None  # there was at least one piece
    return next_logits(loaded, hidden)


@torch.no_grad()
def step(loaded: LoadedModel, token: int, cache: Any) -> Tensor:
    """Run one token after what `cache` holds; logits of the next one, `[vocabulary]`."""
    ids = torch.tensor([[token]], device=loaded.device)
    return next_logits(loaded, _run(loaded, ids, cache, cache_length(cache)))


def _run(loaded: LoadedModel, ids: Tensor, cache: Any, past: int) -> Tensor:
    positions = torch.arange(past, past + ids.shape[1], device=loaded.device)[None]
    out = loaded.hidden(ids, use_cache=True, past_key_values=cache, position_ids=positions)
    hidden: Tensor = out.last_hidden_state
    return hidden[0, -1]


def next_logits(loaded: LoadedModel, hidden: Tensor) -> Tensor:
    """Logits of the tokens after those with these last hidden states: `[..., width]` -> `[..., vocabulary]`.

    Raises:
        NumericError: They are not finite numbers.
    """
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
