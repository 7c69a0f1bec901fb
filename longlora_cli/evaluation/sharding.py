"""One evaluation by several processes: each answers its share of the texts, and the last reads what all have kept.

Nothing is exchanged but the journals' files. A share is decided by a text's place in its task, which is the same in
every process; questions about one text stay together, because a model reads it once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """A share of an evaluation.

    Args:
        number: From 1.
        count: How many shares there are.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `2/4`, as `values.parse_share` has checked it."""
        number, count = text.split("/")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def name(self) -> str:
        """As part of a file's name: `2-of-4`."""
        return f"{self.number}-of-{self.count}"

    def of(self, items: Iterable[T], text_of: Callable[[T], object] = lambda _: None) -> Iterator[T]:
        """The items of this share, in their order.

        Args:
            items: All of a task.
            text_of: What consecutive items about the same text have in common; None: it shares its text with no other.
        """
        place, last = -1, None
        for item in items:
            text = text_of(item)
            if text is None or text != last:
                place, last = place + 1, text
            if place % self.count == self.number - 1:
                yield item


def text_of(facts: Mapping[str, Any]) -> object:
    """What the facts of a question say of its text: a sample of a length, or the line of a file (see `Shard.of`)."""
    if "document" in facts:
        return facts["document"]
    return (facts.get("length"), facts["sample"]) if "sample" in facts else None
