"""What fewer bits for keys and values do to a model's predictions, measured on the text at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longlora_cli.generation.cache import new_cache, pieces
from longlora_cli.generation.past import PLAIN, Past
from longlora_cli.models.loading import LoadedModel

# The end of a prompt is measured as a text of its own: bounded in time and memory whatever the prompt's length.
_TEXT_TOKENS = 4096
_MEASURED_TOKENS = 256
# Rows of logits that exist at one time: two of 63 MiB in float64, for a vocabulary of 128,256.
_TILE_TOKENS = 64


@dataclass(frozen=True)
class Divergence:
    """How far predictions are from those of keys and values in the model's own format.

    Args:
        kl: Mean Kullback-Leibler divergence of the next token's distribution, in nats.
        tokens: Last tokens of the prompt that it was measured on.
        text_tokens: Length of the prompt's end that was read for it.
    """

    kl: float
    tokens: int
    text_tokens: int


@torch.no_grad()
def kv_divergence(loaded: LoadedModel, ids: Sequence[int], past: Past) -> Divergence | None:
    """Read the end of a prompt twice, with full and with quantized keys and values, and compare what comes next.

    Args:
        loaded: The model, in eval mode.
        ids: The prompt.
        past: How what was read is kept.

    Returns:
        None where nothing is quantized: a plain cache, or a prompt of one block.
    """
    text = list(ids[-_TEXT_TOKENS:])
    if past.kv_bits == PLAIN.kv_bits:
        return None
    quantized = new_cache(past.kv_bits)
    if len(text) <= quantized.block:
        return None
    measured = min(_MEASURED_TOKENS, len(text) - quantized.block)
    full = _last_hidden(loaded, text, new_cache(), measured)
    found = _last_hidden(loaded, text, quantized, measured)
    head, total = loaded.head_weight(), 0.0
    for start in range(0, measured, _TILE_TOKENS):
        tile = slice(start, start + _TILE_TOKENS)
        wanted, got = ((h[tile].to(head.dtype) @ head.T).double().log_softmax(-1) for h in (full, found))
        total += float((wanted.exp() * (wanted - got)).sum())
    return Divergence(total / measured, measured, len(text))


def _last_hidden(loaded: LoadedModel, text: Sequence[int], cache: object, count: int) -> Tensor:
    """Hidden states of the last `count` tokens, `[count, width]`, read in the quantized cache's blocks or at once."""
    tokens = torch.tensor([list(text)], device=loaded.device)
    found = []
    for start, stop in pieces(cache, 0, len(text), len(text)):
        positions = torch.arange(start, stop, device=loaded.device)[None]
        out = loaded.hidden(
            tokens[:, start:stop], use_cache=True, past_key_values=cache, position_ids=positions
        )
        found.append(out.last_hidden_state[0, max(len(text) - count - start, 0) :])
    return torch.cat(found)[-count:]
