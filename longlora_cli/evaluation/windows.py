"""Which tokens are read and scored in which window: pure integers, no model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from longlora_cli.generation.past import PLAIN, Past


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


def plan_windows(tokens: int, window: int, stride: int, *, first: int = 1) -> list[Window]:
    """Windows that score each token of a text, or each but the first, exactly once.

    A window begins every `stride` tokens; the last one ends with the text and may be shorter. A token is
    scored in the first window that reaches it, so it has at least `window - stride` tokens of context once
    the text is that long.

    Args:
        tokens: Length of the text.
        window: Most tokens of the text that are read at once.
        stride: Tokens between the beginnings of two windows, at most `window`.
        first: The first token that is scored: 1, since nothing predicts the first one; 0 when BOS stands before
            each window, outside of `window`, and predicts it.

    Raises:
        ValueError: `stride` is not within 1 and `window`, or a window holds nothing to score.

    Source: the strided evaluation of the transformers documentation (perplexity.md), with the labels counted
        exactly; BOS before each window as in transformers pull request 40524.
    """
    if first not in (0, 1) or window < first + 1 or not 1 <= stride <= window:
        raise ValueError(f"window {window}, stride {stride}, first {first}")
    windows: list[Window] = []
    done = first
    # With stride == window the first token of each window would have no context: windows then overlap by one
    # token, unless BOS is its context.
    step = min(stride, window - 1) if first else stride
    start = 0
    while done < tokens:
        stop = min(start + window, tokens)
        windows.append(Window(start, stop, done))
        done, start = stop, start + step
    return windows


def curve_windows(windows: list[Window], window: int, *, first: int = 1) -> list[Window]:
    """Full windows of which no two score the same token: the ones that the curve by position is made of.

    In each of them all tokens are scored, so that every bucket of positions is an average over the same
    windows. `first` is that of `plan_windows`.
    """
    chosen: list[Window] = []
    for candidate in windows:
        # With first == 1 two of them may share a token: the last one scored before is only context here.
        if candidate.tokens == window and (not chosen or candidate.start + first >= chosen[-1].stop):
            chosen.append(candidate)
    return chosen


def blocks(windows: list[Window], most_tokens: int) -> Iterator[list[Window]]:
    """Runs of consecutive windows that read at least one window and, if they can, at most `most_tokens`."""
    block: list[Window] = []
    read = 0
    for one in windows:
        if block and read + one.tokens > most_tokens:
            yield block
            block, read = [], 0
        block.append(one)
        read += one.tokens
    if block:
        yield block


def position_buckets(window: int) -> list[tuple[int, int]]:
    """Buckets `[from, to)` of context tokens: 0-128, 128-256, 256-512, ... up to the window."""
    edges = [0]
    edge = 128
    while edge < window:
        edges.append(edge)
        edge *= 2
    return list(pairwise([*edges, window]))


@dataclass(frozen=True)
class Reading:
    """How texts are read; all lengths in tokens.

    Args:
        window: Most tokens of one window, BOS included.
        stride: Tokens between the beginnings of two windows.
        bos: Put in front of each window; None: nothing is.
        short: Score the tokens of the curve a second time with at most `short - 1` tokens of context, and at
            least about half of that; None: do not.
        whole: No text fills a window, so that texts as a whole take the place of the curve's windows.
        chunk: Most tokens in one forward. It changes nothing but rounding.
        past: How what was read is kept.
    """

    window: int
    stride: int
    bos: int | None = None
    short: int | None = None
    whole: bool = False
    chunk: int = 4096
    past: Past = PLAIN

    @property
    def text_tokens(self) -> int:
        """Tokens of the text in a full window."""
        return self.window - (self.bos is not None)

    @property
    def short_stride(self) -> int | None:
        """Tokens between two windows of the short context: half of it."""
        return None if self.short is None else max(1, self.short // 2)

    @property
    def first(self) -> int:
        """The first token of a text that is scored: 0 when BOS predicts it, else 1."""
        return int(self.bos is None)

    def windows(self, tokens: int) -> list[Window]:
        """The windows of a text of `tokens`."""
        return plan_windows(tokens, self.text_tokens, min(self.stride, self.text_tokens), first=self.first)

    def curve(self, windows: list[Window]) -> list[Window]:
        """Those of a text's windows that the curve by position is made of."""
        return windows if self.whole else curve_windows(windows, self.text_tokens, first=self.first)

    def short_windows(self, one: Window) -> list[Window]:
        """Windows of the short context inside a window of the curve, but for the first.

        The first one reads what the long window reads there, so its losses are known.
        """
        if self.short is None or self.short_stride is None:
            return []
        size = self.short - (self.bos is not None)
        found = plan_windows(one.tokens, size, min(self.short_stride, size), first=self.first)
        return [Window(one.start + w.start, one.start + w.stop, one.start + w.first) for w in found[1:]]
