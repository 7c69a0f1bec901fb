"""Count: lines that are said several times, and how often is asked.

Needs every part of the text, as the aggregation of Hsieh et al. 2024, RULER, arXiv:2404.06654, does; here what is
counted is a sentence that the text itself never has.
"""

from __future__ import annotations

from longlora_cli.data.synthetic.draw import Fresh, group_sizes, interleaved
from longlora_cli.data.synthetic.sheet import Form, Line, Request, Sheet, Turn, spread_depths

_NUMBER = " Say the number."
FORMS: tuple[Form, ...] = (
    {
        "line": "The {thing} came past.",
        "question": "How many times did the {thing} come past?" + _NUMBER,
    },
    {
        "line": "A bell rang for the {thing}.",
        "question": "How often did a bell ring for the {thing}?" + _NUMBER,
    },
    {
        "line": "Someone asked for the {thing}.",
        "question": "How many times did someone ask for the {thing}?" + _NUMBER,
    },
)


def count(request: Request) -> Sheet:
    """See the module. About three lines and one question a thing, one line at least."""
    rng = request.rng("structure")
    form = rng.choice(FORMS)
    sizes = group_sizes(rng, request.facts, request.questions, least=1)
    owners = interleaved(rng, sizes)
    depths = spread_depths(rng, request.facts)
    things = Fresh(request).things(request.rng("names"), len(sizes))
    lines = [Line(form["line"].format(thing=things[owner])) for owner in owners]
    turns = []
    for group, size in enumerate(sizes):
        own = tuple(number for number, owner in enumerate(owners) if owner == group)
        turns.append(Turn(form["question"].format(thing=things[group]), str(size), own))
    return Sheet(lines, depths, turns)
