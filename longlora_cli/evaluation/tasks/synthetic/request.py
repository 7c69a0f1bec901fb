"""What a synthetic task is asked for, and the sample of a length: as long as fits, found on cached counts."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from longlora_cli.data.counting import token_counter
from longlora_cli.data.haystack import Haystack
from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.tasks.prompts import prompt_tokens
from longlora_cli.evaluation.tasks.sample import Sample

# RULER's depths: 40 evenly spaced shares of the text, one of them drawn at random.
_DEPTHS = 40
# A sample that uses this share of its length is long enough; what is left is counted exactly, not estimated.
_FULL = 0.985
_TRIES = 12


@dataclass(frozen=True)
class Request:
    """One sample to make; it is a function of these values alone, of no other sample and no process.

    Args:
        task: Name of the task.
        tokenizer: Of the model to be asked; its template and counts decide how much text fits.
        haystack: Texts to hide things in.
        length: Most tokens of prompt and answer.
        sample: Number of the sample.
        seed: Of all samples.
        depth: Where the answer shall stand, the share of the context before it; None: drawn at random.
    """

    task: str
    tokenizer: Any
    haystack: Haystack
    length: int
    sample: int
    seed: int
    depth: float | None = None

    def rng(self, part: str) -> random.Random:
        """Random numbers for a part of the sample: how many another part draws does not change them."""
        return random.Random(f"{self.task}:{self.seed}:{self.length}:{self.sample}:{part}")

    def some_depth(self) -> float:
        """The depth asked for, else one of RULER's forty."""
        return self.depth if self.depth is not None else self.rng("depth").randrange(_DEPTHS) / (_DEPTHS - 1)

    def some_depths(self, count: int) -> list[float]:
        """`count` different depths of RULER's forty, in random order; the first is the one asked for, if one is."""
        found = [number / (_DEPTHS - 1) for number in self.rng("depths").sample(range(_DEPTHS), count)]
        return found if self.depth is None else [self.depth, *found[1:]]

    def answer_tokens(self, most: int) -> int:
        """Tokens kept for a long answer: `most`, and at most a quarter of the length."""
        return min(most, self.length // 4)

    def room_for(self, answer: str, usual: int) -> int:
        """The usual number of tokens for an answer, and more where the tokenizer needs more to say it."""
        return max(usual, token_counter(self.tokenizer).count(" " + answer))

    def make(self, **fields: Any) -> Sample:
        """A sample of this request; `facts` get its length and number."""
        facts = {"length": self.length, "sample": self.sample, **fields.pop("facts", {})}
        if self.depth is not None and "actual_depth" in facts:
            facts["depth"] = self.depth
        return Sample(task=self.task, id=f"{self.length}-{self.sample}", facts=facts, **fields)


Compose = Callable[[int], Sample]


def unit_costs(request: Request, units: Sequence[str]) -> list[int]:
    """Tokens of each unit by itself."""
    return token_counter(request.tokenizer).count_each(list(units))


def fit(request: Request, costs: Sequence[int], compose: Compose, *, least: int = 0) -> tuple[int, Sample]:
    """The sample with the most units that fits the length together with its answer.

    The number of units is searched by their cached costs and corrected by exact counts of the whole prompt, template
    included; seldom more than three of them are needed.

    Args:
        request: Says the length.
        costs: About how many tokens each further unit takes.
        compose: The sample with so many units; it must grow with them.
        least: Fewest units.

    Returns:
        How many units it has, and the sample with its `tokens` among its facts.

    Raises:
        SettingsError: Even the fewest units do not fit.
    """
    ends = list(accumulate(costs, initial=0))
    low, best = least, compose(least)
    spare = _spare(request, best)
    if spare < 0:
        raise too_short(request, request.length - spare)
    over, scale = len(ends), 1.0
    for _ in range(_TRIES):
        if low == over - 1 or spare <= request.length * (1 - _FULL):
            break
        guess = bisect_right(ends, ends[low] + spare / scale) - 1
        guess = min(max(guess, low + 1), over - 1)
        sample = compose(guess)
        left = _spare(request, sample)
        if spare - left > 0:
            scale = (spare - left) / max(ends[guess] - ends[low], 1)
        if left < 0:
            over = guess
        else:
            low, best, spare = guess, sample, left
    used = request.length - spare - best.max_new_tokens
    return low, replace(best, facts={**best.facts, "tokens": used})


def is_full(request: Request, sample: Sample) -> bool:
    """Whether a fitted sample uses nearly all of its length."""
    return bool(sample.facts["tokens"] + sample.max_new_tokens >= request.length * _FULL)


def too_short(request: Request, needed: int) -> SettingsError:
    """What to raise when a length does not hold a sample."""
    return SettingsError(
        f"--lengths {request.length} is too short for {request.task}: a sample needs about {needed} tokens",
        rule="Question, what it asks about and room for the answer are never cut.",
        hint="Use longer --lengths.",
    )


def _spare(request: Request, sample: Sample) -> int:
    return request.length - sample.max_new_tokens - prompt_tokens(request.tokenizer, sample)
