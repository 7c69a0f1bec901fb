"""Common words: lists of words in many places, and which words of one list come most often is asked.

Needs all parts of a list and numbers of each of its words, as the common and the frequent words of Hsieh et al. 2024,
RULER, arXiv:2404.06654, do. Here a list stands in pieces in real text, several lists beside each other.
"""

from __future__ import annotations

import random

from longlora_cli.data.synthetic.draw import Fresh, group_sizes, interleaved
from longlora_cli.data.synthetic.sheet import Form, Line, Request, Sheet, Turn, spread_depths
from longlora_cli.data.wordings import training_nouns

# Four consonants are no word.
_LETTERS = "bfghjknpqrstwz"
# Times in a list of one line for the three words that can be asked for; any other word comes at most once a line.
_OFTEN = (4, 3, 2)
_REST = 3
_NUMBERS = ("", "two", "three")
_ORDER = " Begin with the one of the most, and put commas between."
FORMS: tuple[Form, ...] = (
    {
        "line": "Heard at the {thing}: {words}.",
        "one": "Which word is heard oftenest at the {thing}?",
        "some": "Which {number} words are heard oftenest at the {thing}?" + _ORDER,
    },
    {
        "line": "The drum of the {thing} beats {words}.",
        "one": "Which signal does the drum of the {thing} beat above all?",
        "some": "Which {number} signals does the drum of the {thing} beat above all?" + _ORDER,
    },
    {
        "line": "Sold by the {thing} today: {words}.",
        "one": "What did the {thing} sell more of than anything else?",
        "some": "Which {number} goods did the {thing} sell more of than anything else?" + _ORDER,
    },
)
_CODED = 1  # the form whose words are no words


def common_words(request: Request) -> Sheet:
    """See the module. About three lines and one question a list, one line at least; twelve words a line."""
    rng = request.rng("structure")
    number = rng.randrange(len(FORMS))
    form = FORMS[number]
    sizes = group_sizes(rng, request.facts, request.questions, least=1)
    owners = interleaved(rng, sizes)
    depths = spread_depths(rng, request.facts)
    names = request.rng("names")
    things = Fresh(request).things(names, len(sizes))
    lists = [_List.draw(names, size, is_coded=number == _CODED) for size in sizes]
    parts = [iter(words.lines) for words in lists]
    lines = [
        Line(form["line"].format(thing=things[owner], words=next(parts[owner])), is_paragraph=True)
        for owner in owners
    ]
    turns = []
    for group, words in enumerate(lists):
        own = tuple(place for place, owner in enumerate(owners) if owner == group)
        asked = rng.randint(1, len(_OFTEN))
        kind = "one" if asked == 1 else "some"
        question = form[kind].format(thing=things[group], number=_NUMBERS[asked - 1])
        turns.append(Turn(question, ", ".join(words.commonest[:asked]), own))
    return Sheet(lines, depths, turns)


class _List:
    """Words cut into lines, and its three commonest ones, the commonest first."""

    def __init__(self, lines: list[str], commonest: list[str]) -> None:
        self.lines = lines
        self.commonest = commonest

    @staticmethod
    def draw(rng: random.Random, size: int, *, is_coded: bool) -> _List:
        """A list of `size` lines. No two of its commonest words come equally often."""
        others = rng.randint(_REST, _REST * size)
        if is_coded:
            codes: dict[str, None] = {}
            while len(codes) < len(_OFTEN) + others:
                codes["".join(rng.choices(_LETTERS, k=4))] = None
            words = list(codes)
        else:
            others = min(others, len(training_nouns()) - len(_OFTEN))
            words = rng.sample(training_nouns(), len(_OFTEN) + others)
        commonest, rest = words[: len(_OFTEN)], words[len(_OFTEN) :]
        said = [word for word, times in zip(commonest, _OFTEN, strict=True) for _ in range(times * size)]
        # Round after round of the others, so that none comes more than once a line in the mean.
        said += [rest[place % len(rest)] for place in range(_REST * size)]
        rng.shuffle(said)
        each = len(said) // size
        joint = " " if is_coded else ", "
        return _List([joint.join(said[n * each : (n + 1) * each]) for n in range(size)], commonest)
