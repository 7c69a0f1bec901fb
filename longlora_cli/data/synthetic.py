"""Retrieval chats: facts hidden in real text, asked for in one conversation.

Used to make training data, to evaluate, and to train the embedded model, so that all three mean the same
task. The idea (key-value needles at controlled depths, several at once) follows Hsieh et al. 2024, RULER,
arXiv:2404.06654, and Kamradt's needle in a haystack; the text is always the user's own. Sample `index` of
`seed` is a function of these two numbers, the haystack and the tokenizer, whatever was made before it.
"""

from __future__ import annotations

import bisect
import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

from longlora_cli.data.chat_template import Message, count_tokens
from longlora_cli.data.haystack import Haystack, Sentence
from longlora_cli.data.wordings import Template, Wording, draw_keys, draw_value, templates
from longlora_cli.errors import DataError

# Training lengths run from this share of the longest one up to it, each as likely as any other. Spread evenly by their
# logarithm, chats longer than three quarters of the longest held 29 % of the tokens; now they hold 44 %, and a seventh
# of the chats is still shorter than a quarter. The far distances between question and fact are what a base lacks.
_SHORTEST_SHARE = 1 / 8
# Fitting a chat to its length stops at this share, or after so many renderings.
_GOOD_ENOUGH = 0.98
_TRIES = 8


@dataclass(frozen=True)
class Fact:
    """One hidden fact.

    Args:
        key: What it is about, such as `amber falcon`.
        value: The answer: five digits or one word; it stands in the context exactly once.
        sentence: How the context states it.
        question: How it is asked.
        answer: What the assistant must say: the bare value.
        depth: The share of the filler's tokens that come before it, 0 to 1.
    """

    key: str
    value: str
    sentence: str
    question: str
    answer: str
    depth: float


@dataclass(frozen=True)
class RetrievalChat:
    """A chat about hidden facts.

    Args:
        messages: First the context, a blank line and the first question; then answers and further questions.
        facts: All hidden facts; in the order of the given depths, else of their place.
        asked: Indices into `facts`, in the order of the questions.
        tokens: Length of the rendered chat, answers included.
    """

    messages: list[Message]
    facts: list[Fact]
    asked: list[int]
    tokens: int


def make_retrieval_chat(
    haystack: Haystack,
    tokenizer: Any,
    *,
    length: int,
    facts: int,
    questions: int,
    seed: int,
    index: int,
    depths: list[float] | None = None,
    wording: Wording = "train",
    stream: str = "eval",
) -> RetrievalChat:
    """Make one chat of at most `length` tokens, template and answers included.

    From 512 tokens on it has at least 95 % of `length`.

    Args:
        haystack: Where the context comes from: consecutive sentences from a random one on.
        tokenizer: Counts the tokens; its chat template renders the chat.
        length: Longest chat in tokens.
        facts: Facts to hide.
        questions: How many of them are asked, at most `facts`.
        seed: With `index`, decides everything random.
        index: Number of the sample.
        depths: Depth of each fact, 0 to 1; the first `questions` of them are asked, in order. Default: one
            random depth in each of `facts` equal parts of the context, and a random choice is asked.
        wording: `eval` uses sentences and nouns that `train` never does.
        stream: Chats of another stream share nothing at the same seed and index: what is trained on must not
            be what is tested.

    Raises:
        DataError: Facts, questions and answers alone are longer than `length`; or the tokenizer has no
            template; or the text holds nearly every five-digit number.
        ValueError: More questions than facts, or another number of depths than of facts.
    """
    if questions > facts or (depths is not None and len(depths) != facts):
        raise ValueError(f"{questions} questions, {facts} facts, depths {depths}")
    key = f"{stream}:{seed}:{index}"
    plan = _Plan.draw(facts, questions, key, depths, wording)
    bare = count_tokens(tokenizer, plan.messages([], [], plan.facts("")))
    if bare > length:
        raise DataError(
            f"{facts} facts and {questions} questions need {bare} tokens, more than {length}",
            hint="Hide or ask fewer facts, or allow longer chats.",
        )
    rng = random.Random(f"{key}:window")
    sentences, counts = _take(haystack, tokenizer, rng, length - bare)
    return _fit(tokenizer, plan, sentences, counts, length)


def make_training_chat(
    haystack: Haystack,
    tokenizer: Any,
    *,
    longest: int,
    facts: int,
    questions: int,
    seed: int,
    index: int,
) -> RetrievalChat:
    """`make_retrieval_chat` of a random length, uniform from an eighth of `longest` up to it.

    Where an eighth does not hold the facts, lengths begin at what the facts need.
    """
    key = f"train:{seed}:{index}"
    plan = _Plan.draw(facts, questions, key, None, "train")
    # A twentieth more than the facts need: values that the context holds already are drawn again.
    needed = count_tokens(tokenizer, plan.messages([], [], plan.facts(""))) * 21 // 20
    shortest = min(longest, max(int(longest * _SHORTEST_SHARE), needed))
    share = random.Random(f"{key}:length").random()
    length = round(shortest + (longest - shortest) * share)
    return make_retrieval_chat(
        haystack,
        tokenizer,
        length=length,
        facts=facts,
        questions=questions,
        seed=seed,
        index=index,
        stream="train",
    )


