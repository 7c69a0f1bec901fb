"""Multi-value: several lines give a key a value each, and all of its values are asked for.

After the multi-value retrieval of Hsieh et al. 2024, RULER, arXiv:2404.06654. The answer has the text's order, so that
only one is right.
"""

from __future__ import annotations

from longlora_cli.data.synthetic.draw import Fresh, group_sizes, interleaved
from longlora_cli.data.synthetic.sheet import Form, Line, Request, Sheet, Turn, spread_depths

_ALL = " List all of them in the order of the text, separated by commas."
FORMS: tuple[Form, ...] = (
    {
        "line": "One of the stamps on the {key} reads {value}.",
        "question": "Which numbers do the stamps on the {key} read?" + _ALL,
    },
    {
        "line": "The {key} was seen at milestone {value}.",
        "question": "At which milestones was the {key} seen?" + _ALL,
    },
    {"line": "Invoice {value} is for the {key}.", "question": "Which invoices are for the {key}?" + _ALL},
)


def multi_value(request: Request) -> Sheet:
    """See the module. About three lines and one question a key."""
    rng = request.rng("structure")
    form = rng.choice(FORMS)
    owners = interleaved(rng, group_sizes(rng, request.facts, request.questions, least=2))
    depths = spread_depths(rng, request.facts)
    names, fresh = request.rng("names"), Fresh(request)
    keys = fresh.things(names, max(owners) + 1)
    values = fresh.numbers(names, request.facts)
    lines = [Line(form["line"].format(key=keys[o], value=v)) for o, v in zip(owners, values, strict=True)]
    turns = []
    for group, key in enumerate(keys):
        own = tuple(number for number, owner in enumerate(owners) if owner == group)
        turns.append(Turn(form["question"].format(key=key), ", ".join(values[n] for n in own), own))
    return Sheet(lines, depths, turns)
