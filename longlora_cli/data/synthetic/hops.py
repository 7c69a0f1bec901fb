"""Multi-hop facts: people walk about and carry things; where a thing is follows from several lines.

After Kuratov et al. 2024, BABILong, arXiv:2406.10149, which hides the chains of bAbI in books. The world here is drawn
and simulated anew for each chat; people, things and places have names of two words that the text does not hold.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from longlora_cli.data.synthetic.draw import Fresh
from longlora_cli.data.synthetic.sheet import Form, Line, Request, Sheet, Turn, spread_depths
from longlora_cli.data.wordings import ADJECTIVES, words

_FIRST_NAMES = words("Ada Bruno Carla Dario Edda Fabio Greta Hugo Irma Jonas Kira Lars Mona Nils Olga")
_LAST_NAMES = words("Abel Brandt Corvin Dahl Ekman Falk Grieg Holm Ibsen Jensen Krog Lund Moen Nord")
# None is a place of bAbI, whose labels evaluation asks for.
_ROOMS = words("attic barn cellar gallery hall library pantry porch scullery stable study workshop")
# What one can carry; the other tasks' things may be glaciers.
_THINGS = words(
    "basket bell candle compass drum feather fiddle hammer kettle lantern mirror needle ribbon spade"
)
_PLACES = 5
FORMS: tuple[Form, ...] = (
    {
        "move": "{who} stepped into the {place}.",
        "take": "{who} lifted the {thing} and kept hold of it.",
        "drop": "{who} set the {thing} down.",
        "last": "Where is the {thing} at the end?",
        "before": "Where was the {thing} just before it was in the {place}?",
    },
    {
        "move": "{who} moved over to the {place}.",
        "take": "From now on {who} carries the {thing}.",
        "drop": "{who} no longer carries the {thing}.",
        "last": "In which place is the {thing} now?",
        "before": "From which place did the {thing} come to the {place}?",
    },
    {
        "move": "{who} turned up in the {place}.",
        "take": "{who} pocketed the {thing}.",
        "drop": "{who} parted with the {thing} and let it lie there.",
        "last": "Where did the {thing} end up?",
        "before": "Where was the {thing} right before the {place}?",
    },
)


@dataclass
class _World:
    """People, places and things by number, and what happened: (verb, person, place or thing), a line each."""

    people: int
    things: int
    events: list[tuple[str, int, int]] = field(default_factory=list)
    place_of: dict[int, int] = field(default_factory=dict)
    moved: dict[int, int] = field(default_factory=dict)  # person -> line
    holder: dict[int, int] = field(default_factory=dict)
    trails: dict[int, list[int]] = field(default_factory=dict)  # thing -> places, in order
    evidence: dict[int, list[int]] = field(default_factory=dict)  # thing -> the line that says each of them

    def possible(self) -> list[tuple[str, int, int]]:
        """What may happen next."""
        moves = [
            ("move", p, q) for p in range(self.people) for q in range(_PLACES) if self.place_of.get(p) != q
        ]
        takes = [
            ("take", p, t)
            for p, place in self.place_of.items()
            for t in range(self.things)
            if t not in self.holder and (t not in self.trails or self.trails[t][-1] == place)
        ]
        return [*moves, *takes, *(("drop", p, t) for t, p in self.holder.items())]

    def do(self, verb: str, person: int, other: int) -> None:
        """Let something happen."""
        line = len(self.events)
        self.events.append((verb, person, other))
        if verb == "move":
            self.place_of[person], self.moved[person] = other, line
            for thing, holder in self.holder.items():
                if holder == person:
                    self.trails[thing].append(other)
                    self.evidence[thing].append(line)
        elif verb == "take":
            self.holder[other] = person
            if other not in self.trails:
                self.trails[other] = [self.place_of[person]]
                self.evidence[other] = [self.moved[person]]
        else:
            del self.holder[other]


def multi_hop(request: Request) -> Sheet:
    """See the module. At least two lines: one says who has the thing, another where they are."""
    rng = request.rng("structure")
    form = rng.choice(FORMS)
    count = max(2, request.facts)
    world = _simulate(rng, count, things=max(1, min(request.questions, count // 3)))
    depths = spread_depths(rng, count)
    asked = _questions(rng, world)[: request.questions]
    people, things, places = _names(request, world)
    lines = [
        Line(form[verb].format(who=people[who], place=places[n % _PLACES], thing=things[n % world.things]))
        for verb, who, n in world.events
    ]
    turns = []
    for thing, step in asked:
        trail = [places[place] for place in world.trails[thing]]
        kind = "last" if step is None else "before"
        place, answer = ("", trail[-1]) if step is None else (trail[step], trail[step - 1])
        question = form[kind].format(thing=things[thing], place=place)
        turns.append(Turn(question, f"the {answer}", _evidence(world, thing, step)))
    return Sheet(lines, depths, turns)


def _simulate(rng: random.Random, count: int, things: int) -> _World:
    world = _World(people=min(4, 1 + count // 4), things=things)
    for line in range(count):
        by_verb: dict[str, list[tuple[str, int, int]]] = {}
        for event in world.possible():
            by_verb.setdefault(event[0], []).append(event)
        untaken = [event for event in by_verb.get("take", []) if event[2] not in world.trails]
        if untaken and count - line <= things - len(world.trails):  # what nobody took cannot be asked for
            world.do(*rng.choice(untaken))
        else:
            verb = rng.choices(list(by_verb), [1 if verb == "drop" else 3 for verb in by_verb])[0]
            world.do(*rng.choice(by_verb[verb]))
    return world


def _questions(rng: random.Random, world: _World) -> list[tuple[int, int | None]]:
    """Things with the step of their trail whose place before is asked for; None asks for the last place."""
    asked: list[tuple[int, int | None]] = []
    for thing, trail in world.trails.items():
        visits = Counter(trail)
        asked.append((thing, None))
        # A place that the thing came to twice has two places before it.
        asked += [(thing, step) for step in range(1, len(trail)) if visits[trail[step]] == 1]
    rng.shuffle(asked)
    return asked


def _evidence(world: _World, thing: int, step: int | None) -> tuple[int, ...]:
    taken = next(n for n, event in enumerate(world.events) if event[0] == "take" and event[2] == thing)
    said = world.evidence[thing]
    places = [said[-1]] if step is None else [said[step - 1], said[step]]
    return tuple(sorted({taken, *places}))


def _names(request: Request, world: _World) -> tuple[list[str], list[str], list[str]]:
    rng, fresh = request.rng("names"), Fresh(request)
    people = [
        fresh.draw(lambda: f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}")
        for _ in range(world.people)
    ]
    things = [
        fresh.draw(lambda: f"{rng.choice(ADJECTIVES)} {rng.choice(_THINGS)}") for _ in range(world.things)
    ]
    places = [fresh.draw(lambda: f"{rng.choice(ADJECTIVES)} {rng.choice(_ROOMS)}") for _ in range(_PLACES)]
    return people, things, places
