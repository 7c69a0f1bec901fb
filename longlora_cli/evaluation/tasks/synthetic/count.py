"""Count and sort: what a text says several times, and what it tells out of order. Every part of it has to be read.

After the aggregation of RULER (Hsieh et al. 2024, arXiv:2404.06654); the sentences are our own and not those of
`prepare --synthetic`.
"""

from __future__ import annotations

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.hiding import Hidden, hide, take
from longlora_cli.evaluation.tasks.synthetic.request import Request
from longlora_cli.evaluation.tasks.synthetic.words import Fresh, new_pair, word_lists

COUNT_LINE = "The {thing} knocked at the gate."
COUNT_TEMPLATE = (
    "{context}\n\nHow often does the text say that the {thing} knocked at the gate? Reply with a number only."
)
SORT_LINE = "In the year {year} the {thing} was repaired."
SORT_TEMPLATE = (
    "{context}\n\nThe text tells in which year each of these was repaired: {things}. Sort them by year, earliest "
    "first. Reply with the names only, with commas between them."
)
MAX_NEW_TOKENS = 32
_LONG = 2048


def count(request: Request) -> Sample:
    """Two to five lines about the thing, to twelve from 2,048 tokens on, and some about two others."""
    pool = take(request)
    rng = request.rng("lines")
    things = _things(request, pool.text, 3)
    most = 5 if request.length < _LONG else 12
    number = rng.randint(2, most)
    others = [rng.randint(1, most // 2) for _ in things[1:]]
    texts = [
        COUNT_LINE.format(thing=thing)
        for thing, times in zip(things, (number, *others), strict=True)
        for _ in range(times)
    ]
    lines = [Hidden(text, rng.random()) for text in texts]

    def finish(context: str, places: list[float]) -> Sample:
        return request.make(
            messages=[{"role": "user", "content": COUNT_TEMPLATE.format(context=context, thing=things[0])}],
            context=context,
            outputs=[str(number)],
            scorer="synthetic.number",
            max_new_tokens=MAX_NEW_TOKENS,
            answer_prefix=" The number is",
        )

    return hide(request, pool, lines, finish)


def sort(request: Request) -> Sample:
    """Four things, six from 2,048 tokens on; the text tells them in one random order and the question in another."""
    pool = take(request)
    rng = request.rng("lines")
    things = _things(request, pool.text, 4 if request.length < _LONG else 6)
    years = sorted(rng.sample(range(1200, 2000), len(things)))
    lines = [
        Hidden(SORT_LINE.format(year=year, thing=thing), rng.random())
        for year, thing in zip(years, things, strict=True)
    ]
    shown = rng.sample(things, len(things))

    def finish(context: str, places: list[float]) -> Sample:
        content = SORT_TEMPLATE.format(context=context, things=", ".join(shown))
        return request.make(
            messages=[{"role": "user", "content": content}],
            context=context,
            outputs=[", ".join(things)],
            scorer="synthetic.order",
            max_new_tokens=request.room_for(", ".join(things), MAX_NEW_TOKENS),
            answer_prefix=" Earliest first:",
        )

    return hide(request, pool, lines, finish)


def _things(request: Request, text: str, number: int) -> list[str]:
    """Adjectives and nouns of few letters: an answer of six of them has to end in time."""
    rng, fresh = request.rng("things"), Fresh(text)
    short = {kind: [word for word in words if len(word) <= 6] for kind, words in word_lists().items()}
    return [
        fresh.draw(lambda: " ".join(new_pair(rng, short["adjectives"], short["nouns"])))
        for _ in range(number)
    ]