@dataclass(frozen=True)
class _Plan:
    """What of a sample does not depend on its context: keys, templates, depths, and which facts are asked."""

    keys: list[str]
    templates: list[Template]
    depths: list[float]
    asked: list[int]
    wording: Wording
    seed: str

    @staticmethod
    def draw(facts: int, questions: int, seed: str, depths: list[float] | None, wording: Wording) -> _Plan:
        rng = random.Random(seed)
        keys = draw_keys(rng, facts, wording)
        chosen = [rng.choice(templates(wording)) for _ in keys]
        spread = [(number + rng.random()) / facts for number in range(facts)]
        picked = rng.sample(range(facts), questions)
        asked = picked if depths is None else list(range(questions))
        return _Plan(keys, chosen, spread if depths is None else depths, asked, wording, seed)

    def facts(self, context: str) -> list[Fact]:
        """The facts, with values that neither `context` nor another fact holds."""
        rng = random.Random(f"{self.seed}:values")
        found: list[Fact] = []
        for key, template, depth in zip(self.keys, self.templates, self.depths, strict=True):
            template, value = draw_value(rng, template, self.wording, context, [fact.value for fact in found])
            sentence = template.sentence.format(key=key, value=value)
            question = template.question.format(key=key)
            found.append(Fact(key, value, sentence, question, answer=value, depth=depth))
        return found

    def messages(self, sentences: list[Sentence], gaps: list[int], facts: list[Fact]) -> list[Message]:
        """The chat with each fact put before sentence `gaps[fact]`; without gaps all stand at the end."""
        gaps = gaps or [len(sentences)] * len(facts)
        order = sorted(range(len(facts)), key=lambda number: (gaps[number], self.depths[number]))
        pieces: list[str] = []
        for gap, sentence in enumerate([*sentences, None]):
            for number in order:
                if gaps[number] == gap:
                    pieces += [facts[number].sentence, " "]
            if sentence is not None:
                pieces += [sentence.text, sentence.joint]
        context = "".join(pieces).rstrip()
        messages: list[Message] = []
        for turn, number in enumerate(self.asked):
            question = facts[number].question
            messages += [
                {"role": "user", "content": question if turn else f"{context}\n\n{question}"},
                {"role": "assistant", "content": facts[number].answer},
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
    tokenizer: Any, plan: _Plan, sentences: list[Sentence], counts: list[int], length: int
) -> RetrievalChat:
    """Use as many of the sentences as fit, the last one cut at a word."""
    facts = plan.facts(" ".join(sentence.text for sentence in sentences))
    ends = list(itertools.accumulate(counts, initial=0))
    bare = count_tokens(tokenizer, plan.messages([], [], facts))
    budget, best = length - bare, None
    for _ in range(_TRIES):
        if budget < 0:
            break
        filler, filler_ends = _cut(sentences, ends, budget)
        gaps = [_nearest(filler_ends, depth) for depth in plan.depths]
        messages = plan.messages(filler, gaps, facts)
        tokens = count_tokens(tokenizer, messages)
        if tokens <= length and (best is None or tokens > best.tokens):
            total = max(filler_ends[-1], 1)
            placed = [replace(f, depth=filler_ends[gap] / total) for f, gap in zip(facts, gaps, strict=True)]
            best = RetrievalChat(messages, placed, plan.asked, tokens)
        if length * _GOOD_ENOUGH <= tokens <= length:
            break
        budget += length - tokens
        if tokens > length:  # a word more or less can be a token too many each time: aim a little below
            budget -= 1 + length // 500
    if best is None:  # the values drawn again are longer than those that were counted
        raise DataError(f"{len(facts)} facts need {bare} tokens, more than {length}")
    return best


def _cut(sentences: list[Sentence], ends: list[int], budget: int) -> tuple[list[Sentence], list[int]]:
    """Whole sentences within `budget` tokens, a share of the next one's words, and the running counts."""
    whole = bisect.bisect_right(ends, budget) - 1
    filler, filler_ends = sentences[:whole], ends[: whole + 1]
    if whole < len(sentences):
        words = sentences[whole].text.split(" ")
        share = (budget - ends[whole]) / (ends[whole + 1] - ends[whole])
        if kept := int(len(words) * share):
            filler = [*filler, replace(sentences[whole], text=" ".join(words[:kept]) + "...", joint=" ")]
            filler_ends = [*filler_ends, budget]
    return filler, filler_ends


def _nearest(ends: list[int], depth: float) -> int:
    """The gap between sentences whose place is nearest to this share of the tokens."""
    place = depth * ends[-1]
    after = min(bisect.bisect_left(ends, place), len(ends) - 1)
    before = max(after - 1, 0)
    return before if place - ends[before] < ends[after] - place else after
