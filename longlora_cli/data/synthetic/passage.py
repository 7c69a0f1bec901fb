"""Repeat a paragraph: marked passages of the user's own texts, one of them to be said again word for word.

Long exact copies from a given place, where the answers of other tasks are a few tokens; of the kind that long-context
suites since Mohtashami and Jaggi 2023 (arXiv:2305.16300) ask for as keys, with the key as long as a paragraph.
"""

from __future__ import annotations

import random

from longlora_cli.data.haystack import Haystack
from longlora_cli.data.synthetic.draw import Fresh
from longlora_cli.data.synthetic.sheet import Form, Line, Request, Sheet, Turn, spread_depths

# Whole sentences until so many characters: 30 to 130 tokens of English.
_CHARACTERS = 120
_SENTENCES = 12
FORMS: tuple[Form, ...] = (
    {
        "line": "[Passage {name}] {text} [End of passage {name}]",
        "question": "Repeat the passage {name} exactly, leaving out its marks.",
    },
    {
        "line": "Copy this for the {name}: {text} (End of the copy for the {name}.)",
        "question": "What is to be copied for the {name}? Say exactly that.",
    },
    {
        "line": "<{name}> {text} </{name}>",
        "question": "Which text stands between <{name}> and </{name}>? Say exactly that.",
    },
)


def repeat_paragraph(request: Request) -> Sheet:
    """See the module. One line and at most one question a passage; passages come from anywhere in the texts."""
    rng = request.rng("structure")
    form = rng.choice(FORMS)
    depths = spread_depths(rng, request.facts)
    asked = rng.sample(range(request.facts), request.questions)
    texts = [_passage(request.haystack, request.rng(f"passage {number}")) for number in range(request.facts)]
    fresh, names_rng = Fresh(request), request.rng("names")
    names: list[str] = []
    while len(names) < request.facts:  # a name in a passage would make its marks ambiguous
        name = fresh.things(names_rng, 1)[0]
        names += [] if any(name in text for text in texts) else [name]
    lines = [
        Line(form["line"].format(name=name, text=text), is_paragraph=True)
        for name, text in zip(names, texts, strict=True)
    ]
    turns = [Turn(form["question"].format(name=names[n]), texts[n], (n,)) for n in asked]
    return Sheet(lines, depths, turns)


def _passage(haystack: Haystack, rng: random.Random) -> str:
    sentences: list[str] = []
    for sentence in haystack.sentences(rng):
        sentences.append(sentence.text)
        is_enough = sum(map(len, sentences)) >= _CHARACTERS or len(sentences) >= _SENTENCES
        if (is_enough and not sentence.is_title) or len(sentences) == 2 * _SENTENCES:
            break
    return " ".join(sentences)
