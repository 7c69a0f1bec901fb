"""Exact next-token losses of long texts, and the views of them: micro, macro, bits per byte, by position.

Each token of a text but its first is scored exactly once, in nats, and every table is a sum of those numbers
in float64. Logits exist for a tile of tokens at a time. A window longer than `chunk` is read in pieces
against a KV cache, so that memory is the weights, the cache of one window and one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longlora_cli.evaluation.statistics import bootstrap_ratio
from longlora_cli.evaluation.windows import Window, curve_windows, plan_windows, position_buckets
from longlora_cli.generation.prefill import depends_on_length, new_cache
from longlora_cli.memory.loss import IGNORE, token_losses
from longlora_cli.models.loading import LoadedModel

Float32 = npt.NDArray[np.float32]
Advance = Callable[[int], None]

# Logits of one tile: 2^25 float32 numbers are 128 MiB (262 tokens at a vocabulary of 128,256).
_TILE_LOGITS = 1 << 25


@dataclass(frozen=True)
class TextLosses:
    """The scored tokens of one text.

    Args:
        nll: Loss in nats of tokens 1, 2, ... `[tokens - 1]`; the first token has no context and no loss.
        windows: Sum and count of the losses that each window scored, `[windows, 2]`; the clusters of the
            interval.
        curve: Losses of the windows of the curve, `[curve windows, window - 1]`; column `i` had `i + 1`
            tokens of context.
    """

    nll: Float32
    windows: npt.NDArray[np.float64]
    curve: Float32


def tile_tokens_for(vocabulary: int) -> int:
    """Rows of logits held at once so that they take at most 128 MiB in float32."""
    return max(16, _TILE_LOGITS // vocabulary)


@torch.no_grad()
def window_losses(loaded: LoadedModel, rows: Tensor, first: Sequence[int], *, chunk: int) -> Tensor:
    """Losses of the tokens of windows of one length.

    Args:
        loaded: The model, in eval mode.
        rows: Token ids `[windows, tokens]`, on any device.
        first: For each window the first token (from 1) whose loss is wanted.
        chunk: Most tokens in one forward; a longer window is read in pieces against a cache.

    Returns:
        `[windows, tokens]` on the CPU, float32 (float64 for a float64 model); column `i` is the loss of token
        `i`, 0 where it was not asked for.
    """
    count, tokens = rows.shape
    rows = rows.to(loaded.device)
    labels = torch.full((count, tokens), IGNORE, device=loaded.device)
    for row, start in enumerate(first):
        labels[row, start - 1 : tokens - 1] = rows[row, start:]
    head, tile = loaded.head_weight(), tile_tokens_for(loaded.facts.vocabulary)

    def losses_of(hidden: Tensor, piece: slice) -> Tensor:
        found = token_losses(hidden.flatten(0, 1), head, labels[:, piece].flatten(), tile_tokens=tile)
        return found.view(count, -1).cpu()

    # Nothing follows the last token, so it need not be read. Positions that depend on the length of the
    # forward (dynamic NTK) would differ from piece to piece, so these models read a window at once.
    if tokens - 1 <= chunk or depends_on_length(loaded):
        hidden = loaded.hidden(rows[:, :-1], use_cache=False).last_hidden_state
        losses = losses_of(hidden, slice(0, tokens - 1))
    else:
        losses = torch.cat(
            [losses_of(hidden, piece) for hidden, piece in _read_in_pieces(loaded, rows[:, :-1], chunk)],
            dim=1,
        )
    return torch.cat([losses.new_zeros(count, 1), losses], dim=1)


def _read_in_pieces(loaded: LoadedModel, rows: Tensor, chunk: int) -> Iterator[tuple[Tensor, slice]]:
    cache = new_cache()
    for start in range(0, rows.shape[1], chunk):
        piece = slice(start, min(start + chunk, rows.shape[1]))
        positions = torch.arange(piece.start, piece.stop, device=rows.device).expand(rows.shape[0], -1)
        output = loaded.hidden(rows[:, piece], use_cache=True, past_key_values=cache, position_ids=positions)
        yield output.last_hidden_state, piece


def score_text(
    loaded: LoadedModel,
    ids: Sequence[int],
    *,
    window: int,
    stride: int,
    chunk: int,
    advance: Advance | None = None,
) -> TextLosses:
    """Score each token of a text but the first exactly once.

    Windows of equal length share a forward as long as they have at most `chunk` tokens together.

    Args:
        loaded: The model, in eval mode.
        ids: Token ids, with BOS if the tokenizer puts one.
        window: Most tokens read at once.
        stride: Tokens between windows; see `plan_windows`.
        chunk: Most tokens in one forward.
        advance: Called with the number of tokens just scored.

    Raises:
        ValueError: The text has fewer than two tokens.
        IncompatibleError: The model changes its logits after the head.
    """
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens has nothing to score")
    windows = plan_windows(len(ids), window, stride)
    in_curve = set(curve_windows(windows, window))
    tokens = torch.tensor(ids, dtype=torch.long)
    nll = np.zeros(len(ids), dtype=np.float32)
    sums, curve = [], []
    for group in _groups(windows, chunk):
        rows = torch.stack([tokens[w.start : w.stop] for w in group])
        first = [1 if w in in_curve else w.first - w.start for w in group]
        for one, losses in zip(group, window_losses(loaded, rows, first, chunk=chunk).numpy(), strict=True):
            scored = losses[one.first - one.start :]
            nll[one.first : one.stop] = scored
            sums.append((scored.sum(dtype=np.float64), len(scored)))
            if one in in_curve:
                curve.append(losses[1:])
            if advance is not None:
                advance(len(scored))
    stacked = np.stack(curve).astype(np.float32) if curve else np.zeros((0, window - 1), dtype=np.float32)
    return TextLosses(nll[1:], np.array(sums, dtype=np.float64), stacked)


def _groups(windows: list[Window], chunk: int) -> Iterator[list[Window]]:
    group: list[Window] = []
    for one in windows:
        if group and (one.tokens != group[0].tokens or (len(group) + 1) * one.tokens > chunk):
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def summarize(texts: Sequence[TextLosses], text_bytes: Sequence[int], *, window: int) -> dict[str, Any]:
    """Every view of the losses of some texts, as plain JSON.

    - `nll`: mean nats per token over all texts (micro); `perplexity` is its exponential, `ci95` its bootstrap
      interval over windows.
    - `perplexity_macro`: exponential of the mean over texts of each text's mean loss.
    - `bits_per_byte`: all nats / ln 2 / `text_bytes`, comparable between tokenizers.
    - `by_position`: see `position_curve`.

    Args:
        texts: At least one text.
        text_bytes: UTF-8 bytes of the scored part of each text.
        window: Tokens of a window.
    """
    sums = [float(text.nll.sum(dtype=np.float64)) for text in texts]
    counts = [len(text.nll) for text in texts]
    clusters = np.concatenate([text.windows for text in texts])
    nats, tokens = math.fsum(sums), sum(counts)
    interval = bootstrap_ratio(clusters[:, 0].tolist(), clusters[:, 1].tolist())
    return {
        "n": tokens,
        "texts": len(texts),
        "windows": len(clusters),
        "nll": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "ci95": None if interval is None else [math.exp(value) for value in interval],
        "perplexity_macro": math.exp(
            math.fsum(s / c for s, c in zip(sums, counts, strict=True)) / len(texts)
        ),
        "bits_per_byte": nats / math.log(2) / sum(text_bytes),
        "bytes": sum(text_bytes),
        **position_curve(texts, window),
    }


def position_curve(texts: Sequence[TextLosses], window: int) -> dict[str, Any]:
    """Loss by the number of tokens of context: `{"by_position", "curve_windows", "curve_source"}`.

    A token's position is how many tokens before it the model saw. The curve is made of full windows that
    score no token twice, and all of a window's tokens are in it: each bucket `[from, to)` is an average over
    the same windows, so that buckets differ by context and not by text (`curve_source: full windows`). When
    every text is shorter than the window, each text as a whole takes the place of a window (`whole texts`),
    and late buckets hold fewer texts.
    """
    full = [row for text in texts for row in text.curve]
    rows = full or [text.nll for text in texts]
    buckets = []
    for low, high in position_buckets(window):
        # Column i had i + 1 tokens of context.
        pieces = [row[max(low - 1, 0) : high - 1] for row in rows]
        pieces = [piece for piece in pieces if len(piece)]
        if not pieces:
            continue
        sums, counts = [float(p.sum(dtype=np.float64)) for p in pieces], [float(len(p)) for p in pieces]
        interval = bootstrap_ratio(sums, counts)
        nll = math.fsum(sums) / sum(counts)
        buckets.append(
            {
                "from": low,
                "to": high,
                "n": int(sum(counts)),
                "nll": nll,
                "perplexity": math.exp(nll),
                "ci95": None if interval is None else [math.exp(value) for value in interval],
            }
        )
    source = "full windows" if full else "whole texts"
    return {"by_position": buckets, "curve_windows": len(rows), "curve_source": source}


@dataclass(frozen=True)
class ChunkLosses:
    """Sum in nats and count of the labels of prepared chunks; add several, then divide once."""

    total: float
    count: int
    chunks: int

    def __add__(self, other: ChunkLosses) -> ChunkLosses:
        return ChunkLosses(self.total + other.total, self.count + other.count, self.chunks + other.chunks)

    @property
    def nll(self) -> float:
        """Mean loss in nats; NaN when nothing was scored."""
        return self.total / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss, infinite above 709 nats."""
        return math.exp(self.nll) if not self.nll > 709 else math.inf


