"""Questions over one to three facts that are hidden far apart in a text, with a name as the answer."""

from __future__ import annotations

from collections.abc import Sequence

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.hiding import Hidden, hide, take
from longlora_cli.evaluation.tasks.synthetic.request import Request
from longlora_cli.evaluation.tasks.synthetic.words import Fresh, invented_word, new_pair, word_lists

FACTS = (
    "At the auction the {thing} went to {person}.",
    "{person} has a house in {town}.",
    "The river that runs past {town} is the {river}.",
)
QUESTIONS = (
    "To whom did the {thing} go at the auction?",
    "In which town does the person have a house to whom the {thing} went at the auction?",
    "Which river runs past the town where the person has a house to whom the {thing} went at the auction?",
)
TEMPLATE = "{context}\n\n{question} Reply with the name only."
MAX_NEW_TOKENS = 32


def qa_needle(request: Request) -> Sample:
    """The hops go round by sample: one, two, three. All other chains have facts of the same forms."""
    pool = take(request)
    rng, fresh = request.rng("facts"), Fresh(pool.text)
    chains = [_draw(request, fresh) for _ in range(4 if request.length >= 1024 else 2)]
    hops = 1 + request.sample % len(QUESTIONS)
    facts = [text.format(**chain) for chain in chains for text in FACTS]
    depths = [(place + rng.random()) / len(facts) for place in range(len(facts))]
    rng.shuffle(depths)
    lines = [Hidden(text, depth) for text, depth in zip(facts, depths, strict=True)]
    question = QUESTIONS[hops - 1].format(**chains[0])

    def finish(context: str, places: Sequence[float]) -> Sample:
        return request.make(
            messages=[{"role": "user", "content": TEMPLATE.format(context=context, question=question)}],
            context=context,
            outputs=[(chains[0]["person"], chains[0]["town"], chains[0]["river"])[hops - 1]],
            scorer="synthetic.answer",
            max_new_tokens=MAX_NEW_TOKENS,
            answer_prefix=" Answer:",
            stop=("\n",),
            facts={"actual_depths": list(places[:hops]), "hops": hops},
        )

    return hide(request, pool, lines, finish)


def _draw(request: Request, fresh: Fresh) -> dict[str, str]:
    rng, lists = request.rng("names"), word_lists()
    names = {
        part: fresh.draw(lambda: invented_word(rng, 2).capitalize()) for part in ("person", "town", "river")
    }
    thing = fresh.draw(lambda: " ".join(new_pair(rng, lists["adjectives"], lists["nouns"])))
    return {**names, "thing": thing}
