"""Code: functions that call each other and add a number, and a module in which one function is wrong.

After InfiniteBench's Code.Run and Code.Debug (Zhang et al. 2024, arXiv:2402.13718), whose rules judge the answers;
all code is generated.
"""

from __future__ import annotations

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.listing import fit_padded, lines_of, list_around, unit_number
from longlora_cli.evaluation.tasks.synthetic.request import Request, unit_costs
from longlora_cli.evaluation.tasks.synthetic.words import Distinct, invented_word

RUN_TEMPLATE = (
    "Here is a Python module.\n\n{code}\n\nWhat does {name}({argument}) return? Reply with the number only."
)
DEBUG_TEMPLATE = (
    "Exactly one function of this Python module fails whenever it is called.\n\n{code}\n\nWhich "
    "one?\n{options}\nReply with the letter of the right answer."
)
MAX_NEW_TOKENS = 16
_HOPS = (2, 3, 4, 5, 6)
_LETTERS = "ABCD"

# Bodies that work, and after each the same with one mistake: a name that is defined nowhere, or a wrong number of
# arguments.
_BODIES = (
    ("total = sum(values)\n    return total + limit", "total = sum(values)\n    return totals + limit"),
    (
        "longest = max(values)\n    return min(longest, limit)",
        "longest = max(values)\n    return min(longer, limit)",
    ),
    ("return [v for v in values if v < limit]", "return [v for v in values if w < limit]"),
    ("return len(values) * limit", "return len(values, limit)"),
    (
        "ordered = sorted(values)\n    return ordered[:limit]",
        "ordered = sorted(values, limit, 0)\n    return ordered",
    ),
    ("return abs(limit) + len(values)", "return abs(limit, len(values))"),
)


def code_run(request: Request) -> Sample:
    """A chain of two to six calls among functions of the same form; the length of the chain goes round by sample."""
    rng, distinct = request.rng("functions"), Distinct()
    hops = _HOPS[request.sample % len(_HOPS)]

    def name() -> str:
        return distinct.draw(lambda: invented_word(rng, 3))

    chain = [name() for _ in range(hops)]
    added = [rng.randint(10, 99) for _ in chain]
    calls = [f"{callee}(x)" for callee in chain[1:]] + ["x"]
    own = [_adds(*parts) for parts in zip(chain, calls, added, strict=True)]
    rng.shuffle(own)
    gaps = sorted(rng.random() for _ in own)
    names = [name() for _ in range(16)]
    examples = [_adds(name, f"{names[0]}(x)", 50) for name in names]
    names += [name() for _ in range(unit_number(request, examples) - 16)]
    # A function calls only one that stands before it, so that every first part of the list is whole.
    callees = ["x", *(f"{names[rng.randrange(place)]}(x)" for place in range(1, len(names)))]
    units = [_adds(n, callee, rng.randint(10, 99)) for n, callee in zip(names, callees, strict=True)]
    argument = rng.randint(10_000, 99_000)

    def compose(count: int, padding: str) -> Sample:
        listed = units[:count]
        for number, gap in enumerate(gaps):
            listed.insert(number + int(gap * (count + 1)), own[number])
        module = _module(listed, padding)
        content = RUN_TEMPLATE.format(code=module, name=chain[0], argument=argument)
        return request.make(
            messages=[{"role": "user", "content": content}],
            context=module,
            outputs=[str(argument + sum(added))],
            scorer="infinitebench",
            max_new_tokens=MAX_NEW_TOKENS,
            answer_prefix=f" {chain[0]}({argument}) returns",
            stop=("\n",),
            extra={"task": "code_run"},
            facts={"hops": hops},
        )

    return fit_padded(request, unit_costs(request, [unit + "\n\n" for unit in units]), compose)


def code_debug(request: Request) -> Sample:
    """Four functions to choose from, one of them the wrong one; it stands at the depth that is asked for."""
    rng, distinct = request.rng("functions"), Distinct()

    def name() -> str:
        return distinct.draw(lambda: invented_word(rng, 3))

    wrong = name()
    target = _takes(wrong, rng.choice(_BODIES)[1])
    names = [name() for _ in range(16)]
    units = [_takes(n, rng.choice(_BODIES)[0]) for n in names]
    units += [_takes(name(), rng.choice(_BODIES)[0]) for _ in range(unit_number(request, units) - 16)]
    options = rng.sample([wrong, *names[:3]], 4)
    letter = _LETTERS[options.index(wrong)]
    shown = "\n".join(f"{mark}. {option}" for mark, option in zip(_LETTERS, options, strict=True))

    def finish(listed: list[str], depth: float, padding: str) -> Sample:
        module = _module(listed, padding)
        content = DEBUG_TEMPLATE.format(code=module, options=shown)
        return request.make(
            messages=[{"role": "user", "content": content}],
            context=module,
            outputs=[wrong, letter],
            scorer="infinitebench@2024-08",
            max_new_tokens=MAX_NEW_TOKENS,
            answer_prefix=" The correct option is:",
            extra={"task": "code_debug", "options": options},
            facts={"actual_depth": depth},
        )

    return list_around(request, units, target, finish, least=3)


def _adds(name: str, call: str, added: int) -> str:
    return f"def {name}(x):\n    return {call} + {added}"


def _takes(name: str, body: str) -> str:
    return f"def {name}(values, limit):\n    {body}"


def _module(listed: list[str], padding: str) -> str:
    return "\n\n".join(lines_of([function], "") for function in listed) + (
        f"\n\n# {padding}" if padding else ""
    )
