"""What is asked of a model, and what several prompts have in common. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Where questions about a text are longer, the text is held for each: of a chunk's 4,096 queries over as many own tokens
# the scores of 32 heads are 0.5 GB already.
MOST_BEHIND_PREFIX = 1024


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


def held_tokens(requests: Sequence[Request], *, shares: bool) -> int:
    """Tokens whose keys and values a batch of these holds, each row as long as the longest with its answer.

    Args:
        requests: At least one.
        shares: What all begin with can be held once.
    """
    whole = max(len(one.ids) + one.max_new_tokens for one in requests)
    common = shared_tokens([one.ids for one in requests]) if shares else 0
    if max(len(one.ids) for one in requests) - common > MOST_BEHIND_PREFIX:
        common = 0
    return common + len(requests) * (whole - common)
