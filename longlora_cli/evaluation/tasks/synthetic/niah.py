"""Needles: RULER's eight tasks of numbers and UUIDs that a text hides under keys.

Prompts, needle, noise, and the numbers of keys, values and queries are those of RULER (NVIDIA, Apache-2.0,
https://github.com/NVIDIA/RULER at c3f5e3b, `scripts/data/synthetic/{constants,niah}.py` and
`scripts/synthetic.yaml`; Hsieh et al. 2024, arXiv:2404.06654), so that scores can be compared. The essays are the
haystack's texts, and depths are shares of tokens rather than of sentences.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.hiding import Hidden, hide, noise, take
from longlora_cli.evaluation.tasks.synthetic.listing import lines_of, list_around, unit_number
from longlora_cli.evaluation.tasks.synthetic.request import Request
from longlora_cli.evaluation.tasks.synthetic.words import Distinct, Fresh, new_uuid, seven_digits, word_key

TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
    "about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the "
    "provided text?"
)
ANSWER_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
MAX_NEW_TOKENS = 128

_VALUES: dict[str, Callable[[random.Random], str]] = {"numbers": seven_digits, "uuids": new_uuid}
_KEYS: dict[str, Callable[[random.Random], str]] = {"words": word_key, "uuids": new_uuid}
# More needles than the context could hold are never drawn: a list of examples tells how long one is.
_EXAMPLES = 16


@dataclass(frozen=True)
class Flavour:
    """A row of RULER's table of needle tasks.

    Args:
        haystack: What the needles are hidden in: noise, texts, or other needles.
        keys: Kind of the keys.
        values: Kind of the values.
        key_count: Keys that are hidden.
        value_count: Values of each key.
        query_count: Keys that are asked for.
    """

    haystack: Literal["noise", "essay", "needle"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    key_count: int = 1
    value_count: int = 1
    query_count: int = 1


FLAVOURS = {
    "niah_single_1": Flavour("noise"),
    "niah_single_2": Flavour("essay"),
    "niah_single_3": Flavour("essay", values="uuids"),
    "niah_multikey_1": Flavour("essay", key_count=4),
    "niah_multikey_2": Flavour("needle"),
    "niah_multikey_3": Flavour("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Flavour("essay", value_count=4),
    "niah_multiquery": Flavour("essay", key_count=4, query_count=4),
}


def niah(request: Request) -> Sample:
    """A sample of the request's flavour. One asked needle has a depth; of several each stands at a random one."""
    flavour = FLAVOURS[request.task]
    return _among_needles(request, flavour) if flavour.haystack == "needle" else _in_text(request, flavour)


def _in_text(request: Request, flavour: Flavour) -> Sample:
    is_noise = flavour.haystack == "noise"
    pool = noise(request, "\n") if is_noise else take(request)
    rng, fresh = request.rng("needles"), Fresh(pool.text)
    keys = [fresh.draw(lambda: _KEYS[flavour.keys](rng)) for _ in range(flavour.key_count)]
    values = [
        [fresh.draw(lambda: _VALUES[flavour.values](rng)) for _ in range(flavour.value_count)] for _ in keys
    ]
    depths = request.some_depths(flavour.key_count * flavour.value_count)
    pairs = [(key, value) for key, own in zip(keys, values, strict=True) for value in own]
    lines = [
        Hidden(NEEDLE.format(kind=flavour.values, key=key, value=value), depth, "\n" if is_noise else " ")
        for (key, value), depth in zip(pairs, depths, strict=True)
    ]

    def finish(context: str, places: list[float]) -> Sample:
        # The first needle has the depth that was asked for; the keys have no order of their own.
        asked, outputs = (
            keys[: flavour.query_count],
            [v for own in values[: flavour.query_count] for v in own],
        )
        return _sample(request, flavour, context, asked, outputs, places[: len(outputs)])

    return hide(request, pool, lines, finish)


def _among_needles(request: Request, flavour: Flavour) -> Sample:
    rng = request.rng("needles")
    distinct = Distinct()

    def draw() -> tuple[str, str]:
        return (
            distinct.draw(lambda: _KEYS[flavour.keys](rng)),
            distinct.draw(lambda: _VALUES[flavour.values](rng)),
        )

    def needle(pair: tuple[str, str]) -> str:
        return NEEDLE.format(kind=flavour.values, key=pair[0], value=pair[1])

    asked = draw()
    examples = [needle(draw()) for _ in range(_EXAMPLES)]
    units = [*examples, *(needle(draw()) for _ in range(unit_number(request, examples) - _EXAMPLES))]

    def finish(listed: list[str], depth: float, padding: str) -> Sample:
        return _sample(request, flavour, lines_of(listed, padding), [asked[0]], [asked[1]], [depth])

    return list_around(request, units, needle(asked), finish)


def _sample(
    request: Request, flavour: Flavour, context: str, keys: list[str], outputs: list[str], places: list[float]
) -> Sample:
    template, prefix, kind = TEMPLATE, ANSWER_PREFIX, str(flavour.values)
    if len(outputs) == 1:
        template, prefix, kind = _singular(template), _singular(prefix), kind[:-1]
    query = f"{', '.join(keys[:-1])}, and {keys[-1]}" if len(keys) > 1 else keys[0]
    where = {"actual_depth": places[0]} if len(places) == 1 else {"actual_depths": places}
    return request.make(
        messages=[{"role": "user", "content": template.format(kind=kind, context=context, query=query)}],
        context=context,
        outputs=outputs,
        scorer="ruler.all",
        max_new_tokens=MAX_NEW_TOKENS,
        answer_prefix=prefix.format(kind=kind, query=query),
        facts=where,
    )


def _singular(template: str) -> str:
    """As RULER rewrites its template where one value is asked for."""
    return template.replace("Some", "A").replace("are all", "is").replace("are", "is")
