"""Repeat: copy one numbered paragraph of a long text word for word."""

from __future__ import annotations

from collections.abc import Sequence

from longlora_cli.errors import DataError
from longlora_cli.evaluation.tasks.sample import Sample
from longlora_cli.evaluation.tasks.synthetic.hiding import Piece, take
from longlora_cli.evaluation.tasks.synthetic.listing import fit_padded
from longlora_cli.evaluation.tasks.synthetic.request import Request, unit_costs

TEMPLATE = (
    "{context}\n\nRepeat the text of paragraph {number} word for word, without its number and without "
    "anything else."
)
MAX_NEW_TOKENS = 256
_LONGEST = 160
_ANSWER_SHARE = 0.8


def repeat(request: Request) -> Sample:
    """Paragraphs are sentences of the haystack up to 160 tokens; the depth that is asked for chooses one."""
    most = request.answer_tokens(MAX_NEW_TOKENS)
    texts = _paragraphs(take(request).pieces, min(_LONGEST, int(most * _ANSWER_SHARE)))
    units = [f"Paragraph {number}: {text}" for number, text in enumerate(texts, start=1)]
    depth = request.some_depth()
    costs = unit_costs(request, [unit + "\n\n" for unit in units])

    def compose(count: int, padding: str) -> Sample:
        asked = _unique(texts, round(depth * (count - 1)), count)
        listed = units[:count]
        context = "\n\n".join([*listed, padding] if padding else listed)
        content = TEMPLATE.format(context=context, number=asked + 1)
        total = sum(costs[:count]) + sum(unit_costs(request, [padding] if padding else []))
        return request.make(
            messages=[{"role": "user", "content": content}],
            context=context,
            outputs=[texts[asked]],
            scorer="synthetic.copy",
            max_new_tokens=most,
            answer_prefix=f" Paragraph {asked + 1}:",
            facts={"actual_depth": sum(costs[:asked]) / total, "paragraphs": count},
        )

    return fit_padded(request, costs, compose, least=1)


def _unique(texts: Sequence[str], wanted: int, count: int) -> int:
    """The first paragraph from the wanted one on whose text is in no other: a refrain would be two paragraphs' text."""
    for step in range(count):
        asked = (wanted + step) % count
        if sum(texts[asked] in text for text in texts) == 1:
            return asked
    raise DataError(
        "every paragraph of the haystack is in another one, so that none can be asked for",
        rule="repeat copies a paragraph that stands in the text once.",
        hint="Give texts with --haystack, not noise, or leave repeat out.",
    )


def _paragraphs(pieces: Sequence[Piece], most: int) -> list[str]:
    """Consecutive sentences of at most `most` tokens; a longer sentence is passed over."""
    found: list[str] = []
    texts: list[str] = []
    tokens = 0
    for piece in pieces:
        if piece.tokens > most:
            continue
        if tokens + piece.tokens > most:
            found.append(" ".join(texts))
            texts, tokens = [], 0
        texts.append(piece.text)
        tokens += piece.tokens
    return [*found, " ".join(texts)]
