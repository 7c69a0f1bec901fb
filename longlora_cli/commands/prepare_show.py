"""`longlora prepare --show N`: samples of the chunks, learnt tokens set off from masked ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from longlora_cli.console import Console
from longlora_cli.data.chunk import IGNORE, Chunk, Int32
from longlora_cli.data.samples import TokenRun, token_runs

# A longer run shows so many of its first and of its last tokens: 32,768 in full would fill 500 lines.
_EDGE_TOKENS = 60
# A chunk of 32,768 tokens can hold hundreds of short chats.
_MOST_DOCUMENTS = 8
_LEARNT, _MASKED, _FRAME = "bold green", "dim", "cyan"
# What sets learnt text off where there are no colours.
_OPEN, _CLOSE = "⟦", "⟧"


class Samples:
    """Chunks to look at, kept as they are written; a stand-in for the writer where nothing is.

    Args:
        wanted: Their numbers among all chunks, rising.
    """

    def __init__(self, wanted: list[int]) -> None:
        self.wanted = wanted
        self.chunks: list[Chunk] = []

    def add(self, input_ids: Int32, labels: Int32, document_lengths: Int32) -> None:
        """Take the next one; see `ChunkWriter.add`."""
        self.chunks.append(Chunk(input_ids, labels, document_lengths))


def show_samples(samples: Samples, total: int, tokenizer: Any, console: Console) -> None:
    """Print some chunks.

    Args:
        samples: The chunks.
        total: How many there are in all.
        tokenizer: What they were prepared with.
        console: Where to.
    """
    said = "green" if console.has_colours else f"in {_OPEN}brackets{_CLOSE}"
    console.print(f"Learnt tokens are {said}, the others are only read.")
    for index, chunk in zip(samples.wanted, samples.chunks, strict=True):
        learnt = float(np.mean(chunk.labels != IGNORE))
        documents = len(chunk.document_lengths)
        within = "1 document" if documents == 1 else f"{documents:,} documents"
        title = f"chunk {index + 1:,} of {total:,}: {len(chunk):,} tokens in {within}"
        console.styled([(f"{title}, {learnt:.1%} learnt", _FRAME)])
        _show_chunk(chunk, tokenizer, console)


def _show_chunk(chunk: Chunk, tokenizer: Any, console: Console) -> None:
    documents = list(token_runs(chunk))
    for number, runs in enumerate(documents[:_MOST_DOCUMENTS], start=1):
        tokens = sum(len(run.ids) for run in runs)
        console.styled([(f"-- document {number:,}: {tokens:,} tokens", _FRAME)])
        console.styled([part for run in runs for part in _parts(run, tokenizer, console.has_colours)])
    if (hidden := len(documents) - _MOST_DOCUMENTS) > 0:
        console.styled([(f"-- and {hidden:,} more document{'s' * (hidden > 1)}", _FRAME)])


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
