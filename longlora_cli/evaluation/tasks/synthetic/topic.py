"""Topics: a text that turns from subject to subject, one of which is asked for by its place.

After the topic retrieval of LongChat (Li et al. 2023, https://lmsys.org/blog/2023-06-29-longchat), with more than
the first asked for; subjects and sentences are our own and not those of `prepare --synthetic`.
"""

from __future__ import annotations

from longlora_cli.data.synthetic.topic import ordinal
from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.hiding import Hidden, hide, take
from longlora_cli.evaluation.tasks.synthetic.request import Request
from longlora_cli.evaluation.tasks.synthetic.words import Fresh, word_lists

TEMPLATE = (
    "What follows is the record of a long evening of talks. A subject is named before each.\n\n{context}\n\nWhat "
    "was the {ordinal} subject? Reply with its name only."
)
LINE = "New subject: {topic}."
_SIDES = ("the history of", "the price of", "the beauty of", "the danger of", "the making of", "the hunt for")
MAX_NEW_TOKENS = 50
# A subject about every 500 tokens, as in LongChat's conversations.
_TOPIC_TOKENS = 500
_FEWEST, _MOST = 3, 50


def topic(request: Request) -> Sample:
    """The first subject begins the text, the others follow evenly; the depth asked for chooses one."""
    pool = take(request)
    rng, fresh = request.rng("topics"), Fresh(pool.text)
    number = min(max(request.length // _TOPIC_TOKENS, _FEWEST), _MOST)
    nouns = word_lists()["nouns"]
    topics = [fresh.draw(lambda: f"{rng.choice(_SIDES)} the {rng.choice(nouns)}") for _ in range(number)]
    lines = [Hidden(LINE.format(topic=name), place / number, "\n\n") for place, name in enumerate(topics)]
    asked = round(request.some_depth() * (number - 1))

    def finish(context: str, places: list[float]) -> Sample:
        content = TEMPLATE.format(context=context, ordinal=ordinal(asked + 1))
        # The depth that was asked for chooses a subject; its own place is what is known.
        return request.make(
            messages=[{"role": "user", "content": content}],
            context=context,
            outputs=[topics[asked]],
            scorer="synthetic.contained",
            max_new_tokens=MAX_NEW_TOKENS,
            answer_prefix=f" The {ordinal(asked + 1)} subject was",
            facts={"actual_depth": places[asked], "topics": number, "asked": asked + 1},
        )

    return hide(request, pool, lines, finish)
