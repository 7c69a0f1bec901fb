"""Graph walks: a list of directed edges, of which a breadth-first search or the parents of a node are asked for.

After OpenAI's Graphwalks (2025, https://huggingface.co/datasets/openai/graphwalks, MIT), whose rule judges the
answer; the wording is our own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.listing import fit_padded, lines_of, unit_number
from longlora_cli.evaluation.tasks.synthetic.request import Request, unit_costs

TEMPLATE = (
    "Here are the edges of a directed graph, one a line; an edge leads from its first node to its "
    "second.\n\n{edges}\n\n{question} End your answer with one line of this form, without quotes around the "
    "names:\nFinal Answer: [name, name]"
)
PARENTS = "Which nodes have an edge that leads to {node}?"
BFS = (
    "Do a breadth-first search that begins at {node}. Which nodes does it reach first after exactly {depth} steps, "
    "so that no shorter way leads to them?"
)
MAX_NEW_TOKENS = 512
_MOST_NODES = 8
_STEPS = 2
Edge = tuple[str, str]


def graphwalk(request: Request) -> Sample:
    """Parents and searches of two steps by turns, with one to eight nodes as the answer."""
    rng = request.rng("edges")
    examples = [_edge(_name(rng), _name(rng)) for _ in range(16)]
    number = unit_number(request, examples)
    names = sorted({_name(rng) for _ in range(max(6, number // 3))})
    edges = _edges(rng, names, number)
    costs = unit_costs(request, [_edge(*edge) + "\n" for edge in edges])
    kind = ("parents", "bfs")[request.sample % 2]

    def compose(count: int, padding: str) -> Sample:
        node, answer = _asked(request.rng("question"), edges[:count], kind)
        question = PARENTS.format(node=node) if kind == "parents" else BFS.format(node=node, depth=_STEPS)
        listed = lines_of([_edge(*edge) for edge in edges[:count]], padding)
        return request.make(
            messages=[{"role": "user", "content": TEMPLATE.format(edges=listed, question=question)}],
            context=listed,
            outputs=answer,
            scorer="graphwalks",
            max_new_tokens=request.answer_tokens(MAX_NEW_TOKENS),
            answer_prefix=" Final Answer: [" if not request.tokenizer.chat_template else "",
            facts={"kind": kind, "node": node},
        )

    return fit_padded(request, costs, compose, least=8)


def answer_of(edges: Sequence[Edge], node: str, kind: str) -> list[str]:
    """The nodes asked for, sorted: those with an edge to `node`, or those at a distance of exactly two from it."""
    if kind == "parents":
        return sorted({source for source, target in edges if target == node})
    reached, front = {node}, {node}
    for _ in range(_STEPS):
        front = {target for source, target in edges if source in front} - reached
        reached |= front
    return sorted(front)


def _asked(rng: random.Random, edges: Sequence[Edge], kind: str) -> tuple[str, list[str]]:
    nodes = sorted({node for edge in edges for node in edge})
    for node in rng.sample(nodes, len(nodes)):
        answer = answer_of(edges, node, kind)
        if 1 <= len(answer) <= _MOST_NODES:
            return node, answer
    # Every edge has a parent; the one of the fewest is taken where a tiny graph has no better question.
    node = min(nodes, key=lambda name: len(answer_of(edges, name, kind)) or len(nodes))
    return node, answer_of(edges, node, kind)


def _edges(rng: random.Random, names: list[str], number: int) -> list[Edge]:
    """Different edges without loops, in random order."""
    found: dict[Edge, None] = {}
    most = len(names) * (len(names) - 1)
    while len(found) < min(number, most):
        source, target = rng.choice(names), rng.choice(names)
        if source != target:
            found[source, target] = None
    return list(found)


def _edge(source: str, target: str) -> str:
    return f"{source} -> {target}"


def _name(rng: random.Random) -> str:
    return f"{rng.getrandbits(32):08x}"