@torch.no_grad()
def evaluate_chunks(
    loaded: LoadedModel,
    chunks: Sequence[Any],
    *,
    max_samples: int | None = None,
    tile_tokens: int | None = None,
    advance: Advance | None = None,
) -> ChunkLosses:
    """Loss of prepared chunks on a model that may be in training; its mode is put back afterwards.

    Labels of -100 do not count, documents do not see each other, and the first token of a document is never
    scored from the one before. Processes that share the work take parts of `chunks` and add their results.

    Args:
        loaded: The model.
        chunks: Chunks with `input_ids`, `labels` (not shifted), `position_ids` and `document_lengths`.
        max_samples: Only the first chunks.
        tile_tokens: Rows of logits held at once; default: 128 MiB of them.
        advance: Called with 1 after each chunk.

    Raises:
        IncompatibleError: The model changes its logits after the head.
    """
    tile = tile_tokens or tile_tokens_for(loaded.facts.vocabulary)
    number = len(chunks) if max_samples is None else min(max_samples, len(chunks))
    result = ChunkLosses(0.0, 0, 0)
    with _eval_mode(loaded.model):
        for index in range(number):
            result += _chunk_losses(loaded, chunks[index], tile)
            if advance is not None:
                advance(1)
    return result


def _chunk_losses(loaded: LoadedModel, chunk: Any, tile: int) -> ChunkLosses:
    # int64 copies: the chunk's arrays are read-only views of a mapped file.
    ids, labels, positions = (
        torch.from_numpy(np.array(values, dtype=np.int64))
        for values in (chunk.input_ids, chunk.labels, chunk.position_ids)
    )
    lengths = [int(length) for length in chunk.document_lengths]
    labels[np.cumsum([0, *lengths[:-1]])] = IGNORE
    shifted = torch.cat([labels[1:], torch.tensor([IGNORE])]).to(loaded.device)
    hidden = loaded.hidden(
        ids[None].to(loaded.device),
        position_ids=positions[None].to(loaded.device),
        document_lengths=[lengths],
        use_cache=False,
    ).last_hidden_state
    losses = token_losses(hidden[0], loaded.head_weight(), shifted, tile_tokens=tile)
    return ChunkLosses(float(losses.double().sum()), int(shifted.ne(IGNORE).sum()), 1)


@contextmanager
def _eval_mode(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
