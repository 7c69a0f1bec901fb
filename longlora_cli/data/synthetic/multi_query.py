"""Multi-query: one question asks for the values of several keys at once.

After the multi-query retrieval of Hsieh et al. 2024, RULER, arXiv:2404.06654. The answer has the question's order.
"""

from __future__ import annotations

from longlora_cli.data.synthetic.draw import Fresh, in_words
from longlora_cli.data.synthetic.sheet import Form, Line, Request, Sheet, Turn, spread_depths

_ORDER = " Give the numbers in this order, separated by commas."
_MOST_KEYS = 4
FORMS: tuple[Form, ...] = (
    {"line": "The {key} weighs {value} grams.", "question": "How many grams do {keys} weigh?" + _ORDER},
    {"line": "Shelf {value} holds the {key}.", "question": "Which shelves hold {keys}?" + _ORDER},
    {"line": "Form {value} belongs to the {key}.", "question": "Which forms belong to {keys}?" + _ORDER},
)


def multi_query(request: Request) -> Sheet:
    """See the module. One line a key, two to four keys a question, no two questions about the same keys."""
    rng = request.rng("structure")
    form = rng.choice(FORMS)
    depths = spread_depths(rng, request.facts)
    most = min(_MOST_KEYS, request.facts)
    asked: dict[frozenset[int], list[int]] = {}
    for _ in range(20 * request.questions):  # two keys allow one question only, however often it is drawn
        if len(asked) < request.questions:
            picked = rng.sample(range(request.facts), rng.randint(min(2, most), most))
            asked.setdefault(frozenset(picked), picked)
    names, fresh = request.rng("names"), Fresh(request)
    keys = fresh.things(names, request.facts)
    values = fresh.numbers(names, request.facts)
    lines = [Line(form["line"].format(key=k, value=v)) for k, v in zip(keys, values, strict=True)]
    turns = []
    for picked in asked.values():
        question = form["question"].format(keys=in_words([keys[n] for n in picked], "and"))
        turns.append(Turn(question, ", ".join(values[n] for n in picked), tuple(picked)))
    return Sheet(lines, depths, turns)
