"""Many requests: a long chat with several requests of the same words, one of whose answers is to be given again.

After OpenAI's MRCR (2025, https://huggingface.co/datasets/openai/mrcr, MIT; Vodrahalli et al. 2024,
arXiv:2409.12640), whose rule judges the answer: it has to begin with a random prefix. Requests are our own, answers
are sentences of the haystack.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from string import ascii_letters, digits
from typing import Any

from longlora_cli.data.chat_template import Message
from longlora_cli.data.synthetic.topic import ordinal
from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.hiding import Pool, take
from longlora_cli.evaluation.tasks.synthetic.listing import fit_padded
from longlora_cli.evaluation.tasks.synthetic.request import Request, unit_costs
from longlora_cli.evaluation.tasks.synthetic.words import word_lists

REQUEST = "Write a {form} about {subject}."
QUESTION = (
    "Prepend {prefix} to the {ordinal} {form} about {subject} that you wrote above, and repeat it word for word. "
    "Write nothing else."
)
MAX_NEW_TOKENS = 512
_FORMS = ("letter", "fable", "speech", "diary page", "news item", "riddle", "blog post", "short scene")
_SAME = (2, 4, 8)
# Beside the prefix of ten letters and the blanks, an answer may take this share of what the reply has room for.
_ANSWER_SHARE = 0.6
_LONGEST_ANSWER = 120
_SHORT = 2048


def mrcr(request: Request) -> Sample:
    """Two equal requests below 2,048 tokens, else two, four or eight by turns; all other requests are different."""
    pool = take(request)
    rng = request.rng("requests")
    same = 2 if request.length < _SHORT else _SAME[request.sample % len(_SAME)]
    most = request.answer_tokens(MAX_NEW_TOKENS)
    answers = list(_answers(pool, min(_LONGEST_ANSWER, int(most * _ANSWER_SHARE))))
    subjects = _subjects(rng)
    form, subject = rng.choice(_FORMS), next(subjects)
    others = [(rng.choice(_FORMS), next(subjects)) for _ in answers]
    asking = request.rng("question")
    prefix = "".join(asking.choices(ascii_letters + digits, k=10))
    asked = asking.randrange(same)
    places = sorted(asking.random() for _ in range(same))

    def compose(count: int, padding: str) -> Sample:
        asked_for: list[tuple[str, str]] = list(others[:count])
        for number, place in enumerate(places):
            asked_for.insert(number + int(place * (count + 1)), (form, subject))
        turns = [_turn(*asked, text) for asked, text in zip(asked_for, answers, strict=False)]
        own = [text for asked, text in zip(asked_for, answers, strict=False) if asked == (form, subject)]
        question = QUESTION.format(prefix=prefix, ordinal=ordinal(asked + 1), form=form, subject=subject)
        last = f"{padding}\n\n{question}" if padding else question
        messages: list[Message] = [*(m for turn in turns for m in turn), {"role": "user", "content": last}]
        return _sample(request, messages, prefix, own[asked], most, same=same, asked=asked + 1)

    texts = [
        REQUEST.format(form=form, subject=subject) + text
        for (form, subject), text in zip(others, answers, strict=True)
    ]
    template = _turn_tokens(request)
    costs = [cost + template for cost in unit_costs(request, texts[same:])]
    return fit_padded(request, costs, compose)


def _sample(
    request: Request, messages: list[Message], prefix: str, text: str, most: int, **facts: Any
) -> Sample:
    return request.make(
        messages=messages,
        outputs=[prefix + text],
        scorer="mrcr",
        max_new_tokens=most,
        extra={"prefix": prefix},
        facts=facts,
    )


def _turn(form: str, subject: str, text: str) -> tuple[Message, Message]:
    asked = REQUEST.format(form=form, subject=subject)
    return {"role": "user", "content": asked}, {"role": "assistant", "content": text}


def _answers(pool: Pool, most: int) -> Iterator[str]:
    """Consecutive sentences of at least half of `most` tokens and at most that; a sentence of more is passed over."""
    texts: list[str] = []
    tokens = 0
    for piece in pool.pieces:
        if piece.tokens > most:
            continue
        if tokens + piece.tokens > most or tokens > most // 2:
            yield " ".join(texts)
            texts, tokens = [], 0
        texts.append(piece.text)
        tokens += piece.tokens


def _subjects(rng: random.Random) -> Iterator[str]:
    nouns = word_lists()["nouns"]
    for noun in rng.sample(nouns, len(nouns)):
        yield f"a {noun}" if noun[0] not in "aeiou" else f"an {noun}"


def _turn_tokens(request: Request) -> int:
    """About how many tokens the template writes around a request and its answer."""
    return 10 if request.tokenizer.chat_template else 6
