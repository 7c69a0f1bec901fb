"""From settings and texts to what is read, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longlora_cli.config import EvalConfig
from longlora_cli.data.chunk import Int32
from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.peer_perplexity import (
    HF_DOCS,
    LM_EVAL,
    LONGLORA,
    LONGLORA_STRIDE,
    PeerWindow,
    peer_windows,
)
from longlora_cli.evaluation.texts import Text
from longlora_cli.evaluation.windows import Reading
from longlora_cli.generation.past import PLAIN, Past


def stride_of(config: EvalConfig) -> int:
    """The stride in use: the given one, else half a window."""
    return config.stride if config.stride is not None else max(1, config.window // 2)


def reading_of(config: EvalConfig, texts: Sequence[Text], past: Past = PLAIN) -> Reading:
    """How the texts are read; all of them have the same BOS."""
    bos = texts[0].bos
    room = config.window - (bos is not None)
    return Reading(
        window=config.window,
        stride=stride_of(config),
        bos=bos,
        short=config.short_context,
        whole=all(len(text.ids) < room for text in texts),
        chunk=config.prefill_chunk,
        past=past,
    )


@dataclass(frozen=True)
class PeerReading:
    """What a peer reads of one text.

    Args:
        ids: The peer's ids of the text, specials included.
        windows: Its windows of them.
        known: They are the exact reading's own windows, whose sums are then the peer's.
    """

    ids: Int32
    windows: list[PeerWindow]
    known: bool


def peer_reading(peer: str, text: Text, config: EvalConfig) -> PeerReading:
    """What a peer reads of a text."""
    ids = text.own_ids
    if peer == LM_EVAL:
        ids = np.concatenate([np.array([text.outset], dtype=np.int32), ids])
    stride = stride_of(config)
    windows = peer_windows(peer, len(ids), window=config.window, stride=stride)
    # Overlapping windows score what ours do. With stride == window ours overlap by a token, the peer's do not.
    same = text.bos is None and (text.prefix, ()) == text.frame and stride < config.window
    return PeerReading(ids, windows, peer == HF_DOCS and same)


def check_texts(config: EvalConfig, texts: Sequence[Text]) -> None:
    """Refuse settings that these texts leave without effect.

    Raises:
        SettingsError: No text is longer than the short context; a peer reads nothing of the texts, or needs a
            token that the tokenizer does not have.
    """
    if not texts:
        return
    longest = max(len(text.ids) for text in texts)
    if config.short_context is not None and longest + (texts[0].bos is not None) <= config.short_context:
        raise SettingsError(
            f"--short-context {config.short_context} has no effect here: the longest text has {longest} tokens"
        )
    if LM_EVAL in config.compat and texts[0].outset is None:
        raise SettingsError(
            "--compat lm-eval: the tokenizer has neither a BOS nor an EOS token",
            rule="lm-eval puts one in front of each text.",
        )
    for peer in config.compat:
        if not any(peer_reading(peer, text, config).windows for text in texts):
            rule = (
                f"LongLoRA begins a window every {LONGLORA_STRIDE} tokens and leaves the last one out: a text needs "
                f"{config.window + LONGLORA_STRIDE + 1} tokens."
                if peer == LONGLORA
                else "It needs two tokens."
            )
            raise SettingsError(
                f"--compat {peer} reads nothing of these texts, the longest has {longest} tokens", rule=rule
            )


def work_tokens(config: EvalConfig, texts: Sequence[Text]) -> int:
    """Losses to be computed, over all passes; what progress counts."""
    reading = reading_of(config, texts)
    total = 0
    for text in texts:
        total += len(text.ids) - reading.first
        if reading.short is not None:
            curve = reading.curve(reading.windows(len(text.ids)))
            total += sum(w.stop - w.first for one in curve for w in reading.short_windows(one))
        for peer in dict.fromkeys(config.compat):
            peers = peer_reading(peer, text, config)
            total += 0 if peers.known else sum(p.window.stop - p.window.first for p in peers.windows)
    return total
