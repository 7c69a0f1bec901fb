"""Key-value: pairs of random identifiers, one of them asked for by its key.

After the key-value retrieval of Liu et al. 2023, Lost in the Middle, arXiv:2307.03172, whose keys and values are UUIDs
in JSON too: nothing but exact matching finds them, and each is some forty tokens to copy.
"""

from __future__ import annotations

import random
import uuid

from longlora_cli.data.synthetic.draw import Fresh
from longlora_cli.data.synthetic.sheet import Form, Line, Request, Sheet, Turn, spread_depths

FORMS: tuple[Form, ...] = (
    {
        "line": '{{"{key}": "{value}"}}',
        "question": 'What is stored under the key "{key}"?',
    },
    {
        "line": '{{"key": "{key}", "value": "{value}"}}',
        "question": 'Which "value" has the "key": "{key}"?',
    },
    {"line": "{key} -> {value}", "question": "Where does {key} point to?"},
)


def key_value(request: Request) -> Sheet:
    """See the module. One line and at most one question a pair."""
    rng = request.rng("structure")
    form = rng.choice(FORMS)
    depths = spread_depths(rng, request.facts)
    asked = rng.sample(range(request.facts), request.questions)
    names, fresh = request.rng("names"), Fresh(request)
    pairs = [(_identifier(names, fresh), _identifier(names, fresh)) for _ in depths]
    lines = [Line(form["line"].format(key=k, value=v), is_paragraph=True) for k, v in pairs]
    turns = [Turn(form["question"].format(key=pairs[n][0]), pairs[n][1], (n,)) for n in asked]
    return Sheet(lines, depths, turns)


def _identifier(rng: random.Random, fresh: Fresh) -> str:
    return fresh.draw(lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)))
