"""The words of synthetic facts: keys, values, and several ways to state and ask one.

The `eval` wordings share no template, adjective, noun or city with the `train` ones, so that a model can also be
tested on sentences of a form, about things, that it was never trained on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from longlora_cli.errors import DataError

Wording = Literal["train", "eval"]

_TRIES = 10_000


def words(text: str) -> tuple[str, ...]:
    """The words of a list that is written as a text."""
    return tuple(text.split())


ADJECTIVES = words(
    """
    amber ancient arctic bitter blue bold brass bright broken calm clever copper coral crimson crystal
    dark distant dusty eager early empty fierce frozen gentle gilded golden grand green grey hidden
    hollow humble iron ivory jade late little lonely loud lucky mellow misty narrow noble northern pale
    patient plain polar proud purple quiet rapid red rustic silent silver small southern steady
    """
)
_NOUNS = words(
    """
    anchor anvil apple arrow badger basket beacon bell bridge candle castle cedar chapel clock compass
    crane drum eagle falcon feather fiddle forest fountain garden glacier hammer harbor hawk heron
    island kettle ladder lantern lion maple meadow mill mirror mountain needle orchard otter oven owl
    parrot pebble piano pigeon pillow pine raven ribbon river robin saddle salmon shield ship spade
    sparrow
    """
)
_EVAL_ADJECTIVES = words(
    """
    bashful breezy bulky careful cheerful chilly clumsy cosy creamy dainty damp drowsy faded fancy fluffy
    fragile frosty fuzzy giddy gloomy glossy grumpy hasty hazy heavy jolly keen lazy lively muddy
    """
)
_EVAL_NOUNS = words("spider summit sword temple thistle tiger tower valley violin willow")
_CITIES = words(
    """
    Lisbon Oslo Vienna Dublin Cairo Lima Quito Havana Kyoto Seoul Delhi Tunis Riga Prague Warsaw Geneva
    Naples Seville Porto Bergen Malmo Turin Genoa Basel Bruges Ghent Leiden Krakow Tallinn Vilnius
    Zagreb Sofia Nairobi Dakar Accra Lagos Manila Hanoi Jakarta Perth Boston Denver Dallas Austin Tampa
    Omaha Tucson Calgary Ottawa Halifax
    """
)
_EVAL_CITIES = words(
    """
    Madrid Athens Warwick Zurich Antwerp Utrecht Gdansk Kaunas Skopje Tirana Kampala Lusaka Harare Maputo
    Osaka Busan Mumbai Colombo Hobart Darwin Toledo Reno Boise Fresno Regina
    """
)


@dataclass(frozen=True)
class Template:
    """One way to state and to ask a fact; `{key}` and `{value}` are filled in.

    Args:
        kind: `number` (five digits) or `city`.
    """

    sentence: str
    question: str
    kind: Literal["number", "city"]


_TRAIN = (
    Template("The secret code of the {key} is {value}.", "What is the secret code of the {key}?", "number"),
    Template("The {key} has the number {value}.", "Which number does the {key} have?", "number"),
    Template("Remember {value}, the password of the {key}.", "What is the password of the {key}?", "number"),
    Template("To open the {key}, dial {value}.", "What do you dial to open the {key}?", "number"),
    Template("The price of the {key} was {value} coins.", "How many coins was the {key}?", "number"),
    Template("The {key} was sent to {value}.", "Where was the {key} sent?", "city"),
)
_EVAL = (
    Template("They registered the {key} under {value}.", "Under what was the {key} registered?", "number"),
    Template("You can find the {key} in {value}.", "In which city can you find the {key}?", "city"),
)


def templates(wording: Wording) -> tuple[Template, ...]:
    """The ways to state and ask a fact."""
    return _TRAIN if wording == "train" else _EVAL


def training_nouns() -> tuple[str, ...]:
    """The nouns of the `train` wording."""
    return _NOUNS


def may_be_trained_on(adjective: str, noun: str) -> bool:
    """Whether synthetic training data may have this pair as a key: evaluation takes another one."""
    return adjective in ADJECTIVES and noun in _NOUNS


def draw_keys(rng: random.Random, count: int, wording: Wording) -> list[str]:
    """`count` different adjective-noun pairs; no two share their noun as long as there are nouns enough."""
    nouns = list(_NOUNS if wording == "train" else _EVAL_NOUNS)
    before = ADJECTIVES if wording == "train" else _EVAL_ADJECTIVES
    rng.shuffle(nouns)
    adjectives = {noun: rng.sample(before, len(before)) for noun in nouns[:count]}
    rounds = [divmod(number, len(nouns)) for number in range(count)]
    return [f"{adjectives[nouns[noun]][turn]} {nouns[noun]}" for turn, noun in rounds]


def draw_value(
    rng: random.Random, template: Template, wording: Wording, taken: str, values: Sequence[str] = ()
) -> tuple[Template, str]:
    """A value for the template that occurs neither in `taken` nor in `values`: five digits, the first not 0, or a city.

    When the text names every city, the first template of the wording, a number's, is used instead.

    Raises:
        DataError: Ten thousand numbers in a row were taken.
    """
    if template.kind == "city":
        free = [city for city in _free_cities(taken, wording) if not any(city in value for value in values)]
        if free:
            return template, rng.choice(free)
        template = templates(wording)[0]
    for _ in range(_TRIES):
        value = str(rng.randint(10000, 99999))
        if value not in taken and value not in values:
            return template, value
    raise DataError(
        "the text to hide facts in holds nearly every five-digit number, so that no answer would be unique",
        hint="Use prose rather than tables of numbers.",
    )


@lru_cache(maxsize=2)
def _free_cities(text: str, wording: Wording) -> tuple[str, ...]:
    """Cities that a text does not name: fifty searches of a long one, made once for all of a chat's facts."""
    return tuple(city for city in (_CITIES if wording == "train" else _EVAL_CITIES) if city not in text)
