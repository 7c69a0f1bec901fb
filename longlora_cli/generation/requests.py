"""What is asked of a model, and what several prompts have in common. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """A prompt to be answered.

    Args:
        ids: Its tokens, at least one.
        max_new_tokens: Longest answer, at least 1.
        stop: Strings that end it.
    """

    ids: Sequence[int]
    max_new_tokens: int
    stop: Sequence[str] = ()


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    common = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        common += 1
    return common


def shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """What of these prompts is read once: their common beginning where it is at least half of each, else nothing.

    The last token of each is left to be read, for its logits.
    """
    if len(prompts) < 2:
        return 0
    common = min(common_prefix(prompts[0], prompt) for prompt in prompts[1:])
    return min(common, min(map(len, prompts)) - 1) if 2 * common >= max(map(len, prompts)) else 0
