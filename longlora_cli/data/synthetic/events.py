"""Ordered events: lines tell on which day something happened, not in the order of the days.

Which came first or next needs all of them compared, as the tasks over several facts of RULER (Hsieh et al. 2024,
arXiv:2404.06654) and BABILong (Kuratov et al. 2024, arXiv:2406.10149) do.
"""

from __future__ import annotations

import random

from longlora_cli.data.synthetic.draw import Fresh, free_form, in_words
from longlora_cli.data.synthetic.sheet import Form, Line, Request, Sheet, Turn, spread_depths

_LAST_DAY = 999
_MOST_COMPARED = 4
FORMS: tuple[Form, ...] = (
    {
        "line": "Logbook, day {day}: the {thing} was sighted.",
        "first": "Which does the logbook say was sighted first: {any}?",
        "next": "By the days of the logbook, what was sighted next after the {thing}?",
        "order": "In which order were {all} sighted? Earliest first, separated by commas.",
    },
    {
        "line": "On day {day} of the voyage we passed the {thing}.",
        "first": "Which did we pass first on the voyage: {any}?",
        "next": "By the days of the voyage, what did we pass next after the {thing}?",
        "order": "In which order did we pass {all}? Earliest first, separated by commas.",
    },
    {
        "line": "The {thing} was sold on market day {day}.",
        "first": "Which was sold first: {any}?",
        "next": "By the market days, what was sold next after the {thing}?",
        "order": "In which order were {all} sold? Earliest first, separated by commas.",
    },
)


def ordered_events(request: Request) -> Sheet:
    """See the module. At least two lines; no two questions compare the same things."""
    rng = request.rng("structure")
    form = free_form(request, rng, FORMS)
    count = max(2, request.facts)
    days = rng.sample(range(1, _LAST_DAY + 1), count)
    depths = spread_depths(rng, count)
    asked = _questions(rng, days, request.questions)
    names = Fresh(request).things(request.rng("names"), count)
    lines = [Line(form["line"].format(day=day, thing=name)) for day, name in zip(days, names, strict=True)]
    turns = []
    for kind, about, answers in asked:
        shown = [names[n] for n in about]
        question = form[kind].format(any=in_words(shown, "or"), all=in_words(shown, "and"), thing=shown[0])
        found_in = tuple(range(count)) if kind == "next" else about
        turns.append(Turn(question, ", ".join(names[n] for n in answers), found_in))
    return Sheet(lines, depths, turns)


def _questions(
    rng: random.Random, days: list[int], questions: int
) -> list[tuple[str, tuple[int, ...], list[int]]]:
    """Kind, the events that are named, and those of the answer."""
    by_day = sorted(range(len(days)), key=days.__getitem__)
    found: dict[tuple[bool, frozenset[int]], tuple[str, tuple[int, ...], list[int]]] = {}
    about: tuple[int, ...]
    for _ in range(20 * questions):  # two events allow two questions only, however often they are drawn
        kind = rng.choice(("first", "next", "order"))
        if kind == "next":
            place = rng.randrange(len(days) - 1)
            about, answers = (by_day[place],), [by_day[place + 1]]
        else:
            about = tuple(rng.sample(range(len(days)), rng.randint(2, min(_MOST_COMPARED, len(days)))))
            answers = sorted(about, key=days.__getitem__)[: 1 if kind == "first" else None]
        if len(found) < questions:
            found.setdefault((kind == "next", frozenset(about)), (kind, about, answers))
    return list(found.values())
