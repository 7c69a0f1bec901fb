"""Small stories of people, things and rooms, told between the sentences of a text.

After bAbI's first three tasks (Weston et al. 2015, arXiv:1502.05698) in a book, as BABILong puts them (Kuratov et
al. 2024, arXiv:2406.10149), whose rule judges the answer. The grammar is written anew.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.hiding import Hidden, hide, take
from longlora_cli.evaluation.tasks.synthetic.request import Request
from longlora_cli.evaluation.tasks.synthetic.words import Fresh, invented_word

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
"""The labels of bAbI's first three tasks."""

_THINGS = ("apple", "football", "milk")
_MOVES = ("{who} went to the {room}.", "{who} walked to the {room}.", "{who} moved to the {room}.")
_TAKES = ("{who} picked up the {thing}.", "{who} took the {thing}.")
_DROPS = ("{who} dropped the {thing}.", "{who} put down the {thing}.")
TEMPLATE = (
    "Between the sentences of the text below there are facts about where {people} are and what they carry. Answer "
    "the question from these facts alone, with one word for the place.\n\n{context}\n\nQuestion: {question}"
)
MAX_NEW_TOKENS = 20


@dataclass
class _World:
    """Who is where, who carries what, and every place that each thing was at."""

    rooms: dict[str, str] = field(default_factory=dict)
    carriers: dict[str, str] = field(default_factory=dict)
    seen: dict[str, list[str]] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def note(self, thing: str, room: str) -> None:
        """A thing is at a room now."""
        places = self.seen.setdefault(thing, [])
        if not places or places[-1] != room:
            places.append(room)


def babi_long(request: Request) -> Sample:
    """The kind goes round by sample: where someone is, where a thing is, where it was before another room."""
    kind = 1 + request.sample % 3
    pool = take(request)
    rng, fresh = request.rng("story"), Fresh(pool.text)
    # Names from books would be mistaken for the books' own people.
    people = [fresh.draw(lambda: invented_word(rng, 2).capitalize()) for _ in range(3)]
    facts = 8 if request.length < 2048 else 16
    story, question, answer = _story(rng, people, kind, facts)
    depths = sorted(rng.random() for _ in story)
    lines = [Hidden(text, depth) for text, depth in zip(story, depths, strict=True)]

    def finish(context: str, places: list[float]) -> Sample:
        named = f"{people[0]}, {people[1]} and {people[2]}"
        content = TEMPLATE.format(people=named, context=context, question=question)
        return request.make(
            messages=[{"role": "user", "content": content}],
            context=context,
            outputs=[answer],
            scorer="babilong",
            max_new_tokens=MAX_NEW_TOKENS,
            answer_prefix=" Answer:",
            extra={"question": question, "task": f"qa{kind}", "all_classes": list(ROOMS)},
            facts={"kind": f"qa{kind}"},
        )

    return hide(request, pool, lines, finish)


def _story(rng: random.Random, people: list[str], kind: int, facts: int) -> tuple[list[str], str, str]:
    """A story of so many facts, or somewhat more until its question has an answer."""
    world = _World()
    while True:
        _happen(rng, world, people)
        if len(world.told) >= facts and (asked := _ask(rng, world, kind)):
            return world.told, *asked


def _happen(rng: random.Random, world: _World, people: list[str]) -> None:
    who = rng.choice(people)
    carried = [thing for thing, carrier in world.carriers.items() if carrier == who]
    act = rng.random()
    if who not in world.rooms or act < 0.5:
        room = rng.choice([room for room in ROOMS if room != world.rooms.get(who)])
        world.rooms[who] = room
        world.told.append(rng.choice(_MOVES).format(who=who, room=room))
        for thing in carried:
            world.note(thing, room)
    elif carried and act < 0.7:
        thing = rng.choice(carried)
        del world.carriers[thing]
        world.told.append(rng.choice(_DROPS).format(who=who, thing=thing))
    else:
        free = [
            t
            for t in _THINGS
            if t not in world.carriers and world.seen.get(t, [None])[-1] in (None, world.rooms[who])
        ]
        if free:
            thing = rng.choice(free)
            world.carriers[thing] = who
            world.note(thing, world.rooms[who])
            world.told.append(rng.choice(_TAKES).format(who=who, thing=thing))


def _ask(rng: random.Random, world: _World, kind: int) -> tuple[str, str] | None:
    if kind == 1:
        who = rng.choice(sorted(world.rooms))
        return f"Where is {who}?", world.rooms[who]
    # A thing that lies where it was taken says where it is in one fact; one that was carried needs two.
    moved = [thing for thing, places in sorted(world.seen.items()) if len(places) >= kind]
    if not moved:
        return None
    thing = rng.choice(moved)
    places = world.seen[thing]
    if kind == 2:
        return f"Where is the {thing}?", places[-1]
    if places.count(places[-1]) > 1 or places[-2] == places[-1]:
        return None  # "before the kitchen" has one meaning only where it was there once
    return f"Where was the {thing} before the {places[-1]}?", places[-2]
