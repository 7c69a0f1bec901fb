"""Lines: a long record of named lines with a number each, one of which is asked for.

After the line retrieval of LongChat (Li et al. 2023, Apache-2.0, https://lmsys.org/blog/2023-06-29-longchat).
"""

from __future__ import annotations

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.listing import lines_of, list_around, unit_number
from longlora_cli.evaluation.tasks.synthetic.request import Request
from longlora_cli.evaluation.tasks.synthetic.words import Distinct, word_key

TEMPLATE = (
    "Here is a record of lines. Each begins with its name and holds one number between angle brackets. Keep the "
    "numbers in mind, I will ask for one of them.\n\n{lines}\n\nWhat is the REGISTER_CONTENT in line {key}? Answer "
    "with the number only."
)
UNIT = "line {key}: REGISTER_CONTENT is <{value}>"
MAX_NEW_TOKENS = 16


def lines(request: Request) -> Sample:
    """Keys and numbers are all different."""
    rng, distinct = request.rng("lines"), Distinct()

    def draw() -> tuple[str, str]:
        key = distinct.draw(lambda: word_key(rng))
        return key, UNIT.format(key=key, value=distinct.draw(lambda: str(rng.randint(10_000, 99_999))))

    key, target = draw()
    examples = [draw()[1] for _ in range(16)]
    units = [*examples, *(draw()[1] for _ in range(unit_number(request, examples) - 16))]
    value = target.rpartition("<")[2].removesuffix(">")

    def finish(listed: list[str], depth: float, padding: str) -> Sample:
        context = lines_of(listed, padding)
        content = TEMPLATE.format(lines=context, key=key)
        return request.make(
            messages=[{"role": "user", "content": content}],
            context=context,
            outputs=[value],
            scorer="synthetic.number",
            max_new_tokens=MAX_NEW_TOKENS,
            answer_prefix=f" The REGISTER_CONTENT in line {key} is <",
            facts={"actual_depth": depth},
        )

    return list_around(request, units, target, finish)
