"""Exact next-token losses of long texts.

Each token of a text is scored exactly once, in nats, and every table is a sum of those numbers in float64
(`perplexity_tables`). Logits exist for a tile of tokens at a time. A window longer than `chunk` is read in
pieces against a KV cache, so that memory is the weights, the cache of one window and one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longlora_cli.evaluation.windows import Reading, Window
from longlora_cli.generation.beacon_reader import read_hidden
from longlora_cli.generation.cache import depends_on_length, new_cache, pieces
from longlora_cli.generation.past import PLAIN, Past
from longlora_cli.memory.loss import IGNORE, token_losses
from longlora_cli.models.loading import LoadedModel

Float32 = npt.NDArray[np.float32]
Float = npt.NDArray[np.floating[Any]]
Advance = Callable[[int], None]

# Logits of one tile: 2^25 float32 numbers are 128 MiB (262 tokens at a vocabulary of 128,256).
_TILE_LOGITS = 1 << 25


@dataclass(frozen=True)
class TextLosses:
    """The scored tokens of one text, or of a run of its windows.

    Args:
        nll: Loss in nats of each scored token, in their order.
        windows: Sum and count of the losses that each window scored, `[windows, 2]`; the clusters of the
            interval.
        curve: Losses of the windows of the curve, `[curve windows, window - 1]`; column `i` had `i + 1`
            tokens of context. No rows when `Reading.whole`: then `nll` is the row.
        short: The same tokens with the short context, shaped as the curve (`[1, tokens]` when
            `Reading.whole`); None: not measured.
    """

    nll: Float32
    windows: npt.NDArray[np.float64]
    curve: Float32
    short: Float32 | None = None


def join(parts: Sequence[TextLosses]) -> TextLosses:
    """The losses of a text from those of its consecutive runs of windows."""
    shorts = [part.short for part in parts if part.short is not None]
    return TextLosses(
        np.concatenate([part.nll for part in parts]),
        np.concatenate([part.windows for part in parts]),
        np.concatenate([part.curve for part in parts]),
        np.concatenate(shorts) if shorts else None,
    )


def tile_tokens_for(vocabulary: int) -> int:
    """Rows of logits held at once so that they take at most 128 MiB in float32."""
    return max(16, _TILE_LOGITS // vocabulary)


@torch.no_grad()
def window_losses(
    loaded: LoadedModel, rows: Tensor, first: Sequence[int], *, chunk: int, past: Past = PLAIN
) -> Tensor:
    """Losses of the tokens of windows of one length.

    Args:
        loaded: The model, in eval mode.
        rows: Token ids `[windows, tokens]`, on any device.
        first: For each window the first token (from 1) whose loss is wanted.
        chunk: Most tokens in one forward; a longer window is read in pieces against a cache.
        past: How what was read is kept. A quantized cache is read in its blocks whatever the chunk and beacons in
            their windows, so that each token sees what an answer at its place would see.

    Returns:
        `[windows, tokens]` on the CPU, float32 (float64 for a float64 model); column `i` is the loss of token
        `i`, 0 where it was not asked for.
    """
    if past.beacon is not None and len(rows) > 1:  # a session reads one text
        alone = zip(rows.split(1), first, strict=True)
        return torch.cat([window_losses(loaded, row, [one], chunk=chunk, past=past) for row, one in alone])
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
    if past == PLAIN and (tokens - 1 <= chunk or depends_on_length(loaded)):
        hidden = loaded.hidden(rows[:, :-1], use_cache=False).last_hidden_state
        losses = losses_of(hidden, slice(0, tokens - 1))
    else:
        parts = (
            read_hidden(loaded, past.beacon, rows[0, :-1].tolist())
            if past.beacon is not None
            else _read_in_pieces(loaded, rows[:, :-1], chunk, new_cache(past.kv_bits))
        )
        losses = torch.cat([losses_of(hidden, piece) for hidden, piece in parts], dim=1)
    return torch.cat([losses.new_zeros(count, 1), losses], dim=1)


def _read_in_pieces(
    loaded: LoadedModel, rows: Tensor, chunk: int, cache: Any
) -> Iterator[tuple[Tensor, slice]]:
    for piece in starmap(slice, pieces(cache, 0, rows.shape[1], chunk)):
        positions = torch.arange(piece.start, piece.stop, device=rows.device).expand(rows.shape[0], -1)
        output = loaded.hidden(rows[:, piece], use_cache=True, past_key_values=cache, position_ids=positions)
        yield output.last_hidden_state, piece


def read_windows(
    loaded: LoadedModel,
    ids: Tensor,
    windows: Sequence[Window],
    *,
    bos: int | None = None,
    chunk: int,
    past: Past = PLAIN,
) -> Iterator[tuple[Window, Float]]:
    """Each window with the losses of its tokens `first` to `stop`, float32 (float64 for a float64 model).

    Windows of equal length share a forward as long as they have at most `chunk` tokens together.

    Args:
        loaded: The model, in eval mode.
        ids: The text `[tokens]`.
        windows: Of the text; `first` may equal `start` only with a `bos`.
        bos: A token put in front of each window.
        chunk: Most tokens in one forward.
        past: How what was read is kept.

    Raises:
        IncompatibleError: The model changes its logits after the head.
    """
    before = [] if bos is None else [torch.tensor([bos])]
    added = len(before)
    for group in _groups(windows, chunk, added):
        rows = torch.stack([torch.cat([*before, ids[w.start : w.stop]]) for w in group])
        first = [w.first - w.start + added for w in group]
        found = window_losses(loaded, rows, first, chunk=chunk, past=past).numpy()
        for one, losses in zip(group, found, strict=True):
            yield one, losses[one.first - one.start + added :]


def score_text(
    loaded: LoadedModel,
    ids: Sequence[int] | npt.NDArray[np.int64],
    reading: Reading,
    *,
    windows: Sequence[Window] | None = None,
    advance: Advance | None = None,
) -> TextLosses:
    """Score each token of a text from `reading.first` on exactly once.

    Args:
        loaded: The model, in eval mode.
        ids: Token ids of the text, with what stands in front of it once; not with a BOS of each window.
        reading: How it is read.
        windows: Only these of `reading.windows`; default: all of them.
        advance: Called with the number of tokens just scored, also those of the short context.

    Raises:
        ValueError: The text has nothing to score.
        IncompatibleError: The model changes its logits after the head.
    """
    if len(ids) <= reading.first:
        raise ValueError(f"a text of {len(ids)} tokens has nothing to score")
    plan = reading.windows(len(ids))
    in_curve = set(reading.curve(plan))
    tokens = torch.as_tensor(ids, dtype=torch.long)
    mine = plan if windows is None else windows
    # A window of the curve scores all of its tokens, also those that an earlier window has scored.
    widened = {one: Window(one.start, one.stop, one.start + reading.first) for one in mine if one in in_curve}
    asked = [widened.get(one, one) for one in mine]
    nll, sums, curve = [], [], []
    found = read_windows(loaded, tokens, asked, bos=reading.bos, chunk=reading.chunk, past=reading.past)
    for one, (read, losses) in zip(mine, found, strict=True):
        scored = losses[one.first - read.first :]
        nll.append(scored)
        sums.append((scored.sum(dtype=np.float64), len(scored)))
        if one in widened:
            curve.append((read, losses))
        if advance is not None:
            advance(len(scored))
    short = _short_losses(loaded, tokens, reading, curve, advance)
    rows = [] if reading.whole else [losses for _, losses in curve]
    shape = (len(rows), reading.window - 1)
    return TextLosses(
        np.concatenate(nll).astype(np.float32),
        np.array(sums, dtype=np.float64).reshape(-1, 2),
        np.stack(rows).astype(np.float32) if rows else np.zeros(shape, dtype=np.float32),
        short,
    )


def _short_losses(
    loaded: LoadedModel,
    tokens: Tensor,
    reading: Reading,
    curve: Sequence[tuple[Window, Float]],
    advance: Advance | None,
) -> Float32 | None:
    """The losses of the curve's windows with the short context, one row a window."""
    if reading.short is None:
        return None
    rows = [losses.astype(np.float32) for _, losses in curve]
    places = [(row, w) for row, (one, _) in enumerate(curve) for w in reading.short_windows(one)]
    found = read_windows(
        loaded, tokens, [w for _, w in places], bos=reading.bos, chunk=reading.chunk, past=reading.past
    )
    for (row, w), (_, losses) in zip(places, found, strict=True):
        start = w.first - curve[row][0].first
        rows[row][start : start + len(losses)] = losses
        if advance is not None:
            advance(len(losses))
    if rows:
        return np.stack(rows)
    return np.zeros((0, reading.window - 1), dtype=np.float32)


def _groups(windows: Sequence[Window], chunk: int, added: int) -> Iterator[list[Window]]:
    group: list[Window] = []
    for one in windows:
        if group and (one.tokens != group[0].tokens or (len(group) + 1) * (one.tokens + added) > chunk):
            yield group
            group = []
        group.append(one)
    if group:
        yield group


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
