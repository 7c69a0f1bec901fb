"""Needles: facts hidden in real text, asked for one by one in one conversation.

Used to make training data, to evaluate, and to train the embedded model, so that all three mean the same
task. The idea (key-value needles at controlled depths, several at once) follows Hsieh et al. 2024, RULER,
arXiv:2404.06654, and Kamradt's needle in a haystack; the text is always the user's own.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from longlora_cli.data.chat_template import Message
from longlora_cli.data.haystack import Haystack
from longlora_cli.data.synthetic.placing import place
from longlora_cli.data.synthetic.sheet import Line, Request, Sheet, Turn, spread_depths
from longlora_cli.data.wordings import Template, Wording, draw_keys, draw_value, templates


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

    From 512 tokens on it has at least 97 % of `length`.

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
    made: list[list[Fact]] = []  # the last are those of the text that was taken

    def sheet_for(context: str) -> Sheet:
        made.append(plan.facts(context))
        return plan.sheet(made[-1])

    window = random.Random(f"{key}:window")
    chat = place(haystack, tokenizer, length=length, window=window, sheet_for=sheet_for)
    placed = [replace(fact, depth=depth) for fact, depth in zip(made[-1], chat.depths, strict=True)]
    return RetrievalChat(chat.messages, placed, plan.asked, chat.tokens)


def needle(request: Request) -> Sheet:
    """The task for training: see the module."""
    plan = _Plan.draw(request.facts, request.questions, request.key, None, "train")
    return plan.sheet(plan.facts(request.context))


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
        spread = spread_depths(rng, facts)
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

    def sheet(self, facts: list[Fact]) -> Sheet:
        """The facts as lines, those asked as turns."""
        turns = [Turn(facts[number].question, facts[number].answer, (number,)) for number in self.asked]
        return Sheet([Line(fact.sentence) for fact in facts], self.depths, turns, after_titles=True)
