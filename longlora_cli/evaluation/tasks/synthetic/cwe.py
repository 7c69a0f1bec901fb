"""Common words: RULER's numbered list of words, of which ten stand there more often than the others.

Prompt and repetitions are RULER's (NVIDIA, Apache-2.0, https://github.com/NVIDIA/RULER at c3f5e3b,
`scripts/data/synthetic/common_words_extraction.py`; arXiv:2404.06654): the ten words 30 times and the others 3
times, after a solved example of 10 and 3; below 4,096 tokens 6 and 1, after 3 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.request import Request, fit, unit_costs
from longlora_cli.evaluation.tasks.synthetic.words import shuffled_words

TEMPLATE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
ANSWER_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
MAX_NEW_TOKENS = 120
_COMMON = 10
_RULER_SHORTEST = 4096


@dataclass(frozen=True)
class _Repeats:
    """How often common and other words stand in the list and in the example, which has `example_words` words."""

    common: int
    other: int
    example_words: int = 0
    example_common: int = 0
    example_other: int = 0


_LONG = _Repeats(30, 3, 40, 10, 3)
# RULER's below 4,096 tokens; then, where these have no room (a few hundred tokens), our own.
_SHORT = (_Repeats(6, 1, 20, 3, 1), _Repeats(6, 1), _Repeats(3, 1))


def cwe(request: Request) -> Sample:
    """The ten words are the references. Words of the example are not in the list."""
    ladder = (_LONG, *_SHORT) if request.length >= _RULER_SHORTEST else _SHORT
    refused: SettingsError | None = None
    for repeats in ladder:
        try:
            return _fitted(request, repeats)
        except SettingsError as error:
            refused = error
    assert refused is not None
    raise refused


def _fitted(request: Request, repeats: _Repeats) -> Sample:
    stream = shuffled_words(request.rng("words"))
    shown = list(islice(stream, repeats.example_words))
    words = list(islice(stream, _COMMON + request.length // repeats.other // 3))
    example = ""
    if shown:
        context = _listed(request, "example", shown, repeats.example_common, repeats.example_other)
        answer = " ".join(f"{number}. {word}" for number, word in enumerate(shown[:_COMMON], start=1))
        example = TEMPLATE.format(context=context) + ANSWER_PREFIX + answer + "\n"

    def compose(count: int) -> Sample:
        context = _listed(request, "list", words[:count], repeats.common, repeats.other)
        return request.make(
            messages=[{"role": "user", "content": example + TEMPLATE.format(context=context)}],
            context=context,
            outputs=words[:_COMMON],
            scorer="ruler.all",
            max_new_tokens=MAX_NEW_TOKENS,
            answer_prefix=ANSWER_PREFIX,
            facts={"repeats": [repeats.common, repeats.other], "example_words": repeats.example_words},
        )

    costs = [cost * repeats.other for cost in unit_costs(request, [f" 1000. {word}" for word in words])]
    return fit(request, costs, compose, least=2 * _COMMON)[1]


def _listed(request: Request, part: str, words: list[str], common: int, other: int) -> str:
    """`1. word 2. word`, in random order."""
    entries = [*words[:_COMMON] * common, *words[_COMMON:] * other]
    request.rng(part).shuffle(entries)
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, start=1))
