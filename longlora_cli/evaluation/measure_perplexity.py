"""Score the texts of a plan, a run of windows at a time, each kept in the journal."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from longlora_cli.evaluation.generation import Advance, Row
from longlora_cli.evaluation.journal import Journal, hash_ids, key_of
from longlora_cli.evaluation.measure import TaskResult
from longlora_cli.evaluation.peer_perplexity import summarize_peer
from longlora_cli.evaluation.perplexity import Float32, TextLosses, join, read_windows, score_text
from longlora_cli.evaluation.perplexity_plan import peer_reading, reading_of, stride_of
from longlora_cli.evaluation.perplexity_tables import summarize
from longlora_cli.evaluation.plan import EvalPlan
from longlora_cli.evaluation.texts import Text
from longlora_cli.evaluation.windows import Reading, Window, blocks
from longlora_cli.models.loading import LoadedModel

# Tokens read between two rows of the journal: what a kill may cost. 65,536 are seconds on a GPU.
_BLOCK_TOKENS = 1 << 16


class _Kept:
    """Rows from the journal, or made now and put there."""

    def __init__(self, journal: Journal, identity: Any, advance: Advance | None) -> None:
        self._journal, self._identity = journal, identity
        self.advance: Advance = advance or (lambda _: None)
        self.seconds = 0.0

    def row(self, parts: Sequence[Any], losses: int, make: Callable[[], Row]) -> Row:
        """The row with the key of `parts`; `losses` is what a kept one advances."""
        key = key_of("ppl", *parts, self._identity)
        row = self._journal.get(key)
        if row is None:
            started = time.perf_counter()
            row = {"key": key, **make(), "seconds": round(time.perf_counter() - started, 4)}
            self._journal.add(row)
        else:
            self.advance(losses)
        self.seconds += row["seconds"]
        return row


def measure_perplexity(
    loaded: LoadedModel, plan: EvalPlan, journal: Journal, identity: Any, advance: Advance | None = None
) -> TaskResult:
    """Score the plan's texts; `advance` is called with losses, `perplexity_plan.work_tokens` in all."""
    config = plan.config
    reading = reading_of(config, plan.texts, plan.past)
    kept = _Kept(journal, identity, advance)
    found, samples = [], []
    texts = list(journal.share(plan.texts))
    for text in texts:
        before = kept.seconds
        losses = _text_losses(loaded, text, reading, kept)
        found.append(losses)
        samples.append(
            {
                "text": text.name,
                "n": len(losses.nll),
                "nll": float(losses.nll.mean(dtype=np.float64)),
                "bytes": text.scored.bytes,
                "words": text.scored.words,
                "seconds": round(kept.seconds - before, 4),
            }
        )
    if journal.shard is not None:
        for peer in dict.fromkeys(config.compat):
            _peer(loaded, peer, plan, texts, found, kept)
        return TaskResult.of_share(samples)
    sizes = [text.scored for text in texts]
    summary = summarize(found, sizes, window=config.window, short=config.short_context)
    summary |= {"window": config.window, "stride": stride_of(config), "seconds": kept.seconds}
    bos = config.bos if config.bos != "auto" else ("first" if plan.texts[0].prefix else "none")
    summary |= {"bos": bos, "docs": config.docs}
    if config.short_context is not None:
        summary |= {"short_context": reading.short, "short_stride": reading.short_stride}
    summary["tokens_per_second"] = summary["n"] / kept.seconds if kept.seconds > 0 else None
    if config.compat:
        peers = dict.fromkeys(config.compat)
        summary["compat"] = {peer: _peer(loaded, peer, plan, texts, found, kept) for peer in peers}
    return TaskResult(summary, samples, [losses.nll for losses in found])


