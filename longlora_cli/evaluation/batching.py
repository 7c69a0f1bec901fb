"""Which questions are answered together: consecutive ones of similar length, or about one text. Needs no torch.

A token of an answer costs a pass over all weights, and a batch has one token of each row from it. Long prompts gain
little: reading them takes the time, and their keys and values the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from longlora_cli.generation.requests import Request, held_tokens, shared_tokens

T = TypeVar("T")

# Padding is run like text; of short prompts that costs less than a pass over the weights.
_MOST_PADDING = 0.25
_FREE_PADDING_TOKENS = 1024


@dataclass(frozen=True)
class Batching:
    """How many questions are answered together.

    Args:
        rows: Most of them.
        tokens: Most tokens that all rows hold (`requests.held_tokens`); None: as many as there are.
        shares: What all rows begin with is held once.
    """

    rows: int
    tokens: int | None = None
    shares: bool = True

    def is_full(self, held: Sequence[Request]) -> bool:
        """Whether nothing can join any more."""
        return len(held) >= self.rows

    def may_join(self, held: Sequence[Request], new: Request) -> bool:
        """Whether a question is answered together with those that are held."""
        if self.is_full(held):
            return False
        all_of = [*held, new]
        if self.tokens is not None and held_tokens(all_of, shares=self.shares) > self.tokens:
            return False
        read = sum(len(one.ids) for one in all_of)
        padding = len(all_of) * max(len(one.ids) for one in all_of) - read
        if padding > max(_MOST_PADDING * read, _FREE_PADDING_TOKENS):
            return False
        return len(held) < 2 or are_kin(*held[:2]) == are_kin(held[-1], new)

    def moves_last(self, held: Sequence[Request], new: Request) -> bool:
        """Whether the last of these begins a new batch with one that may not join.

        The first question about a text was taken for one of those that stand apart.
        """
        return (
            len(held) > 1
            and not are_kin(*held[:2])
            and are_kin(held[-1], new)
            and self.may_join(held[-1:], new)
        )


def are_kin(first: Request, second: Request) -> bool:
    """Whether they are about one text, which is read once when all of a batch are."""
    return shared_tokens([first.ids, second.ids]) > 0


def groups(
    items: Iterable[T],
    request_of: Callable[[T], Request | None],
    batching: Batching | None,
) -> Iterator[list[T]]:
    """Consecutive items in the order given, each with those that it is answered together with.

    Args:
        items: Read lazily: no further than to the first that is left for the next group.
        request_of: What is asked for an item; None where its answer is known, looked at when the item is reached.
        batching: None: each by itself.
    """
    group: list[T] = []
    held: list[Request] = []
    last = 0  # the place in the group of what is held last
    for item in items:
        request = request_of(item)
        if request is not None and held and not (batching and batching.may_join(held, request)):
            moves = batching is not None and batching.moves_last(held, request)
            cut = last if moves else len(group)
            yield group[:cut]
            group, held = group[cut:], held[-1:] if moves else []
            last, request = 0, request_of(item)  # perhaps answered just now
        group.append(item)
        if request is not None:
            last = len(group) - 1
            held.append(request)
        if not held or batching is None or batching.is_full(held):
            yield group
            group, held = [], []
    if group:
        yield group
