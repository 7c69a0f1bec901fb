"""Multi-key: needles that all have one form, and keys that share each of their words with others.

After the multi-key retrieval of Hsieh et al. 2024, RULER, arXiv:2404.06654: the distractors differ from what is asked
by one word, so that finding a sentence that looks right is not enough.
"""

from __future__ import annotations

import math
import random

from longlora_cli.data.synthetic.draw import Fresh
from longlora_cli.data.synthetic.sheet import Form, Line, Request, Sheet, Turn, spread_depths
from longlora_cli.data.wordings import ADJECTIVES, draw_keys

FORMS: tuple[Form, ...] = (
    {
        "line": "The vault number of the {key} is {value}.",
        "question": "What is the vault number of the {key}?",
    },
    {"line": "Behind the {key} is locker {value}.", "question": "Which locker is behind the {key}?"},
    {
        "line": "Letters for the {key} go to box {value}.",
        "question": "To which box do letters for the {key} go?",
    },
)


def multi_key(request: Request) -> Sheet:
    """See the module. One line and at most one question a key."""
    rng = request.rng("structure")
    form = rng.choice(FORMS)
    depths = spread_depths(rng, request.facts)
    asked = rng.sample(range(request.facts), request.questions)
    names = request.rng("names")
    keys = _alike(names, request.facts, request.context)
    values = Fresh(request).numbers(names, request.facts)
    lines = [Line(form["line"].format(key=k, value=v)) for k, v in zip(keys, values, strict=True)]
    turns = [Turn(form["question"].format(key=keys[n]), values[n], (n,)) for n in asked]
    return Sheet(lines, depths, turns)


def _alike(rng: random.Random, count: int, context: str) -> list[str]:
    """Pairs from a square of adjectives and nouns, without those that the text holds; it grows until they suffice."""
    side = math.ceil(math.sqrt(count))
    nouns = [key.split()[1] for key in draw_keys(rng, 60, "train")]
    adjectives = rng.sample(ADJECTIVES, len(ADJECTIVES))
    while True:
        square = [f"{adjective} {noun}" for adjective in adjectives[:side] for noun in nouns[:side]]
        free = [key for key in square if key not in context]
        if len(free) >= count or side >= len(ADJECTIVES):
            return rng.sample(free, count)
        side += 1
