"""Lines into a text: where each goes, and how much of the text fits beside them."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from longlora_cli.data.chat_template import Message, count_tokens
from longlora_cli.data.haystack import Haystack, Sentence
from longlora_cli.data.synthetic.sheet import Line, Sheet, Turn
from longlora_cli.errors import DataError

# Fitting a chat to its length stops at this share, or after so many renderings.
_GOOD_ENOUGH = 0.98
_TRIES = 8
# Where words are longer than this in the mean, what lies between spaces is no word.
_LONGEST_WORD = 40


@dataclass(frozen=True)
class SyntheticChat:
    """A chat about lines hidden in a text.

    Args:
        messages: First the text, a blank line and the first question; then answers and further questions.
        lines: What was hidden.
        depths: Where each line came to stand: the share of the text's tokens before it, 0 to 1.
        turns: Questions and answers, in order.
        tokens: Length of the rendered chat, answers included.
    """

    messages: list[Message]
    lines: list[Line]
    depths: list[float]
    turns: list[Turn]
    tokens: int


def place(
    haystack: Haystack,
    tokenizer: Any,
    *,
    length: int,
    window: random.Random,
    sheet_for: Callable[[str], Sheet],
) -> SyntheticChat:
    """Hide a sheet's lines in consecutive sentences of the haystack so that the chat has at most `length` tokens.

    From 512 tokens on it has at least 97 % of them.

    Args:
        haystack: Where the text comes from.
        tokenizer: Counts the tokens; its chat template renders the chat.
        length: Longest chat in tokens, template and answers included.
        window: Chooses the sentence that the text begins with.
        sheet_for: The sheet for a text that the lines go into.

    Raises:
        DataError: Lines, questions and answers alone are longer than `length`; or the tokenizer has no template.
    """
    bare = bare_tokens(tokenizer, sheet_for(""))
    if bare > length:
        sheet = sheet_for("")
        raise DataError(
            f"{len(sheet.lines)} facts and {len(sheet.turns)} questions need {bare} tokens, more than {length}",
            hint="Hide or ask fewer facts, or allow longer chats.",
        )
    sentences, counts = _take(haystack, tokenizer, window, length - bare)
    sheet = sheet_for(" ".join(sentence.text for sentence in sentences))
    return _fit(tokenizer, sheet, sentences, counts, length)


def bare_tokens(tokenizer: Any, sheet: Sheet) -> int:
    """Tokens of a sheet's chat without any text around its lines."""
    return count_tokens(tokenizer, _messages(sheet, [], [0] * len(sheet.lines)))


def _messages(sheet: Sheet, sentences: list[Sentence], gaps: list[int]) -> list[Message]:
    """The chat with each line put before sentence `gaps[line]`."""
    order = sorted(range(len(gaps)), key=lambda number: (gaps[number], sheet.depths[number]))
    at_gap = {gap: list(lines) for gap, lines in itertools.groupby(order, key=gaps.__getitem__)}
    pieces: list[str] = []
    for gap, sentence in enumerate([*sentences, None]):
        for number in at_gap.get(gap, ()):
            line = sheet.lines[number]
            if line.is_paragraph and pieces and pieces[-1] != "\n\n":
                pieces[-1] = "\n\n"
            pieces += [line.text, "\n\n" if line.is_paragraph else " "]
        if sentence is not None:
            pieces += [sentence.text, sentence.joint]
    context = "".join(pieces).rstrip()
    messages: list[Message] = []
    for number, turn in enumerate(sheet.turns):
        messages += [
            {"role": "user", "content": turn.question if number else f"{context}\n\n{turn.question}"},
            {"role": "assistant", "content": turn.answer},
        ]
    return messages


def _take(
    haystack: Haystack, tokenizer: Any, rng: random.Random, budget: int
) -> tuple[list[Sentence], list[int]]:
    """Consecutive sentences of somewhat more than `budget` tokens, and the tokens of each."""
    stream = haystack.sentences(rng)
    sentences: list[Sentence] = []
    counts: list[int] = []
    # Counts of single sentences are off by the joints, at most a few per cent.
    while sum(counts) < budget * 1.1 + 64:
        batch = list(itertools.islice(stream, 8 + max(0, budget - sum(counts)) // 24))
        sentences += batch
        counts += haystack.token_counts(tokenizer, batch)
    return sentences, counts


def _fit(
    tokenizer: Any, sheet: Sheet, sentences: list[Sentence], counts: list[int], length: int
) -> SyntheticChat:
    """Use as many of the sentences as fit, the last one cut at a word."""
    ends = list(itertools.accumulate(counts, initial=0))
    bare = bare_tokens(tokenizer, sheet)
    budget, best = length - bare, None
    for _ in range(_TRIES):
        if budget < 0:
            break
        filler, filler_ends = _cut(sentences, ends, budget)
        gaps = _gaps(sheet, filler, filler_ends)
        messages = _messages(sheet, filler, gaps)
        tokens = count_tokens(tokenizer, messages)
        if tokens <= length and (best is None or tokens > best.tokens):
            total = max(filler_ends[-1], 1)
            depths = [filler_ends[gap] / total for gap in gaps]
            best = SyntheticChat(messages, sheet.lines, depths, sheet.turns, tokens)
        if length * _GOOD_ENOUGH <= tokens <= length:
            break
        budget += length - tokens
        if tokens > length:  # a word more or less can be a token too many each time: aim a little below
            budget -= 1 + length // 500
    if best is None:  # what was drawn again for this text is longer than what was counted
        raise DataError(
            f"{len(sheet.lines)} facts with their questions take {bare:,} of the {length:,} tokens of a chat: no text "
            "fits between them",
            hint="Hide fewer facts, ask fewer questions, or make the chats longer.",
        )
    return best


def _cut(sentences: list[Sentence], ends: list[int], budget: int) -> tuple[list[Sentence], list[int]]:
    """Whole sentences within `budget` tokens, a share of the next one's words, and the running counts."""
    whole = bisect.bisect_right(ends, budget) - 1
    filler, filler_ends = sentences[:whole], ends[: whole + 1]
    if whole < len(sentences):
        text = sentences[whole].text
        # Chinese and Japanese have no spaces to cut at.
        space = "" if len(text) > _LONGEST_WORD * (text.count(" ") + 1) else " "
        words = text.split(" ") if space else list(text)
        share = (budget - ends[whole]) / (ends[whole + 1] - ends[whole])
        if kept := int(len(words) * share):
            filler = [*filler, replace(sentences[whole], text=space.join(words[:kept]) + "...", joint=" ")]
            filler_ends = [*filler_ends, budget]
    return filler, filler_ends


def _gaps(sheet: Sheet, filler: list[Sentence], ends: list[int]) -> list[int]:
    """The gap between sentences for each line."""
    if sheet.after_titles:
        return [_nearest(ends, depth) for depth in sheet.depths]
    usable = [gap for gap in range(len(ends)) if not (gap and filler[gap - 1].is_title)]
    places = [ends[gap] for gap in usable]
    return [usable[_nearest(places, depth, ends[-1])] for depth in sheet.depths]


def _nearest(ends: list[int], depth: float, total: int | None = None) -> int:
    """The gap whose place is nearest to this share of all tokens; the last gap's place says how many they are."""
    place = depth * (ends[-1] if total is None else total)
    after = min(bisect.bisect_left(ends, place), len(ends) - 1)
    before = max(after - 1, 0)
    return before if place - ends[before] < ends[after] - place else after
