"""Latent needles: the question shares no word with the line that answers it, only what people know about the world.

The idea is that of Modarressi et al. 2025, NoLiMa (arXiv:2502.05167); facts and questions are our own.
"""

from __future__ import annotations

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.hiding import Hidden, hide, take
from longlora_cli.evaluation.tasks.synthetic.request import Request
from longlora_cli.evaluation.tasks.synthetic.words import Fresh, invented_word

FACTS = (
    ("{name} keeps bees behind the old barn.", "Who could sell you honey?"),
    ("{name} never touches meat or fish.", "Who is a vegetarian?"),
    ("{name} repairs watches in the narrow shop.", "Who could mend a clock?"),
    ("{name} pulls teeth for money.", "Who is a dentist?"),
    ("{name} flew the mail plane across the ocean alone.", "Who is a pilot?"),
    ("{name} puts loaves into the oven before dawn.", "From whom would people get bread?"),
    ("{name} milks forty cows every morning.", "Who is a dairy farmer?"),
    ("{name} sings the highest voice at the opera.", "Who is a soprano?"),
    ("{name} nails iron shoes onto horses.", "Who is a blacksmith?"),
    ("{name} sneezes whenever the cat comes near.", "Who has an allergy?"),
    ("{name} mends pipes under kitchen sinks.", "Who is a plumber?"),
    ("{name} was born on February 29.", "Whose birthday comes only every four years?"),
    ("{name} carries letters to every door.", "Who is a postal worker?"),
    ("{name} trims beards near the market square.", "Who is a barber?"),
    ("{name} shows small children how to add and subtract.", "Who gives arithmetic lessons?"),
    ("{name} climbs summits with ropes and pickaxes.", "Who is a mountaineer?"),
)
"""Needles and their questions."""

TEMPLATE = "{context}\n\nOne sentence of this text answers the following. {question} Reply with nothing but the name."
MAX_NEW_TOKENS = 32
_DISTRACTORS = 3


def latent(request: Request) -> Sample:
    """One needle and three others about other people, all with invented names."""
    pool = take(request)
    rng, fresh = request.rng("needles"), Fresh(pool.text)
    chosen = rng.sample(FACTS, 1 + _DISTRACTORS)
    names = [fresh.draw(lambda: invented_word(rng, 2).capitalize()) for _ in chosen]
    depths = request.some_depths(len(chosen))
    lines = [
        Hidden(needle.format(name=name), depth)
        for (needle, _), name, depth in zip(chosen, names, depths, strict=True)
    ]

    def finish(context: str, places: list[float]) -> Sample:
        content = TEMPLATE.format(context=context, question=chosen[0][1])
        return request.make(
            messages=[{"role": "user", "content": content}],
            context=context,
            outputs=[names[0]],
            scorer="ruler.part",
            max_new_tokens=MAX_NEW_TOKENS,
            answer_prefix=" The name is",
            facts={"actual_depth": places[0]},
        )

    return hide(request, pool, lines, finish)
