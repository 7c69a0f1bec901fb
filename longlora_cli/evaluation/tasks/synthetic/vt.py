"""Variable tracking, RULER's: names that take their value from other names, in noise, after one solved example.

Prompt, noise, and the numbers of chains and hops are RULER's (NVIDIA, Apache-2.0, https://github.com/NVIDIA/RULER at
c3f5e3b, `scripts/data/synthetic/variable_tracking.py`; arXiv:2404.06654).
"""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise
from string import ascii_uppercase

from longlora_cli.errors import SettingsError
from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.hiding import NOISE, Hidden, hide, noise, weave
from longlora_cli.evaluation.tasks.synthetic.request import Request
from longlora_cli.evaluation.tasks.synthetic.words import Fresh

TEMPLATE = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
    "Find all variables that are assigned the value {query} in the text above."
)
ANSWER_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned "
    "the value {query}, they are: "
)
MAX_NEW_TOKENS = 30
HOPS = 4
# Blocks of noise in the solved example, and the shortest length that has it. RULER's example takes up to 500 tokens
# at every length; a length that has no room for it gets a smaller one, and a length of a few hundred tokens none.
_EXAMPLE_BLOCKS = {10: 2048, 5: 1024, 1: 768, 0: 0}


def vt(request: Request) -> Sample:
    """One chain of five names; the example's names have three letters, so that none of them can be an answer."""
    rng = request.rng("chain")
    fresh = Fresh(" ".join(NOISE))
    names = [fresh.draw(partial(_letters, rng, 5)) for _ in range(HOPS + 1)]
    value = fresh.draw(lambda: str(rng.randint(10_000, 99_999)))
    example_names = [fresh.draw(partial(_letters, rng, 3)) for _ in range(HOPS + 1)]
    example_value = fresh.draw(lambda: str(rng.randint(10_000, 99_999)))
    places = request.rng("places")
    depths = sorted(places.random() for _ in range(HOPS + 1))
    pool = noise(request, "\n ")
    lines = [Hidden(text, depth) for text, depth in zip(_chain(names, value), depths, strict=True)]
    refused: SettingsError | None = None
    for blocks, shortest in _EXAMPLE_BLOCKS.items():
        if request.length < shortest:
            continue
        shown = _example(request, example_names, example_value, blocks) if blocks else ""

        def finish(context: str, found: list[float], shown: str = shown, blocks: int = blocks) -> Sample:
            return request.make(
                messages=[{"role": "user", "content": shown + TEMPLATE.format(context=context, query=value)}],
                context=context,
                outputs=names,
                scorer="ruler.all",
                max_new_tokens=request.room_for(", ".join(names), MAX_NEW_TOKENS),
                answer_prefix=ANSWER_PREFIX.format(number=HOPS + 1, query=value),
                facts={"actual_depths": found, "example_blocks": blocks},
            )

        try:
            return hide(request, pool, lines, finish)
        except SettingsError as error:
            refused = error
    assert refused is not None  # zero blocks were tried
    raise refused


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(ascii_uppercase, k=count))


def _chain(names: list[str], value: str) -> list[str]:
    copies = [f"VAR {name} = VAR {source} " for source, name in pairwise(names)]
    return [f"VAR {names[0]} = {value}", *copies]


def _example(request: Request, names: list[str], value: str, blocks: int) -> str:
    rng = request.rng("example")
    pieces = noise(request, "\n ").pieces[: blocks * len(NOISE)]
    depths = sorted(rng.random() for _ in names)
    lines = [Hidden(text, depth) for text, depth in zip(_chain(names, value), depths, strict=True)]
    solved = TEMPLATE + ANSWER_PREFIX + " ".join(names) + "\n\n\n\n"
    return solved.format(context=weave(pieces, lines)[0], query=value, number=len(names))
