"""Frequent words: RULER's text of coded words whose numbers fall as one over the square of their rank.

Prompt, alphabet and Zipf's law are RULER's (NVIDIA, Apache-2.0, https://github.com/NVIDIA/RULER at c3f5e3b,
`scripts/data/synthetic/freq_words_extraction.py`; arXiv:2404.06654): words of six letters, alpha 2.0, the most
frequent "word" is `...` and does not count.
"""

from __future__ import annotations

import math
from string import ascii_lowercase

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.request import Request, fit, unit_costs
from longlora_cli.evaluation.tasks.synthetic.words import Fresh

TEMPLATE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
ANSWER_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
MAX_NEW_TOKENS = 50
_ZETA_2 = math.pi**2 / 6
_LETTERS = 6
# From here on the third word is more frequent than the fourth: 50 / 9 > 50 / 16 after rounding down.
_FEWEST = 60


def fwe(request: Request) -> Sample:
    """The three most frequent words are the references; each is more frequent than the next."""
    rng = request.rng("words")
    fresh = Fresh("")
    number = max(40, request.length // 50)
    words = [
        "...",
        *(fresh.draw(lambda: "".join(rng.choices(ascii_lowercase, k=_LETTERS))) for _ in range(number)),
    ]

    def compose(count: int) -> Sample:
        entries: list[str] = []
        for rank, word in enumerate(words, start=1):
            entries += [word] * int(count / (rank**2 * _ZETA_2))
        request.rng("order").shuffle(entries)
        context = " ".join(entries)
        return request.make(
            messages=[{"role": "user", "content": TEMPLATE.format(context=context)}],
            context=context,
            outputs=words[1:4],
            scorer="ruler.all",
            max_new_tokens=MAX_NEW_TOKENS,
            answer_prefix=ANSWER_PREFIX,
        )

    # Of hundred words about 61 are dots of one token.
    per_word = sum(unit_costs(request, [" " + word for word in words[1:9]])) / 8
    cost = max(1, round(0.61 + 0.39 * per_word))
    return fit(request, [cost] * (request.length + _FEWEST), compose, least=_FEWEST)[1]