def _text_losses(loaded: LoadedModel, text: Text, reading: Reading, kept: _Kept) -> TextLosses:
    ids, name = text.ids.astype(np.int64), hash_ids(text.ids.tolist())
    plan = reading.windows(len(ids))
    curve = set(reading.curve(plan))
    parts = []
    for block in blocks(plan, _BLOCK_TOKENS):

        def make(block: list[Window] = block) -> Row:
            return _packed(score_text(loaded, ids, reading, windows=block, advance=kept.advance))

        losses = sum(w.stop - w.first for w in block)
        losses += sum(s.stop - s.first for w in block if w in curve for s in reading.short_windows(w))
        row = kept.row(_block_parts(name, reading, block), losses, make)
        parts.append(_unpacked(row, reading))
    return join(parts)


def _block_parts(name: str, reading: Reading, block: Sequence[Window]) -> list[Any]:
    how = [reading.window, reading.stride, reading.bos, reading.short, reading.whole]
    return [name, *how, block[0].start, block[-1].stop]


def unscored(text: Text, reading: Reading, journal: Journal, identity: Any) -> list[Window]:
    """The windows of a text whose losses no journal holds."""
    name = hash_ids(text.ids.tolist())
    return [
        window
        for block in blocks(reading.windows(len(text.ids)), _BLOCK_TOKENS)
        if key_of("ppl", *_block_parts(name, reading, block), identity) not in journal
        for window in block
    ]


def _peer(
    loaded: LoadedModel,
    peer: str,
    plan: EvalPlan,
    texts: Sequence[Text],
    exact: Sequence[TextLosses],
    kept: _Kept,
) -> dict[str, Any]:
    windows, losses, before = [], [], kept.seconds
    for text, known in zip(texts, exact, strict=True):
        peers = peer_reading(peer, text, plan.config)
        windows += peers.windows
        own = [one.window for one in peers.windows]
        losses.append(
            known.windows if peers.known else _window_sums(loaded, peer, peers.ids, own, kept, plan)
        )
    if not texts:
        return {}
    sizes = [text.size for text in texts]
    found = summarize_peer(peer, windows, np.concatenate(losses), sizes)
    return {**found, "seconds": round(kept.seconds - before, 4)}


def _window_sums(
    loaded: LoadedModel,
    peer: str,
    ids: npt.NDArray[np.int32],
    windows: list[Window],
    kept: _Kept,
    plan: EvalPlan,
) -> npt.NDArray[np.float64]:
    """Sum and count of the losses of each window, `[windows, 2]`."""
    tokens, name, chunk = (
        torch.from_numpy(ids.astype(np.int64)),
        hash_ids(ids.tolist()),
        plan.config.prefill_chunk,
    )
    sums = []
    for block in blocks(windows, _BLOCK_TOKENS):

        def make(block: list[Window] = block) -> Row:
            found = []
            for _, losses in read_windows(loaded, tokens, block, chunk=chunk, past=plan.past):
                found.append([float(losses.sum(dtype=np.float64)), len(losses)])
                kept.advance(len(losses))
            return {"windows": found}

        how = [peer, plan.config.window, stride_of(plan.config), block[0].start, block[-1].stop]
        sums += kept.row([name, *how], sum(w.stop - w.first for w in block), make)["windows"]
    return np.array(sums, dtype=np.float64).reshape(-1, 2)


def _packed(losses: TextLosses) -> Row:
    row = {"nll": _pack(losses.nll), "curve": _pack(losses.curve), "windows": losses.windows.tolist()}
    return row if losses.short is None else row | {"short": _pack(losses.short)}


def _pack(values: Float32) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _unpacked(row: Row, reading: Reading) -> TextLosses:
    def read(packed: str) -> Float32:
        return np.frombuffer(base64.b64decode(packed), dtype="<f4").astype(np.float32)

    nll, width = read(row["nll"]), reading.window - 1
    short = read(row["short"]).reshape(-1, len(nll) if reading.whole else width) if "short" in row else None
    return TextLosses(nll, np.array(row["windows"]), read(row["curve"]).reshape(-1, width), short)
