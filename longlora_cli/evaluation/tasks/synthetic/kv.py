"""Key and value: one JSON object of UUIDs, of which one value is asked for.

After Liu et al. 2023, "Lost in the Middle" (arXiv:2307.03172), and InfiniteBench's Retrieve.KV (Zhang et al. 2024,
arXiv:2402.13718), whose rule judges the answer.
"""

from __future__ import annotations

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.listing import list_around, unit_number
from longlora_cli.evaluation.tasks.synthetic.request import Request
from longlora_cli.evaluation.tasks.synthetic.words import Distinct, new_uuid

TEMPLATE = (
    'The JSON object below holds keys and their values.\n\n{json}\n\nWhich value belongs to the key "{key}"? '
    "Answer with the "
    "value only."
)
MAX_NEW_TOKENS = 64


def kv(request: Request) -> Sample:
    """All keys and values are different."""
    rng, distinct = request.rng("pairs"), Distinct()

    def draw() -> str:
        return f'"{distinct.draw(lambda: new_uuid(rng))}": "{distinct.draw(lambda: new_uuid(rng))}"'

    target = draw()
    examples = [draw() for _ in range(16)]
    units = [*examples, *(draw() for _ in range(unit_number(request, examples) - 16))]
    key, value = (part.strip('"') for part in target.split(": "))

    def finish(listed: list[str], depth: float, padding: str) -> Sample:
        pairs = "{" + ",\n".join(listed) + "}" + (f"\n\n{padding}" if padding else "")
        return request.make(
            messages=[{"role": "user", "content": TEMPLATE.format(json=pairs, key=key)}],
            context=pairs,
            outputs=[value],
            scorer="infinitebench",
            max_new_tokens=MAX_NEW_TOKENS,
            answer_prefix=f' The value of "{key}" is "',
            extra={"task": "kv_retrieval"},
            facts={"actual_depth": depth},
        )

    return list_around(request, units, target, finish)
