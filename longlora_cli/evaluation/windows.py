"""Which tokens are scored in which window: pure integers, no model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` of a text are read; those from `first` on are scored, only here."""

    start: int
    stop: int
    first: int

    @property
    def tokens(self) -> int:
        """How many tokens it reads."""
        return self.stop - self.start


def plan_windows(tokens: int, window: int, stride: int) -> list[Window]:
    """Windows that score each token but the first exactly once.

    A window begins every `stride` tokens; the last one ends with the text and may be shorter. A token is
    scored in the first window that reaches it, so it has at least `window - stride` tokens of context once
    the text is that long.

    Args:
        tokens: Length of the text.
        window: Most tokens read at once.
        stride: Tokens between the beginnings of two windows, at most `window`.

    Raises:
        ValueError: `stride` is not within 1 and `window`, or `window` is below 2.

    Source: the strided evaluation of the transformers documentation (perplexity.md), with the labels counted
        exactly.
    """
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"window {window}, stride {stride}")
    windows: list[Window] = []
    done = 1  # nothing precedes the first token, so nothing predicts it
    # With stride == window the first token of each window would have no context: windows then overlap by one
    # token.
    step = min(stride, window - 1)
    start = 0
    while done < tokens:
        stop = min(start + window, tokens)
        windows.append(Window(start, stop, done))
        done, start = stop, start + step
    return windows


def curve_windows(windows: list[Window], window: int) -> list[Window]:
    """Full windows of which no two score the same token: the ones that the curve by position is made of.

    In each of them all tokens are scored, so that every bucket of positions is an average over the same
    windows.
    """
    chosen: list[Window] = []
    for candidate in windows:
        # One shared token is allowed: the last one scored before is only context here.
        if candidate.tokens == window and (not chosen or candidate.start >= chosen[-1].stop - 1):
            chosen.append(candidate)
    return chosen


def position_buckets(window: int) -> list[tuple[int, int]]:
    """Buckets `[from, to)` of context tokens: 0-128, 128-256, 256-512, ... up to the window."""
    edges = [0]
    edge = 128
    while edge < window:
        edges.append(edge)
        edge *= 2
    return list(pairwise([*edges, window]))
