"""Causal attention for packed documents and for growing caches, registered with transformers by name.

transformers hands every decoder's attention to a function registered under the name the model was loaded with
(`AttentionInterface`), so no class is patched. The functions here never need an attention mask: documents are told
apart by their lengths, and padding is a document of its own that nothing looks at. The plain twin is
`plain_attention`, a full softmax over an explicit mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlora_cli.errors import IncompatibleError, SettingsError

_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# cuDNN builds a plan for every new shape (tens of milliseconds); documents are padded at their end to a multiple of
# this, which a causal mask makes harmless, so that a 32K context needs at most 64 plans.
_CUDNN_BUCKET = 512
# Below this, torch's own kernels are as fast as cuDNN's and need no plan.
_CUDNN_MIN_TOKENS = 2048


def attention_name(backend: str, device: torch.device) -> str:
    """Register the attention function of a backend and return its name for `attn_implementation`.

    Args:
        backend: `auto`, or a torch backend that is then used for everything.
        device: Where the model computes.

    Raises:
        SettingsError: A backend that exists on GPUs only, on a CPU.
    """
    if device.type == "cpu" and backend in ("cudnn", "efficient"):
        raise SettingsError(
            f"--attention {backend} needs a GPU", hint="On a CPU, --attention auto, flash or math work."
        )
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    if backend == "auto":
        backend = "cudnn" if _has_fast_cudnn(device) else "torch"
    # transformers takes any name with "flash" in it for a FlashAttention package that must be installed.
    name = f"longlora_{backend.replace('flash', 'fa')}"
    AttentionInterface.register(name, make_attention(backend))
    # Without a mask function transformers would also pass None; said here on purpose.
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    return name


def _has_fast_cudnn(device: torch.device) -> bool:
    # Compute capability 9 is Hopper: cuDNN forward 1.6-1.9x torch's flash kernel there.
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def make_attention(backend: str) -> Callable[..., tuple[Tensor, None]]:
    """The function transformers calls for each layer; `backend` is `torch` (its own choice) or a key of `_BACKENDS`."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        document_lengths: list[list[int]] | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, None]:
        if softcap is not None:
            raise IncompatibleError("attention with a soft cap on its scores is not supported")
        tokens, past = query.shape[2], key.shape[2] - query.shape[2]
        window = sliding_window if sliding_window is not None and sliding_window < key.shape[2] else None
        if document_lengths is None:
            out = _causal(query, key, value, past, scaling, dropout, window, backend)
            return out.transpose(1, 2), None
        out = query.new_empty(query.shape[0], tokens, query.shape[1], value.shape[3])
        for row, lengths in enumerate(document_lengths):
            if sum(lengths) != tokens or past:
                raise IncompatibleError(f"documents of {sum(lengths)} tokens in a row of {tokens}")
            start = 0
            for length in lengths:
                part = (slice(row, row + 1), slice(None), slice(start, start + length))
                piece = _causal(query[part], key[part], value[part], 0, scaling, dropout, window, backend)
                out[row : row + 1, start : start + length] = piece.transpose(1, 2)
                start += length
        return out, None

    return attention


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: int,
    scaling: float | None,
    dropout: float,
    window: int | None,
    backend: str,
) -> Tensor:
    """One document: `[batch, heads, tokens, width]`; each query sees the past and itself."""
    tokens = query.shape[2]
    options: dict[str, Any] = {
        "scale": scaling,
        "dropout_p": dropout,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    sdpa = nn.functional.scaled_dot_product_attention
    if window is not None:
        return sdpa(query, key, value, attn_mask=_window_mask(tokens, past, window, query.device), **options)
    if tokens == 1:
        return sdpa(query, key, value, **options)
    if past:
        from torch.nn.attention.bias import causal_lower_right

        if options.pop("enable_gqa"):  # the bias class does not repeat heads
            key, value = _repeated(query, key), _repeated(query, value)
        return sdpa(query, key, value, attn_mask=causal_lower_right(tokens, tokens + past), **options)
    if backend == "cudnn" and query.dtype != torch.float32 and tokens >= _CUDNN_MIN_TOKENS:
        return _causal_cudnn(query, key, value, options)
    if backend in ("torch", "cudnn"):
        return sdpa(query, key, value, is_causal=True, **options)
    if backend == "efficient" and options.pop(
        "enable_gqa"
    ):  # this kernel wants a key head for each query head
        key, value = _repeated(query, key), _repeated(query, value)
    with sdpa_kernel(_BACKENDS[backend]):
        return sdpa(query, key, value, is_causal=True, **options)


def _repeated(query: Tensor, key: Tensor) -> Tensor:
    """Keys or values with each head as often as query heads share it."""
    return key.repeat_interleave(query.shape[1] // key.shape[1], 1)


def _causal_cudnn(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
    tokens = query.shape[2]
    extra = -tokens % _CUDNN_BUCKET
    if extra:
        query, key, value = (nn.functional.pad(t, (0, 0, 0, extra)) for t in (query, key, value))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    return out[:, :, :tokens]


def _window_mask(tokens: int, past: int, window: int, device: torch.device) -> Tensor:
    rows = torch.arange(past, past + tokens, device=device)[:, None]
    columns = torch.arange(past + tokens, device=device)[None, :]
    return (columns <= rows) & (columns > rows - window)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    document_lengths: list[int] | None = None,
    window: int | None = None,
) -> Tensor:
    """The same by one softmax over an explicit mask; the documentation and the test of this file.

    Args:
        query: `[heads, tokens, width]`.
        key: `[kv_heads, past + tokens, width]`, repeated for the query heads that share it.
        value: As `key`.
        scaling: Factor on the scores.
        document_lengths: Lengths of the documents in the row; needs `past == 0`.
        window: Each query sees only this many last keys.

    Returns:
        `[heads, tokens, width]`.
    """
    tokens, total = query.shape[1], key.shape[1]
    rows = torch.arange(total - tokens, total)[:, None]
    columns = torch.arange(total)[None, :]
    allowed = columns <= rows
    if document_lengths is not None:
        document = torch.repeat_interleave(
            torch.arange(len(document_lengths)), torch.tensor(document_lengths)
        )
        allowed &= document[:, None] == document[None, :]
    if window is not None:
        allowed &= columns > rows - window
    repeats = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    scores = (query @ key.transpose(1, 2) * scaling).masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ value
