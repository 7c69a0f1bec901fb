"""Register: pages of entries that all look alike, spread over the text, and one entry is asked for by its key.

After the haystacks of needles of Hsieh et al. 2024, RULER, arXiv:2404.06654, where every line but one distracts: a
page has six entries, so that as many lines as other tasks hide hold six times as many facts.
"""

from __future__ import annotations

from longlora_cli.data.synthetic.draw import Fresh
from longlora_cli.data.synthetic.sheet import Form, Line, Request, Sheet, Turn, spread_depths

_ENTRIES = 6
FORMS: tuple[Form, ...] = (
    {
        "head": "Register, page {page}.",
        "entry": "{key} = {value}",
        "question": "Which number stands for the {key} in the register?",
    },
    {
        "head": "Telephone book, sheet {page}.",
        "entry": "{key}, call {value}",
        "question": "Which number does the telephone book give for the {key}?",
    },
    {
        "head": "Price list, part {page}.",
        "entry": "{key} at {value}",
        "question": "At how much does the price list put the {key}?",
    },
)


def register(request: Request) -> Sheet:
    """See the module. One line and at most one question a page; no key or number comes twice."""
    rng = request.rng("structure")
    form = rng.choice(FORMS)
    depths = spread_depths(rng, request.facts)
    pages = rng.sample(range(request.facts), request.questions)
    asked = [(page, rng.randrange(_ENTRIES)) for page in pages]
    names, fresh = request.rng("names"), Fresh(request)
    keys = [fresh.things(names, _ENTRIES) for _ in depths]
    values = [fresh.numbers(names, _ENTRIES) for _ in depths]
    lines = []
    for page, (own, numbers) in enumerate(zip(keys, values, strict=True), start=1):
        entries = [form["entry"].format(key=k, value=v) for k, v in zip(own, numbers, strict=True)]
        lines.append(Line(f"{form['head'].format(page=page)} {'; '.join(entries)}.", is_paragraph=True))
    turns = [Turn(form["question"].format(key=keys[p][n]), values[p][n], (p,)) for p, n in asked]
    return Sheet(lines, depths, turns)
