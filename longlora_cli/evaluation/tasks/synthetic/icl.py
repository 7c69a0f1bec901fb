"""Many examples in context: invented words with numbers as labels; the rule is in the examples alone.

After HELMET's many-shot classification (Yen et al. 2024, arXiv:2410.02694), which replaces labels by random numbers
so that nothing learnt before helps. A word's class is its ending.
"""

from __future__ import annotations

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.listing import fit_padded, lines_of, unit_number
from longlora_cli.evaluation.tasks.synthetic.request import Request, unit_costs
from longlora_cli.evaluation.tasks.synthetic.words import Distinct, endings, invented_word

TEMPLATE = (
    "Each word below has a label. Words of the same kind have the same label. Find the rule and give the label of "
    "the last word; reply with the number only.\n\n{examples}\n\nword: {word}"
)
UNIT = "word: {word}\nlabel: {label}"
MAX_NEW_TOKENS = 8
_CLASS_TOKENS = 256
_FEWEST, _MOST = 3, 40


def icl_many(request: Request) -> Sample:
    """A class about every 256 tokens, forty at most, each with several examples; the asked word is none of them."""
    rng, distinct = request.rng("examples"), Distinct()
    classes = min(max(request.length // _CLASS_TOKENS, _FEWEST), _MOST)
    ends = rng.sample(endings(), classes)
    labels = [str(label) for label in rng.sample(range(100, 1000), classes)]
    asked = rng.randrange(classes)

    def draw(kind: int) -> str:
        return distinct.draw(lambda: invented_word(rng, 2)[:-1] + ends[kind])

    def unit(kind: int) -> str:
        return UNIT.format(word=draw(kind), label=labels[kind])

    word = draw(asked)
    # Whole rounds, each with every class in an order of its own: all classes have the same number of examples, or
    # one less.
    number = max(unit_number(request, [unit(kind) for kind in range(classes)]), 2 * classes)
    kinds = [kind for _ in range(-(-number // classes)) for kind in rng.sample(range(classes), classes)]
    units = [unit(kind) for kind in kinds]

    def compose(count: int, padding: str) -> Sample:
        examples = lines_of(units[:count], padding)
        return request.make(
            messages=[{"role": "user", "content": TEMPLATE.format(examples=examples, word=word)}],
            context=examples,
            outputs=[labels[asked]],
            scorer="synthetic.answer",
            max_new_tokens=MAX_NEW_TOKENS,
            answer_prefix=" label:",
            stop=("\n",),
            facts={"classes": classes, "shots": kinds[:count].count(asked)},
        )

    costs = unit_costs(request, [text + "\n" for text in units])
    return fit_padded(request, costs, compose, least=2 * classes)
