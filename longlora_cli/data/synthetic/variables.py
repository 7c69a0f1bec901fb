"""Variable tracking: names that take their value from other names, over several steps.

After the variable tracking of Hsieh et al. 2024, RULER, arXiv:2404.06654. Several chains stand interleaved, each line
after the one that it refers to; every name is set once.
"""

from __future__ import annotations

from longlora_cli.data.synthetic.draw import Fresh, group_sizes, interleaved
from longlora_cli.data.synthetic.sheet import Form, Line, Request, Sheet, Turn, spread_depths

# Four consonants are no word, and no Roman number of more than a few letters.
_LETTERS = "BFGHJKNPQRSTWZ"
_ALL = " List all of them in the order of the text, separated by commas."
FORMS: tuple[Form, ...] = (
    {
        "start": "Set {name} to {value}.",
        "copy": "Set {name} to whatever {source} is.",
        "value": "To which number is {name} set?",
        "names": "Which names are set to {value}, be it through others?" + _ALL,
    },
    {
        "start": "Let {name} be {value}.",
        "copy": "Let {name} be the same as {source}.",
        "value": "Which number is {name}?",
        "names": "Which names are {value} in the end?" + _ALL,
    },
    {
        "start": "Register {name} holds {value}.",
        "copy": "Register {name} copies register {source}.",
        "value": "Which number does register {name} hold?",
        "names": "Which registers hold {value}?" + _ALL,
    },
)


def variables(request: Request) -> Sheet:
    """See the module. About three lines and one question a chain: its last name's value, or all its names.

    A second question about a chain could be answered from the first one's answer.
    """
    rng = request.rng("structure")
    form = rng.choice(FORMS)
    owners = interleaved(rng, group_sizes(rng, request.facts, request.questions, least=2))
    depths = spread_depths(rng, request.facts)
    order = rng.sample(range(max(owners) + 1), max(owners) + 1)
    kinds = [rng.choice(("value", "names")) for _ in order]
    names_rng, fresh = request.rng("names"), Fresh(request)
    values = fresh.numbers(names_rng, len(order))
    names = [fresh.draw(lambda: "".join(names_rng.choices(_LETTERS, k=4))) for _ in owners]
    chains: list[list[int]] = [[] for _ in order]
    lines = []
    for number, owner in enumerate(owners):
        kind = "copy" if chains[owner] else "start"
        source = names[chains[owner][-1]] if chains[owner] else ""
        lines.append(Line(form[kind].format(name=names[number], value=values[owner], source=source)))
        chains[owner].append(number)
    turns = []
    for chain, kind in zip(order, kinds, strict=True):
        own = chains[chain]
        question = form[kind].format(name=names[own[-1]], value=values[chain])
        answer = values[chain] if kind == "value" else ", ".join(names[n] for n in own)
        turns.append(Turn(question, answer, tuple(own)))
    return Sheet(lines, depths, turns)
