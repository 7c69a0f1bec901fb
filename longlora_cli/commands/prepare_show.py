"""`longlora prepare --show N`: samples of what was written, learnt tokens set off from masked ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from longlora_cli.console import Console
from longlora_cli.data.chunk import IGNORE, Chunk
from longlora_cli.data.dataset import ChunkDataset
from longlora_cli.data.samples import TokenRun, sampled_chunks, token_runs

# A longer run shows so many of its first and of its last tokens: 32,768 in full would fill 500 lines.
_EDGE_TOKENS = 60
_LEARNT, _MASKED, _FRAME = "bold green", "dim", "cyan"
# What sets learnt text off where there are no colours.
_OPEN, _CLOSE = "⟦", "⟧"


def show_samples(data: ChunkDataset, tokenizer: Any, console: Console, *, count: int, seed: int) -> None:
    """Print some chunks.

    Args:
        data: What was prepared.
        tokenizer: What it was prepared with.
        console: Where to.
        count: How many chunks, at most all.
        seed: Decides which.
    """
    said = "green" if console.has_colours else f"in {_OPEN}brackets{_CLOSE}"
    console.print(f"Learnt tokens are {said}, the others are only read.")
    for index in sampled_chunks(len(data), count, seed):
        chunk = data[index]
        learnt = float(np.mean(chunk.labels != IGNORE))
        documents = len(chunk.document_lengths)
        within = "1 document" if documents == 1 else f"{documents:,} documents"
        title = f"chunk {index + 1:,} of {len(data):,}: {len(chunk):,} tokens in {within}"
        console.styled([(f"{title}, {learnt:.1%} learnt", _FRAME)])
        _show_chunk(chunk, tokenizer, console)


def _show_chunk(chunk: Chunk, tokenizer: Any, console: Console) -> None:
    for number, runs in enumerate(token_runs(chunk), start=1):
        tokens = sum(len(run.ids) for run in runs)
        console.styled([(f"-- document {number:,}: {tokens:,} tokens", _FRAME)])
        console.styled([part for run in runs for part in _parts(run, tokenizer, console.has_colours)])


def _parts(run: TokenRun, tokenizer: Any, has_colours: bool) -> list[tuple[str, str]]:
    """A run's text with its style."""
    style = _LEARNT if run.is_learnt else _MASKED
    hidden = len(run.ids) - 2 * _EDGE_TOKENS
    if hidden <= 0:
        parts = [(tokenizer.decode(run.ids.tolist()), style)]
    else:
        first, last = (
            tokenizer.decode(ids.tolist()) for ids in (run.ids[:_EDGE_TOKENS], run.ids[-_EDGE_TOKENS:])
        )
        parts = [(first, style), (f" [... {hidden:,} tokens ...] ", _FRAME), (last, style)]
    if run.is_learnt and not has_colours:
        return [(_OPEN, style), *parts, (_CLOSE, style)]
    return parts
