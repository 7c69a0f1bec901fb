"""Perplexities as three other programs define them, so that their published numbers can be compared.

None of them is the perplexity of the text: LongLoRA scores most tokens many times, the transformers
documentation weights windows by a label too few, lm-eval gives the first token of each window one token of
context. What is here are their rules, read in their sources and written anew; results carry the rule's name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from longlora_cli.evaluation.perplexity_tables import exponential, per_text_units
from longlora_cli.evaluation.texts import TextSize
from longlora_cli.evaluation.windows import Window

LONGLORA, HF_DOCS, LM_EVAL = "longlora", "hf-docs", "lm-eval"
PEERS = (LONGLORA, HF_DOCS, LM_EVAL)

LONGLORA_STRIDE = 256
# LongLoRA writes e with six digits: a loss of 2 becomes 7.38905 by its number and 7.389056 by e.
_LONGLORA_E = 2.71828

_RULES = {
    LONGLORA: "LongLoRA eval.py (4cbb61b), batch size 1: mean over windows every 256 tokens of each window's "
    "mean loss, then 2.71828 to its power",
    HF_DOCS: "transformers docs perplexity.md: each window's mean loss weighted by its targets less one",
    LM_EVAL: "lm-evaluation-harness 0.4.13 loglikelihood_rolling: nearly disjoint windows, the first token of "
    "each with one token of context; per word, byte and in bits",
}


@dataclass(frozen=True)
class PeerWindow:
    """A window that a peer reads: `window` of its ids, and the weight that it gives to the window's mean loss."""

    window: Window
    weight: int


def peer_windows(peer: str, tokens: int, *, window: int, stride: int) -> list[PeerWindow]:
    """The windows that a peer reads of `tokens` ids.

    Args:
        peer: Of `PEERS`.
        tokens: How many ids: as the tokenizer gives them; for lm-eval after its prefix token.
        window: The peer's sequence length.
        stride: Of hf-docs; the others have their own.
    """
    if peer == LONGLORA:
        return [PeerWindow(w, 1) for w in longlora_windows(tokens, window)]
    if peer == HF_DOCS:
        return hf_docs_windows(tokens, window, stride)
    return [PeerWindow(w, w.stop - w.first) for w in lm_eval_windows(tokens - 1, window)]


def longlora_windows(tokens: int, window: int) -> list[Window]:
    """Full windows every 256 tokens, but for the last of them; all tokens of each but its first are scored.

    Source: LongLoRA eval.py, `get_as_batch`, which drops the last beginning with `all_ix.pop()`.
    """
    starts = range(0, tokens - window, LONGLORA_STRIDE)[:-1]
    return [Window(start, start + window, start + 1) for start in starts]


def hf_docs_windows(tokens: int, window: int, stride: int) -> list[PeerWindow]:
    """Windows every `stride` tokens, each scoring what none before it reached.

    The weight is the number of targets less one. A window that overlaps those before it has a label for each
    target, so it counts by one too few; with stride 1 all windows but the first count nothing.

    Source: transformers docs/source/en/perplexity.md, as of 2024-2026.
    """
    found: list[PeerWindow] = []
    reached = 0
    for start in range(0, tokens, stride):
        stop = min(start + window, tokens)
        # A window of one token has no label; the peer's loss of it is NaN, with weight 0.
        if stop - start > 1:
            found.append(PeerWindow(Window(start, stop, max(reached, start + 1)), stop - reached - 1))
        reached = stop
        if stop == tokens:
            break
    return found


def lm_eval_windows(tokens: int, window: int, *, context: int = 1) -> list[Window]:
    """Windows over `[prefix token, *text]` that score each of the text's `tokens` once.

    At most `window` tokens are inputs, so that a row has one token more: nothing follows the last one. All
    windows but the first give `context` tokens before the first that is scored; the last one is filled from
    the left.

    Source: lm-evaluation-harness 0.4.13, `utils.get_rolling_token_windows` with `make_disjoint_window`, which
        `loglikelihood_rolling` calls with a context of 1.
    """
    if not 1 <= context <= window:
        raise ValueError(f"context {context}, window {window}")
    if tokens == 0:
        return []
    done = min(window, tokens)
    found = [Window(0, done + 1, 1)]
    while done < tokens:
        new = min(tokens - done, window - context + 1)
        done += new
        found.append(Window(done - window, done + 1, done - new + 1))
    return found


def summarize_peer(
    peer: str,
    windows: Sequence[PeerWindow],
    losses: npt.NDArray[np.float64],
    sizes: Sequence[TextSize],
) -> dict[str, Any]:
    """A peer's numbers, with the rule they follow.

    Args:
        peer: Of `PEERS`.
        windows: Its windows of all texts.
        losses: Sum and count of the losses of each, `[windows, 2]`.
        sizes: Bytes and words of the whole texts; only lm-eval divides by them.

    Returns:
        `rule`, `windows`, `n` (losses that were averaged or added) and `perplexity` with its `nll`; for lm-eval
        `loglikelihood`, `word_perplexity`, `byte_perplexity` and `bits_per_byte`.
    """
    sums, counts = losses[:, 0], losses[:, 1]
    found: dict[str, Any] = {"rule": _RULES[peer], "windows": len(windows), "n": int(counts.sum())}
    if peer == LM_EVAL:
        nats = math.fsum(sums)
        return found | {"loglikelihood": -nats, **per_text_units(nats, sizes)}
    weights = np.array([one.weight for one in windows], dtype=np.float64)
    nll = math.fsum(sums / counts * weights) / math.fsum(weights)
    perplexity = exponential(nll)
    if peer == LONGLORA and perplexity is not None:
        perplexity = _LONGLORA_E**nll
    return found | {"nll": nll, "perplexity": perplexity}
