"""One evaluation by several processes: each answers its share of the texts, and whoever comes last reads what all kept.

Nothing is exchanged but the journals' files. A share is decided by a text's place in the plan, which is the same in
every process; questions about one text stay together, because a model reads it once for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.generation import Question

_WRITTEN = re.compile(r"([1-9]\d{0,5})/([1-9]\d{0,5})")


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
        """Read `2/4`.

        Raises:
            SettingsError: It is not two numbers, or the first is above the second.
        """
        match = _WRITTEN.fullmatch(text.strip())
        if match is None or int(match[1]) > int(match[2]):
            raise SettingsError(
                f"--shard {text}: not a shard", rule="2/4 is the second of four; numbers begin at 1."
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def takes(self, place: int) -> bool:
        """True when the text at this place of the plan, counted from 0, belongs to this share."""
        return place % self.count == self.number - 1

    def of_texts(self, questions: Iterable[Question]) -> Iterator[Question]:
        """The questions whose text belongs to this share, in their order."""
        place, last = -1, None
        for question in questions:
            text = text_of(question)
            if text is None or text != last:
                place, last = place + 1, text
            if self.takes(place):
                yield question


def text_of(question: Question) -> tuple[object, ...] | None:
    """What questions about the same text have in common; None for a question that shares its text with no other."""
    facts = question.facts
    if "sample" in facts:
        return question.task, facts.get("length"), facts["sample"]
    if "row" in facts:  # `file:12.3` is the third question of line 12
        return question.task, re.sub(r"\.\d+$", "", str(facts["row"]))
    return None
