"""Attention of Hugging Face models through the memory engine's seam, registered with transformers by name.

transformers hands every decoder's attention to a function registered under the name the model was loaded with
(`AttentionInterface`), so no class is patched. The functions here never need an attention mask: documents are told
apart by their lengths, and padding is a document of its own that nothing looks at. Calls without a cached past, a
window or dropout - training and the first part of a prompt - go through `attention_kernels.attend`; the others
through `scaled_dot_product_attention`. The plain twin is `plain_attention`, a full softmax over an explicit mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longlora_cli.errors import IncompatibleError
from longlora_cli.memory.attention_kernels import AttentionKernel, attend, choose_kernel, refuse_backend
from longlora_cli.memory.attention_masks import attend_masked
from longlora_cli.memory.attention_prefix import SharedPrefix, attend_behind_prefix
from longlora_cli.memory.attention_segments import AttentionSegments, attend_segments, segment_kernel

Kernels = dict[tuple[torch.device, torch.dtype, int], AttentionKernel]


@dataclass(frozen=True)
class Gap:
    """Places of a batch's rows where no token stands, so that rows of unequal length end together.

    Args:
        start: The first such place, the same in all rows; 0 is padding at the left.
        widths: How many there are in each row, int64 `[batch]` on the model's device.
    """

    start: int
    widths: Tensor


def attention_name(backend: str, device: torch.device) -> str:
    """Register the attention function of a backend and return its name for `attn_implementation`.

    Args:
        backend: One of `attention_kernels.BACKENDS`.
        device: Where the model computes.

    Raises:
        SettingsError: A backend that is unknown or that this device does not have.
    """
    refuse_backend(backend, device)
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    # transformers takes any name with "flash" in it for a FlashAttention package that must be installed.
    name = f"longlora_{backend.replace('flash', 'fa2')}"
    AttentionInterface.register(name, make_attention(backend))
    # Without a mask function transformers would also pass None; said here on purpose.
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    return name


def make_attention(backend: str) -> Callable[..., tuple[Tensor, None]]:
    """The function transformers calls for each layer, over the kernels of `backend`.

    Any keyword given to `model(...)` arrives here, among them `document_lengths` (for each row of the batch its
    documents' tokens), `gap` (a `Gap` in keys that are cached), `prefix` (a `SharedPrefix` before them; a gap is then
    counted behind it), `kv_heads_per_call` and `shifted_group` (see `attention_kernels.attend_forward`), and `segments`
    (see `attention_segments.attend_segments`), which say by themselves who sees whom.
    """
    kernels: Kernels = {}

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
        gap: Gap | None = None,
        prefix: SharedPrefix | None = None,
        kv_heads_per_call: int = 0,
        shifted_group: int = 0,
        segments: AttentionSegments | None = None,
        **ignored: Any,
    ) -> tuple[Tensor, None]:
        if softcap is not None:
            raise IncompatibleError("attention with a soft cap on its scores is not supported")
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        if segments is not None:
            _refuse_window(segments, sliding_window)
            fused = segment_kernel(backend, query)
            return attend_segments(query, key, value, segments, scale, kernel=fused, dropout=dropout), None
        tokens, past = query.shape[2], key.shape[2] - query.shape[2]
        window = sliding_window if sliding_window is not None and sliding_window < key.shape[2] else None
        for lengths in document_lengths or ():
            if sum(lengths) != tokens or past:
                raise IncompatibleError(f"documents of {sum(lengths)} tokens in a row of {tokens}")
        if gap is not None or prefix is not None:
            _refuse_beside(prefix, document_lengths, shifted_group, dropout)
            if prefix is None:
                return _around(query, key, value, gap, scale, window), None
            _refuse_prefix(prefix, key.shape[2], sliding_window)
            return _behind(module.layer_idx, query, key, value, prefix, gap, scale), None
        if past or window is not None or dropout or value.shape[3] != query.shape[3]:
            if shifted_group:
                raise IncompatibleError(
                    "shifted attention works without a cached past, a sliding window and dropout"
                )
            return _by_row(query, key, value, document_lengths, scale, dropout, window), None
        kernel = _kernel(kernels, backend, query)
        out = _packed(query, key, value, document_lengths, scale, kernel, kv_heads_per_call, shifted_group)
        return out, None

    return attention


def _refuse_window(segments: AttentionSegments, sliding_window: int | None) -> None:
    if sliding_window is not None and segments.most_keys > sliding_window:
        raise IncompatibleError(
            f"a memory and window of {segments.most_keys:,} tokens with a model that sees {sliding_window:,}",
            rule="A sliding window would hide the beginning of the memory.",
        )


def _refuse_beside(
    prefix: SharedPrefix | None, document_lengths: list[list[int]] | None, shifted_group: int, dropout: float
) -> None:
    if document_lengths is not None or shifted_group or dropout:
        what = "gap" if prefix is None else "shared prefix"
        raise IncompatibleError(f"a {what} works without documents, shifted attention and dropout")


def _refuse_prefix(prefix: SharedPrefix, tokens: int, sliding_window: int | None) -> None:
    whole = prefix.layers[0][0].shape[2] + tokens
    if sliding_window is not None and whole > sliding_window:
        raise IncompatibleError(
            f"a shared prefix and own tokens, {whole:,} in all, with a model that sees {sliding_window:,}",
            rule="A sliding window would hide the beginning of the prefix.",
        )


def _behind(
    layer: Any, query: Tensor, key: Tensor, value: Tensor, prefix: SharedPrefix, gap: Gap | None, scale: float
) -> Tensor:
    """Rows behind a prefix; returns as `_packed`."""
    if gap is None:
        gap = Gap(0, torch.zeros(query.shape[0], dtype=torch.int64, device=query.device))
    own = _gap_mask(gap, query.shape[2], key.shape[2], None)
    return attend_behind_prefix(query, key, value, prefix.layers[layer], own, scale)


def _kernel(kernels: Kernels, backend: str, query: Tensor) -> AttentionKernel:
    kind = query.device, query.dtype, query.shape[3]
    if kind not in kernels:
        kernels[kind] = choose_kernel(backend, *kind)
    return kernels[kind]


def _packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document_lengths: list[list[int]] | None,
    scale: float,
    kernel: AttentionKernel,
    kv_heads_per_call: int,
    shifted_group: int,
) -> Tensor:
    """`[batch, heads, tokens, head_dim]` as one packed row of documents; returns `[batch, tokens, heads, head_dim]`."""
    batch, _, tokens, _ = query.shape
    lengths = [n for row in document_lengths or [[tokens]] * batch for n in row]
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    out = attend(
        query, key, value, lengths, scale, kernel,
        kv_heads_per_call=kv_heads_per_call, shifted_group=shifted_group,
    )  # fmt: skip
    return out.unflatten(0, (batch, tokens))


def _by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    document_lengths: list[list[int]] | None,
    scale: float,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Row by row and document by document through `scaled_dot_product_attention`; returns as `_packed`."""
    if document_lengths is None:
        return _causal(query, key, value, scale, dropout, window).transpose(1, 2)
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for row, lengths in enumerate(document_lengths):
        start = 0
        for length in lengths:
            part = (slice(row, row + 1), slice(None), slice(start, start + length))
            piece = _causal(query[part], key[part], value[part], scale, dropout, window)
            out[row : row + 1, start : start + length] = piece.transpose(1, 2)
            start += length
    return out


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, window: int | None
) -> Tensor:
    """One document: `[batch, heads, tokens, width]`; each query sees the past and itself."""
    tokens, past = query.shape[2], key.shape[2] - query.shape[2]
    options: dict[str, Any] = {
        "scale": scale,
        "dropout_p": dropout,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    sdpa = nn.functional.scaled_dot_product_attention
    if window is not None:
        mask = _window_mask(tokens, past, window, query.device)
        return attend_masked(query, key, value, mask, scale, dropout=dropout)
    if tokens == 1:
        return sdpa(query, key, value, **options)
    if past:
        from torch.nn.attention.bias import causal_lower_right

        if options.pop("enable_gqa"):  # the bias class does not repeat heads
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        return sdpa(query, key, value, attn_mask=causal_lower_right(tokens, tokens + past), **options)
    return sdpa(query, key, value, is_causal=True, **options)


def _around(
    query: Tensor, key: Tensor, value: Tensor, gap: Gap | None, scale: float, window: int | None
) -> Tensor:
    """As `_causal` for rows that end together, each with a gap that no token of it sees; returns as `_packed`.

    Query heads that share keys become rows of one head, so that nothing is repeated and any kernel that takes a mask
    will do. A query in a gap sees itself: what it gives is never looked at, but must be a number.
    """
    assert gap is not None
    batch, heads, tokens, width = query.shape
    shared = heads // key.shape[1]
    mask = _gap_mask(gap, tokens, key.shape[2], window)
    folded = query.reshape(batch, key.shape[1], shared * tokens, width)
    out = attend_masked(folded, key, value, mask.repeat(1, shared, 1)[:, None], scale)
    return out.reshape(batch, heads, tokens, value.shape[3]).transpose(1, 2)


def _gap_mask(gap: Gap, tokens: int, total: int, window: int | None) -> Tensor:
    """Which keys the last `tokens` of `total` places see, `[batch, tokens, total]`."""
    columns = torch.arange(total, device=gap.widths.device)
    rows = columns[total - tokens :, None]
    ends = gap.start + gap.widths[:, None]
    is_token = (columns < gap.start) | (columns >= ends)
    seen = (columns <= rows) & is_token[:, None]
    if window is not None:  # counts tokens: those before a gap are as near as if there were none
        places = columns - gap.widths[:, None] * (columns >= ends)
        seen = seen & (places[:, None] > places[:, total - tokens :, None] - window)
    return seen | (columns == rows)


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
