"""Topics: the text turns from topic to topic, and one is asked for by its place.

After the topic retrieval of LongChat (Li et al. 2023, https://lmsys.org/blog/2023-06-29-longchat), which asks for the
first topic of a long conversation; here any may be asked for, also by the one before it.
"""

from __future__ import annotations

from longlora_cli.data.synthetic.draw import Fresh, free_form
from longlora_cli.data.synthetic.sheet import Form, Line, Request, Sheet, Turn, spread_depths

_ASPECTS = (
    "the beginnings of",
    "the care of",
    "the charm of",
    "the cost of",
    "the craft of",
    "the dangers of",
    "the fashion of",
    "the future of",
    "the laws of",
    "the origin of",
    "the trade in",
    "the worth of",
)
_SUBJECTS = (
    "balloons",
    "basket weaving",
    "beekeeping",
    "bicycles",
    "bookbinding",
    "canals",
    "candied fruit",
    "caves",
    "chess",
    "clockwork",
    "comets",
    "cork oaks",
    "dovecotes",
    "fencing",
    "ferries",
    "fireworks",
    "folk songs",
    "fountains",
    "glass beads",
    "herb gardens",
    "ice skating",
    "juggling",
    "kites",
    "lace",
    "lighthouses",
    "magnets",
    "marmalade",
    "mosaics",
    "mushrooms",
    "paper dolls",
    "postage stamps",
    "puppets",
    "railways",
    "saffron",
    "sheepdogs",
    "sundials",
    "telescopes",
    "tide mills",
    "umbrellas",
    "volcanoes",
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
FORMS: tuple[Form, ...] = (
    {
        "line": "Next topic: {topic}.",
        "place": "Which topic is announced as the {ordinal}?",
        "after": "Which topic is announced right after {topic}?",
    },
    {
        "line": "Let us now turn to {topic}.",
        "place": "What do we turn to {ordinal} in this text?",
        "after": "What do we turn to right after {topic}?",
    },
    {
        "line": "Here begins the talk about {topic}.",
        "place": "What is the {ordinal} talk about?",
        "after": "What is the talk about that follows the one about {topic}?",
    },
)


def topic(request: Request) -> Sheet:
    """See the module. One line and at most one question a topic."""
    rng = request.rng("structure")
    form = free_form(request, rng, FORMS)
    depths = spread_depths(rng, request.facts)
    asked = rng.sample(range(request.facts), request.questions)
    kinds = [rng.choice(("place", "after")) if number else "place" for number in asked]
    names, fresh = request.rng("names"), Fresh(request)
    topics = [fresh.draw(lambda: f"{names.choice(_ASPECTS)} {names.choice(_SUBJECTS)}") for _ in depths]
    lines = [Line(form["line"].format(topic=topic), is_paragraph=True) for topic in topics]
    turns = []
    for number, kind in zip(asked, kinds, strict=True):
        question = form[kind].format(ordinal=ordinal(number + 1), topic=topics[number - 1])
        found_in = (number - 1, number) if kind == "after" else (number,)
        turns.append(Turn(question, topics[number], found_in))
    return Sheet(lines, depths, turns)


def ordinal(number: int) -> str:
    """`first` to `tenth`, then `11th`, `21st`."""
    if number <= len(_ORDINALS):
        return _ORDINALS[number - 1]
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
