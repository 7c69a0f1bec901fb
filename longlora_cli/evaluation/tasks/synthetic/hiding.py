"""Lines hidden between the sentences of a haystack."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.request import Request, fit, is_full, unit_costs

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
"""RULER's noise (NVIDIA, Apache-2.0), sentence by sentence."""

# A sentence by itself may have a token more than in its text: where tokenizers put a space before each text that is a
# fifth of a short sentence.
_SPARE = 1.25


@dataclass(frozen=True)
class Piece:
    """A sentence of the haystack.

    Args:
        text: Without blanks around it.
        joint: What stands between it and the next.
        tokens: By itself, after a space.
        is_open: A line may stand after it.
    """

    text: str
    joint: str
    tokens: int
    is_open: bool = True


@dataclass(frozen=True)
class Pool:
    """Consecutive sentences, somewhat more than a sample can hold, and their text."""

    pieces: list[Piece]
    text: str


@dataclass(frozen=True)
class Hidden:
    """A line to hide.

    Args:
        text: The line.
        depth: The share of the haystack's tokens that shall stand before it.
        joint: What stands around it: a space, or a line break on both sides.
    """

    text: str
    depth: float
    joint: str = " "


Finish = Callable[[str, list[float]], Sample]
"""The sample for a context and the depth that each line came to stand at."""


def take(request: Request) -> Pool:
    """Sentences from a random one of a random text on, chosen by the seed: no block is ever repeated."""
    stream = request.haystack.sentences(request.rng("window"))
    pieces: list[Piece] = []
    tokens = 0
    while tokens < request.length * _SPARE:
        batch = list(islice(stream, 8 + max(0, request.length - tokens) // 24))
        counts = request.haystack.token_counts(request.tokenizer, batch)
        pieces += [
            Piece(sentence.text, sentence.joint, count, not sentence.is_title)
            for sentence, count in zip(batch, counts, strict=True)
        ]
        tokens += sum(counts)
    return Pool(pieces, " ".join(piece.text for piece in pieces))


def noise(request: Request, joint: str) -> Pool:
    """RULER's noise, as often as could fit; lines stand between whole blocks, which `joint` parts."""
    counts = unit_costs(request, [" " + text for text in NOISE])
    block = [
        Piece(text, joint if text == NOISE[-1] else " ", count, text == NOISE[-1])
        for text, count in zip(NOISE, counts, strict=True)
    ]
    return Pool(block * (int(request.length * _SPARE) // sum(counts) + 2), " ".join(NOISE))


def hide(request: Request, pool: Pool, lines: Sequence[Hidden], finish: Finish) -> Sample:
    """The sample whose context has the lines at their depths and as many of the sentences as fit.

    Where whole sentences leave more than 1.5 % free, the last one is cut at a word and ends in `...`.

    Raises:
        SettingsError: The length does not hold the lines and the question.
    """

    def compose(pieces: Sequence[Piece]) -> Sample:
        return finish(*weave(pieces, lines))

    costs = [piece.tokens for piece in pool.pieces]
    whole, sample = fit(request, costs, lambda count: compose(pool.pieces[:count]))
    if is_full(request, sample) or whole == len(pool.pieces):
        return sample
    cut = pool.pieces[whole]
    words = cut.text.split(" ") if " " in cut.text else list(cut.text)
    space = " " if " " in cut.text else ""

    def compose_cut(count: int) -> Sample:
        if count == 0:
            return compose(pool.pieces[:whole])
        text = space.join(words[:count]) + "..."
        share = max(1, round(cut.tokens * count / len(words)))
        return compose([*pool.pieces[:whole], Piece(text, " ", share, cut.is_open or True)])

    return fit(request, [max(1, cut.tokens // len(words))] * (len(words) - 1), compose_cut)[1]


def weave(pieces: Sequence[Piece], lines: Sequence[Hidden]) -> tuple[str, list[float]]:
    """The text of the pieces with each line at the gap nearest to its depth, and the depths that these gaps have.

    Lines of one gap keep their order.
    """
    ends = list(accumulate((piece.tokens for piece in pieces), initial=0))
    gaps = [0, *(number for number, piece in enumerate(pieces, start=1) if piece.is_open)]
    places = [ends[gap] for gap in gaps]
    chosen = [gaps[_nearest(places, line.depth * ends[-1])] for line in lines]
    at_gap: dict[int, list[Hidden]] = {}
    for gap, line in zip(chosen, lines, strict=True):
        at_gap.setdefault(gap, []).append(line)
    parts: list[str] = []
    for gap in range(len(pieces) + 1):
        for line in at_gap.get(gap, ()):
            if line.joint != " " and parts and "\n" not in parts[-1]:
                parts[-1] = line.joint
            parts += [line.text, line.joint]
        if gap < len(pieces):
            parts += [pieces[gap].text, pieces[gap].joint]
    return "".join(parts).rstrip(), [ends[gap] / max(ends[-1], 1) for gap in chosen]


def _nearest(places: Sequence[int], place: float) -> int:
    after = min(bisect_left(places, place), len(places) - 1)
    before = max(after - 1, 0)
    return before if place - places[before] < places[after] - place else after
